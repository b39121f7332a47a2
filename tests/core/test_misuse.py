"""Input of the right types that makes no sense: planes that overlap, batches unlike the plan's, values out of range."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_plugin import BatchDescriptor, BlockTable, ForwardMode, InvalidValueError, ReplayPlan, StepMetadata, precompute
from nsa_plugin.core.checks import overlap, overlaps_itself
from tests.batches import poisoned
from tests.core.test_validation import BATCH, GEOMETRY, TABLE

STEP = poisoned(BATCH, GEOMETRY)[0].steps[0]
BIG = torch.zeros(4096, dtype=torch.int32)
VERIFY = replace(BATCH, mode=ForwardMode.TARGET_VERIFY, draft_tokens=2)
EXTEND = replace(BATCH, mode=ForwardMode.DRAFT_EXTEND, draft_tokens=2)
GROWN = replace(BATCH, num_steps=2, step_offsets=(0, 1))


@settings(max_examples=300)
@given(st.data())
def test_overlap_is_what_a_set_of_addresses_says(data: st.DataObject) -> None:
    def view() -> tuple[torch.Tensor, set[int], int]:
        shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=2))
        strides = [data.draw(st.integers(0, 12)) for _ in shape]
        tensor = BIG.as_strided(shape, strides, data.draw(st.integers(0, 60)))
        first = (tensor.data_ptr() - BIG.data_ptr()) // 4
        places = [first + sum(i * s for i, s in zip(at, strides, strict=True)) for at in torch.cartesian_prod(
            *(torch.arange(size) for size in shape)).view(-1, len(shape)).tolist()]  # fmt: skip
        return tensor, set(places), len(places)

    (a, mine, count), (b, theirs, _) = view(), view()
    assert overlap(a, a.shape, b, b.shape) == bool(mine & theirs)
    if a.dim() == 2:
        assert overlaps_itself(a, *a.shape) == (len(mine) < count)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_k": STEP.nsa_cu_seqlens_k}, "nsa_cu_seqlens_k: expected a buffer apart from cu_seqlens_k"),
        ({"real_page_table": STEP.page_table_1}, "real_page_table: expected a buffer apart from page_table_1"),
        ({"page_table_1": BIG.as_strided((2, 128), (8, 1))}, "page_table_1: expected strides without overlap"),
        ({"nsa_cache_seqlens": STEP.cache_seqlens}, "nsa_cache_seqlens: expected a buffer apart from cache_seqlens"),
    ],
)
def test_planes_that_overlap_are_refused(change: dict[str, Any], message: str) -> None:
    step = replace(STEP, **change)
    with pytest.raises(InvalidValueError, match=message):
        ReplayPlan(BATCH, GEOMETRY, [step], strategy="share")


def test_steps_need_vectors_of_their_own_and_page_size_1_one_table() -> None:
    out = poisoned(GROWN, GEOMETRY)[0]
    with pytest.raises(
        InvalidValueError, match=r"out.steps\[1\].cache_seqlens: expected a buffer apart from out.steps\[0\]"
    ):
        precompute(GROWN, GEOMETRY, out=replace(out, steps=(out.steps[0], out.steps[0])))
    one = replace(GEOMETRY, page_size=1)
    step = poisoned(BATCH, one)[0].steps[0]
    ReplayPlan(BATCH, one, [step], strategy="share").run(BATCH)
    own = replace(step, real_page_table=torch.zeros(2, 128, dtype=torch.int32))
    with pytest.raises(InvalidValueError, match="real_page_table: expected page_table_1 itself with page size 1"):
        ReplayPlan(BATCH, one, [own], strategy="share")


def test_planes_between_each_other_in_one_buffer_are_taken() -> None:
    vectors = BIG.as_strided((5, 3), (1, 8)).unbind(0)
    names = ("cache_seqlens", "cu_seqlens_k", "nsa_cache_seqlens", "nsa_cu_seqlens_k")
    planes: dict[str, Any] = dict(zip(names, vectors, strict=False))
    tables = torch.zeros(2, 130, dtype=torch.int32)
    step = StepMetadata(
        **planes, seqlens_expanded=vectors[0], page_table_1=tables[:, :128], real_page_table=tables[:, 128:]
    )
    ReplayPlan(BATCH, GEOMETRY, [step], strategy="share").run(BATCH)
    assert step.cu_seqlens_k.tolist() == [0, 5, 75] and step.nsa_cu_seqlens_k.tolist() == [0, 5, 37]


@pytest.mark.parametrize(
    ("bound", "change", "message"),
    [
        (VERIFY, {"draft_tokens": 4}, "batch.draft_tokens: expected 2, .*, got 4"),
        (EXTEND, {"extend_lens": torch.ones(2, dtype=torch.int32)}, "batch.extend_lens is None: expected True"),
        (GROWN, {"step_offsets": (5, 9)}, r"batch.step_offsets: expected \(0, 1\), .*, got \(5, 9\)"),
        (
            BATCH,
            {"slots": BlockTable(TABLE.req_to_token, 16)},
            "batch.slots: expected .*TokenTable.*, got .*BlockTable",
        ),
    ],
)
def test_a_plan_refuses_batches_unlike_its_own(bound: BatchDescriptor, change: dict[str, Any], message: str) -> None:
    out = poisoned(bound, GEOMETRY)[0]
    plan = ReplayPlan(bound, GEOMETRY, out.steps, strategy="share")
    before = out.steps[0].cache_seqlens.clone()
    with pytest.raises(InvalidValueError, match=message):
        plan.run(replace(bound, **change))
    assert torch.equal(out.steps[0].cache_seqlens, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"slots": BlockTable(-TABLE.req_to_token, 64)},
            "block_table, request 0, column 1: expected 0 or more, got -1|request 1",
        ),
        (
            {"slots": replace(TABLE, req_to_token=-TABLE.req_to_token)},
            "req_to_token, request 0, column 0: expected 0 or more",
        ),
        (
            {"mode": ForwardMode.DRAFT_EXTEND, "draft_tokens": 6, "extend_lens": torch.tensor([6, 6])},
            r"extend_lens\[0\]: expected at most 5 \(its seq_lens\), got 6",
        ),
    ],
)
def test_checked_mode_reads_slots_and_rows(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        precompute(replace(BATCH, **change), GEOMETRY, checked=True)


def test_checked_mode_takes_lengths_that_stop_at_the_table_and_padding_shorter_than_its_rows() -> None:
    grown = replace(BATCH, num_steps=2, step_offsets=(0, 100))
    assert precompute(grown, GEOMETRY, checked=True).step(1).cache_seqlens.tolist() == [105, 128]
    padded = replace(BATCH, mode=ForwardMode.DRAFT_EXTEND, seq_lens=torch.tensor([1, 9]), draft_tokens=3)
    assert precompute(padded, GEOMETRY, checked=True).steps[0].seqlens_expanded.tolist() == [0, 0, 1, 7, 8, 9]
