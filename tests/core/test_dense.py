"""Consumers of dense attention: vectors that they lack, and lengths that go on past the page table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_plugin import (
    BatchDescriptor,
    ForwardMode,
    Geometry,
    InvalidTypeError,
    InvalidValueError,
    PrecomputedMetadata,
    ReplayPlan,
    StepMetadata,
    TokenTable,
    fast_copy,
    precompute,
)
from nsa_plugin.core.api import Impl
from nsa_plugin.core.batch import NO_LIMIT
from nsa_plugin.core.metadata import ROW_VECTORS, differing_fields
from tests.batches import Case, interpreted, poisoned
from tests.examples import examples

IMPLS = ["reference", "triton"]
NO_ROWS, LENGTHS_ONLY = ROW_VECTORS, ("cu_seqlens_k", *ROW_VECTORS)
SLOTS = TokenTable(torch.arange(64, dtype=torch.int32).view(2, 32), torch.tensor([1, 0]))
GEOMETRY = Geometry(index_topk=1, page_size=16, table_width=32, num_sms=1, wide_page_table=False)
DRAFT = BatchDescriptor(ForwardMode.DECODE, 2, torch.tensor([31, 5]), SLOTS, num_steps=3, step_offsets=(1, 2, 3))


def without(step: StepMetadata, lacking: Sequence[str]) -> StepMetadata:
    absent: dict[str, Any] = dict.fromkeys(lacking)
    return replace(step, **absent, pools=None)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=examples(15))
@given(case=interpreted(), lacking=st.sampled_from([NO_ROWS, LENGTHS_ONLY]), stride=st.sampled_from([1, 3]))
def test_vectors_that_a_consumer_lacks_are_left_out(
    impl: Impl, case: Case, lacking: Sequence[str], stride: int
) -> None:
    """Computed in place, and copied from a source that has all; all else is as it is with them."""
    batch, geometry = case.batch, case.geometry
    want = precompute(batch, geometry, impl="reference")
    made, copied = poisoned(batch, geometry, 2, stride)
    out = replace(made, steps=tuple(without(step, lacking) for step in made.steps))
    precompute(batch, geometry, impl=impl, out=out)
    for index, step in enumerate(out.steps):
        assert differing_fields(want, step, index) == []
    mixed = [without(step, lacking) if index % 2 == 0 else step for index, step in enumerate(copied.steps)]
    fast_copy(want, mixed, impl=impl)
    for index, step in enumerate(mixed):
        assert differing_fields(want, step, index) == []


@pytest.mark.parametrize("strategy", ["copy", "share"])
def test_a_plan_fills_consumers_that_lack_vectors(strategy: str) -> None:
    out = PrecomputedMetadata.allocate(DRAFT, GEOMETRY)
    steps = [without(step, NO_ROWS) for step in out.steps]
    ReplayPlan(DRAFT, GEOMETRY, steps, strategy=strategy).run(DRAFT)  # type: ignore[arg-type]
    assert [step.cu_seqlens_k.tolist() for step in steps] == [[0, 32, 38], [0, 32, 39], [0, 32, 40]]


def test_vectors_of_sparse_attention_come_together() -> None:
    out = PrecomputedMetadata.allocate(DRAFT, GEOMETRY)
    first, *others = out.steps
    for name in ROW_VECTORS:
        with pytest.raises(InvalidValueError, match=r"expected a tensor, or None and so"):
            precompute(DRAFT, GEOMETRY, out=replace(out, steps=(without(first, [name]), *others)))
    with pytest.raises(InvalidValueError, match=r"steps\[1\]\.cu_seqlens_k: expected those of all steps, or of none"):
        precompute(DRAFT, GEOMETRY, out=replace(out, steps=(replace(first, cu_seqlens_k=None), *others)))
    with pytest.raises(InvalidTypeError, match="cache_seqlens: expected a tensor"):
        precompute(DRAFT, GEOMETRY, out=replace(out, steps=(without(first, ["cache_seqlens"]), *others)))
    one = replace(DRAFT, num_steps=1, step_offsets=())
    source, target = (PrecomputedMetadata.allocate(one, GEOMETRY) for _ in range(2))
    with pytest.raises(InvalidValueError, match="cu_seqlens_k: expected None, as in the source"):
        fast_copy(replace(source, steps=(replace(source.steps[0], cu_seqlens_k=None),)), target.steps)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=examples(15))
@given(case=interpreted(min_batch_size=1), limit=st.sampled_from([1, 20, NO_LIMIT]))
def test_lengths_stop_at_their_own_limit_and_tables_at_their_width(impl: Impl, case: Case, limit: int) -> None:
    batch, geometry = replace(case.batch, accepted=None), replace(case.geometry, max_length=limit, index_kpool=1)
    made = poisoned(batch, geometry)[0]
    precompute(batch, geometry, impl=impl, out=made)
    for index, offset in enumerate(batch.offsets):
        lengths = [min(int(n) + batch.added_tokens + offset, limit) for n in batch.seq_lens[: batch.batch_size]]
        assert made.step(index).cache_seqlens.tolist() == lengths
        assert made.step(index).cu_seqlens_k.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        assert differing_fields(precompute(batch, geometry, impl="reference"), made.step(index), index) == []


@pytest.mark.parametrize("impl", IMPLS)
def test_the_last_tokens_of_a_context(impl: Impl) -> None:
    """By default lengths of steps stop at the table's width; without a limit they go on, and no column is added."""

    def steps(geometry: Geometry) -> list[list[int]]:
        return [step.cache_seqlens.tolist() for step in precompute(DRAFT, geometry, impl=impl).steps]

    assert steps(GEOMETRY) == [[32, 6], [32, 7], [32, 8]]
    assert steps(replace(GEOMETRY, max_length=NO_LIMIT)) == [[32, 6], [33, 7], [34, 8]]
    assert steps(replace(GEOMETRY, max_length=7)) == [[7, 6], [7, 7], [7, 7]]


@pytest.mark.parametrize(
    ("limit", "error"), [(0, InvalidValueError), (NO_LIMIT + 1, InvalidValueError), (1.5, InvalidTypeError)]
)
def test_limits_out_of_range_are_refused(limit: int, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"geometry\.max_length: expected"):
        precompute(DRAFT, replace(GEOMETRY, max_length=limit))


def test_positions_need_a_limit_within_the_table() -> None:
    geometry = replace(GEOMETRY, max_length=33)
    out = PrecomputedMetadata.allocate(DRAFT, geometry, tokens=True)
    with pytest.raises(InvalidValueError, match="positions: expected None with a max_length above table_width 32"):
        precompute(DRAFT, geometry, out=out)
