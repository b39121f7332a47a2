"""What of the metadata is sglang's own affair: who shares buffers, what a recorded graph does, what the shipped code leaves stale."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa_plugin import ForwardMode
from nsa_plugin.adapters.sglang import reports
from nsa_plugin.rigs.sglang import backends as kit
from tests.sglang.batches import CONFIG, TABLE, batch, capture_batch, record
from tests.sglang.conftest import Install


@pytest.mark.parametrize("num_steps", [2, 4, 9])
def test_draft_backends_hold_one_page_table_and_give_the_others_back(
    install: Install, num_steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "sglang.srt.plugins.nsa_plugin")
    install("auto")
    multi = kit.make_multi_step(CONFIG, TABLE, num_steps)
    tables = {backend.decode_cuda_graph_metadata["page_table"].data_ptr() for backend in multi.attn_backends}
    assert len(tables) == 1
    size = CONFIG.max_batch_size * CONFIG.width * 4 / 2**20
    said = [line for line in caplog.messages if "given back" in line]
    assert said == (
        [
            f"nsa-plugin: draft decode: {num_steps - 1} draft backends share one page table; "
            f"{size * (num_steps - 2):.1f} MiB given back"
        ]
        if num_steps > 2
        else []
    )


def test_shipped_code_leaves_three_backends_stale_and_ours_none(install: Install) -> None:
    """Upstream's fused copy to three backends skips their DeepGEMM schedule and top-k plan (steps above 3)."""
    stale: dict[str, list[list[str]]] = {}
    for which in ("shipped", "ours"):
        reference = kit.make_backend(CONFIG, TABLE)
        if which == "ours":
            install("auto")
        multi = kit.make_multi_step(CONFIG, TABLE, 6)
        multi.init_forward_metadata_out_graph(capture_batch("DECODE", 4), in_capture=True)
        live = batch("DECODE", [600, 20, 1000, 300], [2, 5, 7, 0])
        multi.init_forward_metadata_out_graph(kit.replay_view(live))
        expected = kit.engine_metadata(reference, live, "DECODE")
        stale[which] = [
            kit.differences(expected, backend.forward_metadata, backend, live, ForwardMode.DECODE)
            for backend in multi.attn_backends
        ]
    assert stale["shipped"] == [["paged_mqa_schedule_metadata", "topk_v2_plan"]] * 3 + [[]] * 2
    assert stale["ours"] == [[]] * 5


LIVE = (([63, 64, 65, 600], [3, 1, 0, 6]), ([5, 7, 1, 1], [9, 1, 0, 0]))


@pytest.mark.parametrize(("mode", "num_steps"), [("DECODE", 4), ("TARGET_VERIFY", 1), ("DRAFT_EXTEND_V2", 1)])
def test_graph_leaves_a_replay_nothing_but_the_recorded_work(
    install: Install, monkeypatch: pytest.MonkeyPatch, mode: str, num_steps: int
) -> None:
    """Before the graph runs nothing is written; that what it recorded computes everything, the conformance kit checks."""
    install("graph")
    owner: Any = kit.make_multi_step(CONFIG, TABLE, num_steps) if mode == "DECODE" else kit.make_backend(CONFIG, TABLE)
    static = capture_batch(mode, 4)
    owner.init_forward_metadata_out_graph(static, in_capture=True)
    owner.init_forward_metadata_in_graph(static)  # warm-up
    record(owner, static, monkeypatch)
    backend = owner.attn_backends[0] if mode == "DECODE" else owner
    for lengths, requests in LIVE:
        before = kit.defined_values(backend.forward_metadata, backend, static, reports.MODES[mode])
        owner.init_forward_metadata_out_graph(kit.replay_view(batch(mode, lengths, requests)))
        after = kit.defined_values(backend.forward_metadata, backend, static, reports.MODES[mode])
        assert all(torch.equal(values, after[name]) for name, values in before.items())


def test_graph_without_a_recording_prepares_before_the_replay(install: Install) -> None:
    """A runner that never calls the in-graph method gets its metadata like with `share`."""
    reference = kit.make_backend(CONFIG, TABLE)
    install("graph")
    multi = kit.make_multi_step(CONFIG, TABLE, 4)
    multi.init_forward_metadata_out_graph(capture_batch("DECODE", 4), in_capture=True)
    for lengths, requests in LIVE:
        live = batch("DECODE", lengths, requests)
        multi.init_forward_metadata_out_graph(kit.replay_view(live))
        expected = kit.engine_metadata(reference, live, "DECODE")
        for backend in multi.attn_backends:
            assert kit.differences(expected, backend.forward_metadata, backend, live, ForwardMode.DECODE) == []


@pytest.mark.parametrize("strategy", ["share", "copy"])
@pytest.mark.parametrize("num_steps", [2, 4])
def test_who_shares_what_and_the_wide_table_of_a_copy(install: Install, num_steps: int, strategy: str) -> None:
    """Nothing reads the wide page table of a draft; a copy keeps it, and right, all the same."""
    reference = kit.make_backend(CONFIG, TABLE)
    install(strategy)
    multi = kit.make_multi_step(CONFIG, TABLE, num_steps)
    multi.init_forward_metadata_out_graph(capture_batch("DECODE", 4), in_capture=True)
    held = [backend.forward_metadata for backend in multi.attn_backends]
    shared = 1 if strategy == "share" else num_steps - 1
    assert len({metadata.real_page_table.data_ptr() for metadata in held}) == shared
    assert all((metadata.page_table_1 is None) == (strategy == "share") for metadata in held)
    live = batch("DECODE", *LIVE[0])
    multi.init_forward_metadata_out_graph(kit.replay_view(live))
    expected = kit.engine_metadata(reference, live, "DECODE")
    for backend in multi.attn_backends:
        assert backend.forward_metadata is backend.decode_cuda_graph_metadata[4]
        assert kit.differences(expected, backend.forward_metadata, backend, live, ForwardMode.DECODE) == []
