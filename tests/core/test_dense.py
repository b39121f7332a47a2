"""Consumers of dense attention: vectors they lack, lengths past the page table, slots and pages of a second cache."""

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
from nsa_plugin.core import api, records, triton_binding
from nsa_plugin.core.api import Impl
from nsa_plugin.core.batch import NO_LIMIT, BlockTable, SlotMap
from nsa_plugin.core.metadata import ROW_VECTORS, differing_fields, planes_of
from tests.batches import POISON, Case, interpreted, poisoned, strided
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


@st.composite
def mapped_cases(draw: st.DrawFn) -> Case:
    """Any batch whose slots a second cache has elsewhere: some of its slots are 0 or -1, some tokens are not written."""
    case = draw(interpreted(min_batch_size=1))
    batch, generator = case.batch, torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    slots = batch.slots
    number = 1 << 12
    if isinstance(slots, TokenTable):
        slots = TokenTable(slots.req_to_token % number, slots.req_pool_indices)
    else:
        slots = BlockTable(slots.block_table % (number // slots.block_size), slots.block_size)
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    mapping = torch.randint(0, 1 << 20, (number,), generator=generator, dtype=dtype)
    mapping[torch.rand(number, generator=generator) < 0.2] = -1
    written = torch.randint(-1, number, (len(batch.offsets), draw(st.integers(0, 9))), generator=generator, dtype=dtype)
    slot_map = SlotMap(mapping, strided(written, draw(st.sampled_from([1, 3]))))
    geometry = replace(case.geometry, index_kpool=1)
    return Case(replace(batch, slots=slots, slot_map=slot_map, accepted=None), geometry)


def poisoned_with_maps(case: Case, stride: int = 1) -> PrecomputedMetadata:
    made = poisoned(case.batch, case.geometry, 1, stride)[0]
    assert case.batch.slot_map is not None
    table = strided(torch.full((case.batch.num_rows, case.geometry.real_width), POISON, dtype=torch.int32), stride)
    slots = torch.full((case.batch.slot_map.written.shape[1],), POISON)
    steps = [replace(step, mapped_page_table=table, mapped_slots=strided(slots, stride)) for step in made.steps]
    return replace(made, steps=tuple(steps))


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=examples(25))
@given(case=mapped_cases(), stride=st.sampled_from([1, 3]))
def test_slots_and_pages_of_a_second_cache(impl: Impl, case: Case, stride: int) -> None:
    """By a loop over the pages that the consumer has in the first cache; the planes of that one are as ever."""
    batch, geometry = case.batch, case.geometry
    assert batch.slot_map is not None
    mapping, written = batch.slot_map.mapping.tolist(), batch.slot_map.written.tolist()
    plain = precompute(replace(batch, slot_map=None), geometry, impl="reference")
    out = precompute(batch, geometry, impl=impl, out=poisoned_with_maps(case, stride))
    for index, step in enumerate(out.steps):
        assert step.mapped_slots is not None
        assert step.mapped_slots.tolist() == [-1 if slot < 0 else mapping[slot] for slot in written[index]]
        own = replace(step, mapped_slots=None, mapped_page_table=None)
        assert differing_fields(plain, own, index) == []
    slots = batch.slots.lookup(batch.batch_size, geometry.table_width, geometry.page_size).tolist()
    lengths = [min(length, geometry.table_width) for length in plain.steps[-1].cache_seqlens.tolist()]
    table, first_row = out.steps[0].mapped_page_table, 0
    assert table is not None
    for request, length in enumerate(lengths):
        rows = batch.rows_per_request if batch.extend_lens is None else int(batch.extend_lens[request])
        pages = -(-length // geometry.page_size)
        want = [mapping[slot] // geometry.page_size for slot in slots[request][:pages]]
        for row in range(first_row, first_row + rows):
            assert table[row, :pages].tolist() == want
        first_row += rows


@pytest.mark.parametrize("page_size", [1, 4, 32])
def test_pages_of_a_second_cache_across_tiles(monkeypatch: pytest.MonkeyPatch, page_size: int) -> None:
    """Tiles of 16 columns and blocks of 16 tokens: every loop runs several times."""
    monkeypatch.setattr(triton_binding, "TILE", 16)
    monkeypatch.setattr(triton_binding, "BLOCK", 16)
    generator = torch.Generator().manual_seed(page_size)
    table = torch.randint(0, 1 << 12, (2, 200), generator=generator)
    slot_map = SlotMap(torch.randperm(1 << 12, generator=generator), torch.randint(0, 1 << 12, (3, 40)))
    batch = replace(DRAFT, seq_lens=torch.tensor([197, 33]), slots=TokenTable(table, SLOTS.req_pool_indices))
    batch = replace(batch, slot_map=slot_map)
    geometry = Geometry(1, page_size, 200, num_sms=1, wide_page_table=False, max_length=NO_LIMIT)
    want = precompute(batch, geometry, impl="reference")
    got = precompute(batch, geometry, impl="triton", out=poisoned_with_maps(Case(batch, geometry)))
    for index, step in enumerate(got.steps):
        assert differing_fields(want, step, index) == []


@pytest.mark.parametrize("impl", IMPLS)
def test_the_switch_is_that_of_mapped_planes_too(impl: Impl) -> None:
    batch = replace(DRAFT, slot_map=SlotMap(torch.arange(64).flip(0), torch.arange(6).view(3, 2)))
    case = Case(batch, replace(GEOMETRY, max_length=NO_LIMIT))
    out, enabled = poisoned_with_maps(case), torch.zeros(1, dtype=torch.int32)
    steps = [without(step, NO_ROWS) for step in out.steps]
    plan = ReplayPlan(
        batch, case.geometry, steps, strategy="share", enabled=enabled,
        bind=lambda *given, **more: api.bind(*given, impl=impl, **more),
    )  # fmt: skip
    plan.run(batch)
    assert all((values == POISON).all() for step in steps for values in planes_of(step))
    enabled.fill_(1)
    plan.run(batch)
    assert [step.mapped_slots.tolist() for step in steps if step.mapped_slots is not None] == [
        [63, 62],
        [61, 60],
        [59, 58],
    ]
    assert steps[0].mapped_page_table is not None
    assert steps[0].mapped_page_table[0, :2].tolist() == [1, 0]  # request 1: slots 32 and 48, so 31 and 15
    with pytest.raises(InvalidValueError, match=r"batch\.slot_map is None"):
        plan.run(replace(batch, slot_map=None))


def test_a_record_has_room_for_mapped_planes() -> None:
    batch = replace(DRAFT, slot_map=SlotMap(torch.arange(64), torch.arange(6).view(3, 2)))
    step = PrecomputedMetadata.allocate(batch, GEOMETRY).steps[0]
    words = records.records([step], (0,), ())[0].tolist()
    assert step.mapped_page_table is not None and step.mapped_slots is not None
    table, slots = records.WORD["mapped_page_table"], records.WORD["mapped_slots"]
    assert words[table : table + 3] == [step.mapped_page_table.data_ptr(), *step.mapped_page_table.stride()]
    assert words[slots : slots + 2] == [step.mapped_slots.data_ptr(), 1]


def test_slot_maps_that_do_not_fit_are_refused() -> None:
    good = SlotMap(torch.arange(64), torch.arange(6).view(3, 2))
    batch = replace(DRAFT, slot_map=good)
    out = PrecomputedMetadata.allocate(batch, GEOMETRY)
    precompute(batch, GEOMETRY, out=out, checked=True)
    wrong: list[tuple[SlotMap, str]] = [
        (replace(good, mapping=good.mapping.float()), "mapping: expected int32 or int64, got float32"),
        (replace(good, mapping=torch.arange(128)[::2]), "mapping: expected a contiguous vector"),
        (replace(good, mapping=torch.arange(0)), "mapping: expected at least 1 entries"),
        (
            replace(good, mapping=torch.arange(48)),
            r"mapping: expected an entry for every slot, so at least 49, got 48",
        ),
        (replace(good, written=good.written + 60), "mapping: expected an entry for every slot, so at least 66, got 64"),
        (replace(good, written=good.written[0]), "written: expected 2 dimension"),
        (replace(good, written=good.written[:2]), "written: expected at least 3 rows"),
    ]
    for slot_map, message in wrong:
        with pytest.raises((InvalidValueError, InvalidTypeError), match=rf"slot_map\.{message}"):
            precompute(replace(batch, slot_map=slot_map), GEOMETRY, checked=True)
    with pytest.raises(InvalidValueError, match="mapped_page_table: expected both mapped_page_table and mapped_slots"):
        precompute(DRAFT, GEOMETRY, out=out)
    alone = replace(out, steps=tuple(replace(step, mapped_slots=None) for step in out.steps))
    with pytest.raises(InvalidValueError, match="mapped_page_table: expected both mapped_page_table and mapped_slots"):
        precompute(batch, GEOMETRY, out=alone)
    narrow = tuple(replace(step, mapped_slots=torch.zeros(2, dtype=torch.int32)) for step in out.steps)
    with pytest.raises(InvalidTypeError, match="mapped_slots: expected int64, got int32"):
        precompute(batch, GEOMETRY, out=replace(out, steps=narrow))
    with pytest.raises(InvalidValueError, match="mapped_slots: expected None: a copy takes no mapped planes"):
        fast_copy(out, out.steps)
    with pytest.raises(InvalidValueError, match="mapped_slots: expected None: a copy takes no mapped planes"):
        ReplayPlan(batch, GEOMETRY, list(out.steps), strategy="copy")


@pytest.mark.parametrize("impl", IMPLS)
def test_a_copy_goes_to_consumers_without_mapped_planes(impl: Impl) -> None:
    """One launch does not serve both; the first consumer is computed in place, the other gets a copy."""
    batch = replace(
        DRAFT, num_steps=2, step_offsets=(), slot_map=SlotMap(torch.arange(64).flip(0), torch.arange(2)[None])
    )
    case = Case(batch, GEOMETRY)
    first, plain = poisoned_with_maps(case).steps[0], poisoned(replace(batch, slot_map=None), GEOMETRY)[0].steps[0]
    bind = lambda *given, **more: api.bind(*given, impl=impl, **more)  # noqa: E731
    ReplayPlan(batch, GEOMETRY, [first, plain], strategy="copy", bind=bind).run(batch)
    want = precompute(batch, GEOMETRY, impl="reference")
    assert differing_fields(want, first) == differing_fields(want, plain) == []
