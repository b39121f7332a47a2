"""The switch that a plan reads on the device: off, a run leaves every buffer as it is; on, it does what it does without."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_plugin import (
    ForwardMode,
    InvalidTypeError,
    InvalidValueError,
    PrecomputedMetadata,
    ReplayPlan,
    StepMetadata,
)
from nsa_plugin.core import api
from nsa_plugin.core.metadata import PLANES, plane
from tests.batches import Case, interpreted, poisoned
from tests.core.test_validation import BATCH, GEOMETRY
from tests.examples import examples

pytest.importorskip("triton")


def memory(metadata: PrecomputedMetadata) -> list[torch.Tensor]:
    """Copies of all that lies in the storages of the buffers, gaps and tails too."""
    planes = [plane(step, name) for step in metadata.steps for name in PLANES]
    return [value.new_empty(0).set_(value.untyped_storage()).clone() for value in planes if value is not None]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def plan(case: Case, out: PrecomputedMetadata, impl: str, enabled: torch.Tensor | None) -> ReplayPlan:
    consumers = list(out.steps)
    consumers += consumers[:1] * (case.batch.num_steps - len(consumers))
    bind = partial(api.bind, impl=impl)  # type: ignore[arg-type]
    return ReplayPlan(case.batch, case.geometry, consumers, strategy="share", bind=bind, enabled=enabled)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("mode", ForwardMode)
def test_a_plan_that_is_switched_writes_all_or_nothing(impl: str, mode: ForwardMode) -> None:
    @settings(max_examples=25 if impl == "reference" else examples(12))
    @given(interpreted(modes=(mode,), max_width=200), st.sampled_from([1, 3]), st.booleans())
    def check(case: Case, stride: int, tokens: bool) -> None:
        batch = case.batch
        tokens = tokens and mode is ForwardMode.DECODE
        switched, always = poisoned(batch, case.geometry, 2, stride, tokens)
        enabled = torch.zeros(1, dtype=torch.int32)
        run, run_always = (plan(case, out, impl, flag).run for out, flag in ((switched, enabled), (always, None)))
        for lengths in (batch.seq_lens.clone(), batch.seq_lens.flip(0)):
            batch.seq_lens.copy_(lengths)
            before = memory(switched)
            enabled.fill_(0)
            run(batch)
            assert same(memory(switched), before)
            enabled.fill_(1)
            run(batch)
            run_always(batch)
            assert same(memory(switched), memory(always))

    check()


class HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts values that are read on the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_reference_does_not_read_the_switch_on_the_host() -> None:
    reads = []
    for enabled in (None, torch.ones(1, dtype=torch.int32)):
        run = api.bind_precompute(BATCH, poisoned(BATCH, GEOMETRY)[0], impl="reference", enabled=enabled)
        with HostReads() as counter:  # type: ignore[no-untyped-call]
            run(BATCH)
        reads.append(counter.count)
    assert reads[0] == reads[1]


BAD: list[tuple[Any, type[Exception], str]] = [
    (1, InvalidTypeError, "enabled: expected a tensor, got int"),
    (torch.ones(1, dtype=torch.bool), InvalidTypeError, "enabled: expected int32, got bool"),
    (torch.tensor(1, dtype=torch.int32), InvalidValueError, r"enabled: expected 1 dimension\(s\), got shape \(\)"),
    (torch.ones(2, dtype=torch.int32), InvalidValueError, "enabled: expected 1 entry, got 2"),
    (
        torch.ones(1, dtype=torch.int32, device="meta"),
        InvalidValueError,
        "enabled: expected device cpu .*, got device meta",
    ),
]


@pytest.mark.parametrize(("enabled", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_a_switch_of_another_kind_is_refused(enabled: Any, error: type[Exception], message: str) -> None:
    out = poisoned(BATCH, GEOMETRY)[0]
    with pytest.raises(error, match=message):
        ReplayPlan(BATCH, GEOMETRY, out.steps, strategy="share", enabled=enabled)
    for bind in (api.bind_precompute, partial(api.bind, destinations=())):
        with pytest.raises(error, match=message):
            bind(BATCH, out, enabled=enabled)


def test_copies_cant_be_switched() -> None:
    two = replace(BATCH, num_steps=2)
    steps: list[StepMetadata] = [made.steps[0] for made in poisoned(two, GEOMETRY, 2)]
    enabled = torch.ones(1, dtype=torch.int32)
    with pytest.raises(
        InvalidValueError, match=r"enabled: expected None where .* copied .*, got a tensor and 1 copies"
    ):
        ReplayPlan(two, GEOMETRY, steps, strategy="copy", enabled=enabled)
    ReplayPlan(BATCH, GEOMETRY, steps[:1], strategy="copy", enabled=enabled).run(BATCH)  # nothing to copy to
    assert steps[0].cache_seqlens.tolist() == [5, 70]
