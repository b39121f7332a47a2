"""Two-batch overlap over FlashAttention with sliding windows: children whose parts of two captured batches have the same size."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_plugin.adapters.sglang import hooked, releases
from nsa_plugin.adapters.sglang.dense import ROWS
from nsa_plugin.rigs.sglang.dense import Dense, stand_ins
from nsa_plugin.rigs.sglang.flash_attention import Sizes
from tests.sglang.conftest import Install

ROW = ROWS[1]
CAPTURED = (4, 3)
"""A child has two requests of each: requests 2 and 3 of four, then 1 and 2 of three."""


@pytest.fixture(autouse=True)
def _running() -> Iterator[None]:
    with stand_ins():
        if problem := releases.lacking(ROW.part):
            pytest.skip(problem)
        yield


def parts(whole: Any, split: int, width: int) -> list[Any]:
    """A batch's two parts, as sglang cuts it."""
    made = []
    for requests in (slice(0, split), slice(split, whole.batch_size)):
        tokens = slice(requests.start * width, requests.stop * width)
        fields = dict(
            vars(whole),
            batch_size=requests.stop - requests.start,
            kv_loc_cols=whole.kv_loc_plan.cols_slice(None, tokens),
        )
        for name, cut in (
            ("req_pool_indices", requests), ("seq_lens", requests), ("out_cache_loc", tokens), ("positions", tokens),
        ):  # fmt: skip
            fields[name] = None if fields[name] is None else fields[name][cut]
        made.append(SimpleNamespace(**fields))
    return made


def test_padded_verification(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """sglang passes the slots of the requests that exist; those of the padding are in the part that was captured."""
    host, _ = install("share")  # a graph has recorded its own part
    sizes = Sizes(16, sliding_window=True)
    runner, child = Dense("fa3", ROW.mode, sizes), Dense("fa3", ROW.mode, sizes).owner
    monkeypatch.setattr(hooked, "capturing", lambda: True)
    seen = {}
    for size in CAPTURED:
        static = parts(runner.static(size), size // 2, sizes.draft_tokens)[1]
        child.init_forward_metadata_out_graph(static, in_capture=True)
        child.init_forward_metadata_in_graph(static)
        seen[size] = static, child.forward_metadata
    for size, lengths, requests in ((4, [17, 64, 65], [3, 1, 2]), (3, [300, 5], [4, 6]), (4, [9], [5])):
        live = parts(runner.live(size, lengths, requests), size // 2, sizes.draft_tokens)[1]
        child.init_forward_metadata_out_graph(live)
        static, metadata = seen[size]
        mapping = child.token_to_kv_pool.full_to_swa_index_mapping
        assert torch.equal(metadata.swa_out_cache_loc, mapping[static.out_cache_loc]), (size, lengths)
    assert not host.fallbacks
    live.seq_lens = live.seq_lens.clone()  # of no batch that was captured
    child.init_forward_metadata_out_graph(live)
    assert torch.equal(metadata.swa_out_cache_loc, mapping[static.out_cache_loc])
    (cause,) = host.fallbacks
    assert cause[1:] == (ROW.path, "replay", "share", "InvalidValueError")
