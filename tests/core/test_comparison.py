"""Comparing metadata: what differs is found, dead entries are not looked at, and it takes no memory to speak of."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_plugin import precompute
from nsa_plugin.core import metadata
from nsa_plugin.core.metadata import TABLES, VECTORS, differing_fields, equal_in_pieces, live_entries
from tests.batches import Case, cases, poisoned
from tests.core.test_validation import BATCH, GEOMETRY


@settings(max_examples=50)
@given(cases(max_batch_size=4, max_width=300), st.sampled_from([200, 1000, 1 << 22]), st.data())
def test_exactly_the_fields_with_another_live_entry_differ(case: Case, piece: int, data: st.DataObject) -> None:
    saved, metadata._PIECE = metadata._PIECE, piece
    try:
        want = precompute(case.batch, case.geometry, impl="reference")
        got = precompute(case.batch, case.geometry, impl="reference", out=poisoned(case.batch, case.geometry)[0])
        index = data.draw(st.integers(0, len(want.steps) - 1))
        step = want.step(index)
        assert differing_fields(want, got.step(index), index) == []
        names = [
            name for name in (*VECTORS, *TABLES) if getattr(step, name) is not None and getattr(step, name).numel()
        ]
        name = data.draw(st.sampled_from(names))
        values = getattr(got.step(index), name).clone()
        where = tuple(data.draw(st.integers(0, size - 1)) for size in values.shape)
        values[where] -= 1
        changed = replace(got.step(index), **{name: values})
        live = live_entries(want, step, index), live_entries(want, changed, index)
        assert differing_fields(want, changed, index) == [n for n in live[0] if not torch.equal(live[0][n], live[1][n])]
    finally:
        metadata._PIECE = saved


def test_a_table_on_one_side_only() -> None:
    batch = replace(BATCH, seq_lens=BATCH.seq_lens.clone())
    want = precompute(batch, GEOMETRY)
    lacking = replace(want.steps[0], page_table_1=None)
    assert differing_fields(want, lacking) == []
    assert differing_fields(replace(want, steps=(lacking,)), want.steps[0]) == ["page_table_1"]


@pytest.mark.parametrize("piece", [1, 3, 1 << 22])
def test_pieces_are_equal_where_the_tensors_are(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "_PIECE", piece)
    for shape in ((), (0,), (7,), (5, 3), (0, 3), (4, 0)):
        left = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).view(shape)
        assert equal_in_pieces(left, left.clone())
        assert not equal_in_pieces(left, left.long()[..., None])
        for entry in range(left.numel()):
            right = left.clone()
            right.view(-1)[entry] -= 1
            assert not equal_in_pieces(left, right)


MEASURE = """
import resource, torch
from nsa_plugin import BatchDescriptor, ForwardMode, Geometry, PrecomputedMetadata, TokenTable
from nsa_plugin.core.metadata import differing_fields
width, bs = 1 << 18, {requests}
lengths = torch.full((bs,), width - 4)
batch = BatchDescriptor(
    ForwardMode.TARGET_VERIFY, bs, lengths, TokenTable(torch.zeros(1, width, dtype=torch.int32), lengths * 0), draft_tokens=4
)
geometry = Geometry(2048, 64, width)
want, got = (PrecomputedMetadata.allocate(batch, geometry) for _ in range(2))
for made in (want, got):
    made.page_table_1.fill_(1)
    made.cache_seqlens.fill_(width)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = peak()
assert differing_fields(want, got.steps[0]) == []
print(peak() - before, want.page_table_1.nbytes >> 20)
"""


def test_it_takes_no_memory_in_proportion_to_the_table() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(requests=64)], capture_output=True, text=True, check=True
    )
    extra, table = map(int, done.stdout.split())
    assert table == 256 and extra <= metadata.COMPARISON_BYTES >> 20, done.stdout
