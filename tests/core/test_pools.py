"""Pooled index keys in the core: what is live, what is refused, and what a consumer may lack."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_plugin import (
    BatchDescriptor,
    BlockTable,
    ForwardMode,
    Geometry,
    InvalidValueError,
    PrecomputedMetadata,
    ReplayPlan,
    TokenTable,
    fast_copy,
    precompute,
)
from nsa_plugin.core import api, records, triton_binding
from nsa_plugin.core.metadata import PLANES, differing_fields, live_entries, plane
from tests.batches import Case, assert_equal_live, interpreted, poisoned

GEOMETRY = Geometry(index_topk=8, page_size=16, table_width=128, num_sms=1, index_kpool=4)
SLOTS = TokenTable(torch.arange(256, dtype=torch.int32).view(2, 128), torch.tensor([1, 0]))


def batch(mode: ForwardMode, lengths: list[int], **more: object) -> BatchDescriptor:
    return BatchDescriptor(mode, 2, torch.tensor(lengths), SLOTS, **more)  # type: ignore[arg-type]


def test_a_record_has_room_for_every_plane() -> None:
    assert sorted(records.PLANES) == sorted({*PLANES})
    starts = sorted([*records.WORD.values(), records.FIRST_DERIVED])
    sizes = {name: starts[starts.index(start) + 1] - start for name, start in records.WORD.items()}
    out = PrecomputedMetadata.allocate(batch(ForwardMode.DRAFT_EXTEND, [9, 9], accepted=torch.tensor([1, 1])), GEOMETRY)
    words = records.records(out.steps, (5,), ())[0].tolist()
    assert (words[0], len(words)) == (5, records.FIRST_DERIVED)
    for name, size in sizes.items():
        value = plane(out.steps[0], name)
        word = records.WORD[name]
        assert words[word : word + size] == ([0] * size if value is None else [value.data_ptr(), *value.stride()]), name


def test_keys_of_pools_that_are_completed_have_a_place() -> None:
    out = precompute(batch(ForwardMode.TARGET_VERIFY, [7, 8], draft_tokens=6), GEOMETRY)
    pools = out.steps[0].pools
    assert pools is not None
    assert pools.write_start.tolist() == [7, 8] and pools.tail_start.tolist() == [4, 8]
    assert pools.seqlens.tolist() == [2, 2, 2, 2, 3, 3, 2, 2, 2, 3, 3, 3]
    # the first request writes tokens 7 to 12 and completes the pools of 4 and 8; the second writes 8 to 13: that of 8
    assert live_entries(out, out.steps[0])["pools.write_loc"].tolist() == [[33, 34], [2, -1]]
    # topk 8: two whole pools, and the tokens after them
    assert out.steps[0].nsa_cache_seqlens.tolist() == [8, 9, 10, 11, 8, 9, 9, 10, 11, 8, 9, 10]


def test_rows_that_were_not_accepted_complete_no_pool() -> None:
    accepted = torch.tensor([1, 4], dtype=torch.int32)
    out = precompute(batch(ForwardMode.DRAFT_EXTEND, [10, 10], draft_tokens=4, accepted=accepted), GEOMETRY)
    assert live_entries(out, out.steps[0])["pools.write_loc"].tolist() == [[-1], [1]]
    assert out.steps[0].pools is not None and out.steps[0].pools.accepted is not None
    assert out.steps[0].pools.accepted.tolist() == [1, 4]


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_positions_before_a_sequence_are_rounded_down(impl: api.Impl) -> None:
    out = precompute(batch(ForwardMode.DRAFT_EXTEND, [1, 3], draft_tokens=4), GEOMETRY, impl=impl)
    pools = out.steps[0].pools
    assert pools is not None
    assert pools.write_start.tolist() == [-3, -1] and pools.tail_start.tolist() == [-4, -4]
    assert pools.seqlens.tolist() == [0] * 8


@settings(max_examples=25)
@given(interpreted(min_batch_size=1), st.sampled_from(["reference", "triton"]), st.sampled_from([1, 3]))
def test_a_consumer_may_lack_what_it_does_not_read(case: Case, impl: api.Impl, stride: int) -> None:
    """Without pools, or without their page table: precomputed, and copied to from a source that has all."""
    source = precompute(case.batch, case.geometry, impl="reference")
    pools = [made.steps[0].pools for made in poisoned(case.batch, case.geometry, 2, stride)]
    steps = [made.steps[0] for made in poisoned(case.batch, case.geometry, 2, stride)]
    lacking = [replace(steps[0], pools=None), steps[1]]
    if pools[1] is not None:
        lacking[1] = replace(steps[1], pools=replace(pools[1], page_table=None, accepted=None))
    if len(source.steps) == 1:
        fast_copy(source, lacking, impl=impl)
        for step in lacking:
            assert differing_fields(source, step) == []
        bind = lambda *given, **more: api.bind(*given, impl=impl, **more)  # noqa: E731
        for step in lacking:
            again = poisoned(case.batch, case.geometry, 1, stride)[0].steps[0]
            consumers = [step, again if step.pools is None and again.pools is None else step]
            one = replace(case.batch, num_steps=1, step_offsets=())
            ReplayPlan(one, case.geometry, consumers[:1], strategy="share", bind=bind).run(one)


@settings(max_examples=15)
@given(interpreted(modes=(ForwardMode.DECODE,), min_batch_size=1), st.sampled_from(["reference", "triton"]))
def test_every_draft_step_gets_the_pools(case: Case, impl: api.Impl) -> None:
    consumers = [made.steps[0] for made in poisoned(case.batch, case.geometry, case.batch.num_steps)]
    bind = lambda *given, **more: api.bind(*given, impl=impl, **more)  # noqa: E731
    ReplayPlan(case.batch, case.geometry, consumers, strategy="copy", bind=bind).run(case.batch)
    want = precompute(case.batch, case.geometry, impl="reference")
    for index, step in enumerate(consumers):
        assert_equal_live(want, step, index if len(want.steps) > 1 else 0)


@pytest.mark.parametrize("kpool", [3, 32, 0])
def test_a_pool_divides_page_and_topk(kpool: int) -> None:
    with pytest.raises(InvalidValueError, match=r"geometry\.index_kpool: expected"):
        precompute(batch(ForwardMode.DECODE, [1, 1]), replace(GEOMETRY, index_kpool=kpool))


def test_pools_of_another_geometry_or_of_blocks_are_refused() -> None:
    decode = batch(ForwardMode.DECODE, [1, 1])
    out = PrecomputedMetadata.allocate(decode, GEOMETRY)
    with pytest.raises(InvalidValueError, match="None with index_kpool 1"):
        precompute(decode, replace(GEOMETRY, index_kpool=1), out=out)
    blocks = replace(decode, slots=BlockTable(torch.zeros(2, 8, dtype=torch.int32), 16))
    assert PrecomputedMetadata.allocate(blocks, GEOMETRY).steps[0].pools is None
    with pytest.raises(InvalidValueError, match="None with a block table"):
        precompute(blocks, GEOMETRY, out=out)


def test_accepted_rows_belong_to_a_draft_extend_and_exist() -> None:
    accepted = torch.tensor([1, 5])
    with pytest.raises(InvalidValueError, match="None outside DRAFT_EXTEND"):
        precompute(batch(ForwardMode.TARGET_VERIFY, [1, 1], draft_tokens=4, accepted=accepted), GEOMETRY)
    extend = batch(ForwardMode.DRAFT_EXTEND, [8, 8], draft_tokens=4, accepted=accepted)
    with pytest.raises(InvalidValueError, match=r"accepted\[1\]: expected 0 to 4"):
        precompute(extend, GEOMETRY, checked=True)
    without = PrecomputedMetadata.allocate(replace(extend, accepted=None), GEOMETRY)
    plan = ReplayPlan(replace(extend, accepted=None), GEOMETRY, list(without.steps), strategy="share")
    with pytest.raises(InvalidValueError, match=r"batch\.accepted is None"):
        plan.run(extend)


@pytest.mark.parametrize("kpool", [2, 8])
@pytest.mark.parametrize("wide", [True, False])
def test_pages_of_pools_across_tiles(monkeypatch: pytest.MonkeyPatch, wide: bool, kpool: int) -> None:
    """Tiles of 16 columns: several pages of pools in a tile, or several tiles in a page of pools; in the copy as well."""
    monkeypatch.setattr(triton_binding, "TILE", 16)
    geometry = Geometry(8, 16, 640, num_sms=1, wide_page_table=wide, index_kpool=kpool)
    table = TokenTable(torch.randint(0, 1 << 20, (2, 640)), torch.tensor([1, 0]))
    decode = BatchDescriptor(ForwardMode.DECODE, 2, torch.tensor([640, 257]), table)
    want = precompute(decode, geometry, impl="reference")
    got = precompute(decode, geometry, impl="triton", out=poisoned(decode, geometry)[0])
    copied = poisoned(decode, geometry)[0].steps[0]
    fast_copy(got, [copied], impl="triton")
    assert differing_fields(want, got.steps[0]) == differing_fields(want, copied) == []
