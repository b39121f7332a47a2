"""Positions and slots of the newest tokens, the planes that vLLM's draft steps add, in every implementation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_plugin import ForwardMode, InvalidTypeError, InvalidValueError, ReplayPlan, StepMetadata, fast_copy, precompute
from nsa_plugin.core.api import Impl
from tests.batches import POISON, Case, assert_equal_live, cases, interpreted, naive, poisoned
from tests.examples import examples

DECODE = (ForwardMode.DECODE,)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@settings(max_examples=examples(40))
@given(case=interpreted(modes=DECODE), stride=st.sampled_from([1, 3]))
def test_they_are_what_a_loop_says_clamped_at_the_tables_width(impl: Impl, case: Case, stride: int) -> None:
    batch, geometry = case.batch, case.geometry
    out = precompute(batch, geometry, impl=impl, out=poisoned(batch, geometry, stride=stride, tokens=True)[0])
    for index, offset in enumerate(batch.offsets):
        want = naive(batch, geometry, offset)
        step = out.step(index)
        assert step.positions is not None and step.slot_mapping is not None
        assert step.positions.tolist() == want["positions"]
        assert step.slot_mapping.tolist() == want["slot_mapping"]
        assert step.cache_seqlens.tolist() == want["cache_seqlens"]


@pytest.mark.parametrize("impl", ["reference", "triton"])
@settings(max_examples=examples(20))
@given(case=interpreted(modes=DECODE), mixed=st.booleans())
def test_they_are_copied_to_the_consumers_that_have_them(impl: Impl, case: Case, mixed: bool) -> None:
    source = precompute(
        case.batch, case.geometry, impl="reference", out=poisoned(case.batch, case.geometry, tokens=True)[0]
    )
    count = max(len(source.steps), 2) if len(source.steps) > 1 else 3
    with_tokens = [index == 0 or not mixed for index in range(count)]
    made = [poisoned(case.batch, case.geometry, stride=2, tokens=tokens)[0].steps[0] for tokens in with_tokens]
    fast_copy(source, made, impl=impl)
    for index, step in enumerate(made):
        want = source.step(index)
        if with_tokens[index]:
            assert_equal_live(source, step, index)
        else:
            assert step.positions is None
            assert_equal_live(source, replace(step, positions=want.positions, slot_mapping=want.slot_mapping), index)


def with_tables_of(first: StepMetadata, step: StepMetadata) -> StepMetadata:
    pools = step.pools
    if pools is not None and first.pools is not None:
        pools = replace(pools, page_table=first.pools.page_table)
    return replace(step, page_table_1=first.page_table_1, real_page_table=first.real_page_table, pools=pools)


@settings(max_examples=10)
@given(cases(modes=DECODE, max_width=200), st.sampled_from(["copy", "share"]))
def test_a_plan_fills_them(case: Case, strategy: str) -> None:
    batch, geometry = case.batch, case.geometry
    consumers = [made.steps[0] for made in poisoned(batch, geometry, batch.num_steps, tokens=True)]
    if strategy == "share":  # steps of different lengths have vectors of their own and one page table
        first = consumers[0]
        alike = len(batch.offsets) == 1
        consumers = [first if alike else with_tables_of(first, step) for step in consumers]
    ReplayPlan(batch, geometry, consumers, strategy=strategy).run(batch)  # type: ignore[arg-type]
    want = precompute(batch, geometry, impl="reference", out=poisoned(batch, geometry, tokens=True)[0])
    for index, step in enumerate(consumers):
        assert_equal_live(want, step, index)


@given(cases(modes=(ForwardMode.TARGET_VERIFY, ForwardMode.DRAFT_EXTEND)))
@settings(max_examples=5)
def test_only_decode_has_them(case: Case) -> None:
    with pytest.raises(InvalidValueError, match="positions: expected both positions and slot_mapping in DECODE"):
        precompute(case.batch, case.geometry, out=poisoned(case.batch, case.geometry, tokens=True)[0])


@given(cases(modes=DECODE))
@settings(max_examples=5)
def test_buffers_that_do_not_fit_are_refused(case: Case) -> None:
    batch, geometry = case.batch, case.geometry
    good = poisoned(batch, geometry, tokens=True)[0]
    alone = replace(good, steps=tuple(replace(step, slot_mapping=None) for step in good.steps))
    with pytest.raises(InvalidValueError, match="positions: expected both positions and slot_mapping"):
        precompute(batch, geometry, out=alone)
    narrow = torch.full((batch.batch_size,), POISON, dtype=torch.int32)
    with pytest.raises(InvalidTypeError, match="positions: expected int64, got int32"):
        precompute(batch, geometry, out=replace(good, steps=tuple(replace(s, positions=narrow) for s in good.steps)))
    source = precompute(batch, geometry)
    with pytest.raises(InvalidValueError, match="positions: expected None, as in the source"):
        fast_copy(source, [good.steps[0]] * max(len(source.steps), 1))
