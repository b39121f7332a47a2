"""The reference copy, and plans: what they write, where, and what they refuse."""

from __future__ import annotations

import doctest
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_plugin import (
    BatchDescriptor,
    ForwardMode,
    Geometry,
    InvalidValueError,
    PrecomputedMetadata,
    ReplayPlan,
    StepMetadata,
    TokenTable,
    fast_copy,
    precompute,
)
from nsa_plugin.core import api
from tests.batches import Case, assert_equal_live, cases, interpreted, poisoned
from tests.examples import examples


@settings(max_examples=100)
@given(cases(), st.integers(0, 16), st.sampled_from([1, 2]))
def test_reference_copy_equals_the_source(case: Case, count: int, stride: int) -> None:
    source = precompute(case.batch, case.geometry, impl="reference")
    count = len(source.steps) if len(source.steps) > 1 else count
    destinations = [made.steps[0] for made in poisoned(case.batch, case.geometry, count, stride)]
    fast_copy(source, destinations, impl="reference")
    for index, destination in enumerate(destinations):
        assert_equal_live(source, destination, index)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_derived_planes_are_copied_whole_to_every_destination(impl: str) -> None:
    batch, geometry = decode([3, 7])
    plane = torch.arange(3000, dtype=torch.int32).view(1500, 2)
    source = precompute(batch, geometry, impl="reference")
    source = replace(source, steps=(replace(source.steps[0], derived={"schedule": plane}),))
    copies = [
        replace(made.steps[0], derived={"schedule": torch.zeros_like(plane)}) for made in poisoned(batch, geometry, 4)
    ]
    fast_copy(source, copies, impl=impl)  # type: ignore[arg-type]
    for copy in copies:
        assert torch.equal(copy.derived["schedule"], plane)


def decode(lengths: list[int], width: int = 256, num_steps: int = 1) -> tuple[BatchDescriptor, Geometry]:
    requests = torch.arange(len(lengths)).flip(0)
    table = torch.randint(0, 1 << 20, (len(lengths), width), dtype=torch.int32)
    batch = BatchDescriptor(
        ForwardMode.DECODE, len(lengths), torch.tensor(lengths), TokenTable(table, requests), num_steps=num_steps
    )
    return batch, Geometry(64, 16, width, num_sms=2)


@settings(max_examples=examples(75))
@given(interpreted(), st.sampled_from(["copy", "share"]), st.sampled_from(["reference", "triton"]))
def test_every_consumer_of_a_plan_gets_the_reference(case: Case, strategy: str, impl: str) -> None:
    batch, geometry = case.batch, case.geometry
    want = precompute(batch, geometry, impl="reference")
    if strategy == "share":
        consumers = list(poisoned(batch, geometry)[0].steps)
        consumers += consumers[:1] * (batch.num_steps - len(consumers))
    else:
        consumers = [made.steps[0] for made in poisoned(batch, geometry, batch.num_steps)]
    bind = partial(api.bind, impl=impl)  # type: ignore[arg-type]
    plan = ReplayPlan(batch, geometry, consumers, strategy=strategy, bind=bind)  # type: ignore[arg-type]
    addresses = [step.real_page_table.data_ptr() for step in consumers]
    for _ in range(2):
        plan.run(batch)
    for index, consumer in enumerate(consumers):
        assert_equal_live(want, consumer, index)
    assert addresses == [step.real_page_table.data_ptr() for step in consumers]


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_plan_derives_once_and_copies_the_derived_plane(impl: str) -> None:
    batch, geometry = decode([5, 9], num_steps=3)
    consumers = [
        replace(made.steps[0], derived={"total": torch.zeros(1, dtype=torch.int32)})
        for made in poisoned(batch, geometry, 3)
    ]
    calls = []

    def derive() -> None:
        calls.append(1)
        consumers[0].derived["total"].copy_(consumers[0].cache_seqlens.sum(0, keepdim=True))

    bind = partial(api.bind, impl=impl)  # type: ignore[arg-type]
    ReplayPlan(batch, geometry, consumers, strategy="copy", derive=derive, bind=bind).run(batch)
    assert calls == [1]
    assert [int(step.derived["total"]) for step in consumers] == [14, 14, 14]


def test_a_plan_takes_new_lengths_and_new_tensors_but_no_other_shape() -> None:
    batch, geometry = decode([5, 9])
    consumer = PrecomputedMetadata.allocate(batch, geometry).steps[0]
    plan = ReplayPlan(batch, geometry, [consumer], strategy="share")
    other, _ = decode([200, 0])
    plan.run(other)
    assert consumer.cache_seqlens.tolist() == [200, 0]
    larger, _ = decode([1, 2, 3])
    with pytest.raises(InvalidValueError, match=r"batch: expected DECODE of 2 requests, got DECODE of 3"):
        plan.run(larger)
    with pytest.raises(InvalidValueError, match="got TARGET_VERIFY of 2"):
        plan.run(replace(other, mode=ForwardMode.TARGET_VERIFY))
    assert consumer.cache_seqlens.tolist() == [200, 0]


def test_the_example_of_a_plan_runs_as_written() -> None:
    result = doctest.testmod(sys.modules[ReplayPlan.__module__])
    assert result.attempted > 10 and not result.failed


def test_a_plan_uses_the_implementations_that_it_is_given() -> None:
    batch, geometry = decode([5, 9], num_steps=2)
    consumers = [made.steps[0] for made in poisoned(batch, geometry, 2)]
    seen: list[str] = []

    def bind(batch: BatchDescriptor, out: Any, destinations: Sequence[StepMetadata], *, enabled: object) -> Any:
        return (
            lambda live: seen.append(f"precompute {live.batch_size} for {len(out.steps)}"),
            lambda: seen.append(f"copy to {len(destinations)}"),
        )

    ReplayPlan(batch, geometry, consumers, strategy="copy", bind=bind).run(batch)
    assert seen == ["precompute 2 for 1", "copy to 1"]
