"""The reference against a naive loop, for every mode."""

from __future__ import annotations

import torch
from hypothesis import given, settings

from nsa_plugin import BatchDescriptor, ForwardMode, Geometry, TokenTable, precompute
from nsa_plugin.core.metadata import plane
from nsa_plugin.core.pools import POOL_PLANES, POOL_TABLE
from tests.batches import Case, cases, naive, poisoned


@settings(max_examples=200)
@given(cases())
def test_every_live_entry_is_that_of_the_naive_loop(case: Case) -> None:
    check_against_the_naive_loop(case)


@settings(max_examples=5)
@given(cases(max_batch_size=512, max_width=150))
def test_large_batches_too(case: Case) -> None:
    check_against_the_naive_loop(case)


def check_against_the_naive_loop(case: Case) -> None:
    batch, geometry = case.batch, case.geometry
    out = precompute(batch, geometry, impl="reference", out=poisoned(batch, geometry)[0])
    for index, offset in enumerate(batch.offsets):
        step, want = out.step(index), naive(batch, geometry, offset)
        rows = len(want["seqlens_expanded"])
        assert step.cache_seqlens[: batch.batch_size].tolist() == want["cache_seqlens"]
        assert step.cu_seqlens_k[: batch.batch_size + 1].tolist() == want["cu_seqlens_k"]
        assert step.seqlens_expanded[:rows].tolist() == want["seqlens_expanded"]
        assert step.nsa_cache_seqlens[:rows].tolist() == want["nsa_cache_seqlens"]
        assert step.nsa_cu_seqlens_k[: rows + 1].tolist() == want["nsa_cu_seqlens_k"]
        for row, live in enumerate(want["real_page_table"]):
            assert isinstance(live, list)
            assert step.real_page_table[row, : len(live)].tolist() == live
        if step.page_table_1 is not None:
            for row, live in enumerate(want["page_table_1"]):
                assert isinstance(live, list)
                assert step.page_table_1[row, : len(live)].tolist() == live
        if step.pools is not None:
            for name in (*POOL_PLANES, POOL_TABLE):
                values = plane(step, name)
                assert (values is None) == (name == "pools.accepted" and batch.accepted is None)
                if values is None:
                    continue
                for row, live in enumerate(want[name]):
                    got = values[row].tolist()
                    assert (got[: len(live)] if isinstance(live, list) else got) == live, name


def test_padded_rows_of_the_static_draft_extend_clamp_at_zero() -> None:
    table = TokenTable(torch.arange(64, dtype=torch.int32).view(2, 32), torch.tensor([1, 0]))
    batch = BatchDescriptor(ForwardMode.DRAFT_EXTEND, 2, torch.tensor([9, 1]), table, draft_tokens=4)
    out = precompute(batch, Geometry(8, 16, 32))
    assert out.steps[0].seqlens_expanded.tolist() == [6, 7, 8, 9, 0, 0, 0, 1]
    assert out.steps[0].nsa_cache_seqlens.tolist() == [6, 7, 8, 8, 0, 0, 0, 1]
    assert out.steps[0].nsa_cu_seqlens_k.tolist() == [0, 6, 13, 21, 29, 29, 29, 29, 30]


def test_decode_expanded_lengths_are_the_cache_lengths_buffer() -> None:
    table = TokenTable(torch.zeros(1, 32, dtype=torch.int32), torch.tensor([0]))
    out = precompute(BatchDescriptor(ForwardMode.DECODE, 1, torch.tensor([3]), table), Geometry(8, 16, 32))
    assert out.steps[0].seqlens_expanded is out.steps[0].cache_seqlens
