"""Pooled index keys (`index_kpool` above 1) on the real sglang: values, what nothing reads, memory, and who is left alone."""

from __future__ import annotations

import ast
import inspect
import json
import logging
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_plugin import ForwardMode, repro
from nsa_plugin.adapters.sglang import pools, refusals
from nsa_plugin.adapters.sglang.compare import defined_values
from nsa_plugin.adapters.sglang.describe import consumer, describe, geometry
from nsa_plugin.adapters.sglang.reports import MODES
from nsa_plugin.cli import main
from nsa_plugin.core import api
from nsa_plugin.core.metadata import PrecomputedMetadata, differing_fields
from nsa_plugin.rigs.sglang import backends as kit
from nsa_plugin.rigs.sglang.engine import accepted
from tests.sglang.batches import DEVICE, record
from tests.sglang.conftest import Install

if pools.foreign_formulas(4):
    pytest.skip("this sglang has no pooled index keys, or others", allow_module_level=True)

LOGGER = "sglang.srt.plugins.nsa_plugin"
WIDTH = 1536
"""Three to twelve pages of pooled keys, and a last one that is not whole."""
CONFIG = kit.Config(width=WIDTH, index_kpool=4, max_batch_size=4, max_requests=8)
TABLE = kit.req_to_token(CONFIG, DEVICE)


def batch(mode: str, config: kit.Config, lengths: list[int], rows: list[int], dtype: torch.dtype = torch.int64) -> Any:
    tokens = len(lengths) * (1 if mode == "DECODE" else config.draft_tokens)
    made = kit.make_batch(
        mode, torch.tensor(lengths, dtype=dtype, device=DEVICE), torch.tensor(rows, device=DEVICE), tokens
    )
    made.spec_info = accepted(lengths, config, DEVICE) if mode == "DRAFT_EXTEND_V2" else None
    return made


def captured(
    mode: str, config: kit.Config = CONFIG, num_steps: int = 4, table: torch.Tensor = TABLE
) -> tuple[Any, Any]:
    """Something to hook, captured at batch size 4, and its static batch."""
    owner = kit.make_multi_step(config, table, num_steps) if mode == "DECODE" else kit.make_backend(config, table)
    static = batch(mode, config, [config.draft_tokens] * 4, [0] * 4)
    owner.init_forward_metadata_out_graph(static, in_capture=True)
    return owner, static


def backends_of(owner: Any) -> list[Any]:
    return getattr(owner, "attn_backends", [owner])


@settings(max_examples=15)
@given(
    k=st.sampled_from([2, 4, 8]), tokens=st.integers(1, 8), mode=st.sampled_from(sorted(MODES)),
    dtype=st.sampled_from([torch.int32, torch.int64]), topk=st.sampled_from([64, 256]), heads=st.sampled_from([64, 16]),
    impl=st.sampled_from(["reference", "reference", "triton"]), padding=st.integers(0, 4), data=st.data(),
)  # fmt: skip
def test_every_plane_is_sglangs(
    k: int, tokens: int, mode: str, dtype: torch.dtype, topk: int, heads: int, impl: api.Impl, padding: int, data: Any
) -> None:
    """Lengths at the edges of pools, pages, top-k and table; padding as sglang's runners pad."""
    config = kit.Config(
        width=WIDTH, index_kpool=k, draft_tokens=tokens, index_topk=topk, heads=heads, max_batch_size=4, max_requests=8
    )
    table = kit.req_to_token(config, DEVICE)
    shortest = tokens if mode == "DRAFT_EXTEND_V2" else 1
    longest = WIDTH - tokens
    page = 64 * k
    edges = [shortest, tokens + k, 63, 64, 65, page - 1, page, page + 1, topk, topk + k - 1, longest]
    length = st.one_of(st.sampled_from([min(edge, longest) for edge in edges]), st.integers(shortest, longest))
    lengths = [max(data.draw(length), shortest) for _ in range(4 - padding)] + [shortest] * padding
    rows = [data.draw(st.integers(0, 7)) for _ in range(4 - padding)] + [0] * padding
    live = batch(mode, config, lengths, rows, dtype)
    backend = kit.make_backend(config, table)
    expected = kit.engine_metadata(backend, live, mode)
    step = consumer(expected)
    described = describe(live, backend=backend, mode=MODES[mode])
    sizes = geometry(backend, expected)
    ours = api.precompute(described, sizes, impl=impl)
    want = PrecomputedMetadata((step,), described, sizes)
    assert step.pools is not None and differing_fields(ours, step) == []
    unknown = ["pools.page_table"] if mode == "DRAFT_EXTEND_V2" else []  # sglang has none there
    assert differing_fields(want, ours.steps[0]) == unknown
    has_schedule = pools.SCHEDULE in step.derived
    assert has_schedule == (heads == 64)  # on Hopper


@pytest.mark.parametrize("strategy", ["graph", "share", "copy"])
@pytest.mark.parametrize("mode", sorted(MODES))
def test_replays_are_verified_and_right(install: Install, mode: str, strategy: str) -> None:
    host, _ = install(strategy, verify=1)
    owner, _ = captured(mode)
    reference, rng = kit.make_backend(CONFIG, TABLE), random.Random(7)
    for _ in range(2):
        lengths = [rng.randint(CONFIG.draft_tokens, WIDTH - CONFIG.draft_tokens) for _ in range(4)]
        live = batch(mode, CONFIG, lengths, [rng.randrange(8) for _ in range(4)])
        owner.init_forward_metadata_out_graph(kit.replay_view(live))
        expected = kit.engine_metadata(reference, live, mode)
        for backend in backends_of(owner):
            assert kit.differences(expected, backend.forward_metadata, backend, live, MODES[mode]) == []
    assert host.verifications.total() == 2 and not host.mismatches and not host.fallbacks


@pytest.mark.parametrize("name", ["seqlens", "write_start", "tail_start", "requests", "write_loc", "page_table"])
def test_a_wrong_plane_is_found_and_repaired_and_leaves_a_repro(
    install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """In a batch in which the entry is live: the first request completes a pool."""
    from nsa_plugin.core import reference

    right = reference.precompute

    def wrong(live: Any, out: Any, enabled: Any = None) -> None:
        right(live, out, enabled)
        if int(live.seq_lens[0]) == 128:
            value = getattr(out.steps[0].pools, name)
            value[(0,) * value.dim()] += 1

    monkeypatch.setattr(reference, "precompute", wrong)
    host, _ = install("share", verify=1, repro_dir=tmp_path)
    owner, _ = captured("DECODE")
    live = batch("DECODE", CONFIG, [128, 700, 9, 400], [3, 5, 0, 1])
    owner.init_forward_metadata_out_graph(kit.replay_view(live))
    assert f"pools.{name}" in {key[3] for key in host.mismatches} and not host.on and not host.fallbacks
    expected = kit.engine_metadata(kit.make_backend(CONFIG, TABLE), live, "DECODE")
    for backend in owner.attn_backends:
        assert kit.differences(expected, backend.forward_metadata, backend, live, ForwardMode.DECODE) == []
    monkeypatch.undo()
    (file,) = tmp_path.iterdir()
    assert main(["verify", str(file)]) == 0
    found = repro.recompute(repro.load(file), "reference")
    assert found["engine"] == [] and (f"step 0: pools.{name}" in found["plugin"]) == (name != "requests")


def test_rows_that_were_accepted_are_in_the_repro(
    tmp_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nsa_plugin.core import reference

    right = reference.precompute

    def wrong(live: Any, out: Any, enabled: Any = None) -> None:
        right(live, out, enabled)
        out.steps[0].pools.accepted[0] += 1

    monkeypatch.setattr(reference, "precompute", wrong)
    host, _ = install("share", verify=1, repro_dir=tmp_path)
    owner, _ = captured("DRAFT_EXTEND_V2")
    live = batch("DRAFT_EXTEND_V2", CONFIG, [128, 700, 9, 400], [3, 5, 0, 1])
    owner.init_forward_metadata_out_graph(kit.replay_view(live))
    monkeypatch.undo()
    (file,) = tmp_path.iterdir()
    assert repro.recompute(repro.load(file), "reference") == {"engine": [], "plugin": ["step 0: pools.accepted"]}
    assert {key[3] for key in host.mismatches} == {"pools.accepted"}


def test_what_a_graph_has_recorded_obeys_the_switch(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    host, _ = install("graph")
    owner, static = captured("TARGET_VERIFY")
    record(owner, static, monkeypatch)
    live = batch("TARGET_VERIFY", CONFIG, [127, 700, 9, 400], [3, 5, 0, 1])
    host.switch(False, "test")
    owner.init_forward_metadata_out_graph(kit.replay_view(live))  # sglang's own
    metadata = owner.forward_metadata
    before = defined_values(metadata, metadata, describe(live, backend=owner, mode=ForwardMode.TARGET_VERIFY),
                            geometry(owner, metadata))  # fmt: skip
    static.seq_lens.copy_(live.seq_lens + 1)
    vars(owner)["_nsa_plugin_prepared"][static.forward_mode, 4].record()
    after = defined_values(metadata, metadata, describe(live, backend=owner, mode=ForwardMode.TARGET_VERIFY),
                           geometry(owner, metadata))  # fmt: skip
    assert "pools.write_loc" in before and all(torch.equal(before[name], after[name]) for name in before)


def test_an_error_of_ours_leaves_sglangs_values(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    host, _ = install("share")
    owner, _ = captured("DRAFT_EXTEND_V2")
    live = batch("DRAFT_EXTEND_V2", CONFIG, [128, 700, 9, 400], [3, 5, 0, 1])
    live.spec_info = SimpleNamespace()  # the plan was made for a batch that says what was accepted
    owner.init_forward_metadata_out_graph(kit.replay_view(live))
    expected = kit.engine_metadata(kit.make_backend(CONFIG, TABLE), live, "DRAFT_EXTEND_V2")
    assert kit.differences(expected, owner.forward_metadata, owner, live, ForwardMode.DRAFT_EXTEND) == []
    assert [cause[2:] for cause in host.fallbacks] == [("replay", "share", "InvalidValueError")]


def test_auto_takes_them(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    host, _ = install("auto")
    owner, _ = captured("DECODE")
    tables = [backend.decode_cuda_graph_metadata[4].pooled_real_page_table for backend in owner.attn_backends]
    assert len({table.data_ptr() for table in tables}) == 1 and not host.fallbacks
    assert any("draft backends share one pooled page table" in line for line in caplog.messages)


def test_formulas_of_another_release_are_refused_by_what_they_compute(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang 0.5.20 numbers pages of pooled keys as pages of tokens."""
    from sglang.srt.layers.attention.dsa import kpool_fp8_index

    install("share")
    backend = kit.make_backend(CONFIG, TABLE)
    assert refusals.unsupported(backend) == ""
    monkeypatch.setattr(kpool_fp8_index, "build_pooled_page_table_64", lambda pages, k: pages[..., ::k])
    pools.foreign_formulas.cache_clear()
    try:
        assert "looked for ([[7, 8, 9]]" in refusals.unsupported(backend)
        monkeypatch.delattr(kpool_fp8_index, "build_pooled_page_table_64")
        pools.foreign_formulas.cache_clear()
        assert "found AttributeError" in refusals.unsupported(backend)
    finally:
        pools.foreign_formulas.cache_clear()


def test_drafts_share_the_pooled_table_and_the_log_says_what_that_gives_back(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    install("share")
    owner, _ = captured("DECODE")
    metadata = [backend.forward_metadata for backend in owner.attn_backends]
    assert len({each.pooled_real_page_table.data_ptr() for each in metadata}) == 1
    back = 2 * 4 * WIDTH // 64 // 4 * 4 / 2**20
    assert (
        f"nsa-plugin: draft decode: 3 draft backends share one pooled page table for 4 requests; {back:.1f} MiB given back"
        in caplog.messages
    )


def test_exact_step_lengths_are_refused_by_name(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    install("share", step_lengths="exact")
    captured("DECODE")
    assert [line for line in caplog.messages if "strategy" in line] == [
        "nsa-plugin: draft decode: strategy with sglang's own step lengths: "
        "pools of index keys are completed at the lengths of the batch itself (index_kpool above 1)",
        "nsa-plugin: draft decode: strategy share",
    ]


UNREAD = ("paged_mqa_schedule_metadata", "paged_mqa_ctx_lens_2d", "topk_v2_plan", "seqlens_per_q")
WRITERS = {
    "dsa_backend": {"_apply_cuda_graph_metadata", "get_indexer_metadata", "_refresh_paged_mqa_schedule_metadata", "_refresh_topk_v2_plan",
                    "init_forward_metadata_replay_cuda_graph_from_precomputed"},
    "dsa.dsa_metadata_manager": {"_copy_replay_metadata_from_sibling", "_copy_kpool_metadata_from_sibling",
                                 "_sibling_replay_metadata_compatible"},
    "dsa.kpool_plan": {"update_kpool_write_plan"},
    "dsa.dsa_indexer_kpool": set(),
    "dsa.kpool_fp8_index": set(),
}  # fmt: skip
"""Functions of sglang that name such a plane, of the modules that a model with pooled index keys runs.

They refresh it or compare its shape; `get_indexer_metadata` hands it to the indexer, which does not look at it."""


@pytest.mark.parametrize("module", WRITERS)
def test_nothing_reads_what_is_not_computed(module: str) -> None:
    import importlib

    source = importlib.import_module(f"sglang.srt.layers.attention.{module}")
    readers = {
        function.name
        for function in ast.walk(ast.parse(inspect.getsource(source)))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and node.attr in UNREAD and isinstance(node.ctx, ast.Load)
    }
    assert readers <= WRITERS[module], readers - WRITERS[module]


def test_the_topk_that_reads_the_plan_of_single_keys_runs_in_prefill_only() -> None:
    from sglang.srt.layers.attention.dsa import dsa_indexer_kpool

    source = inspect.getsource(dsa_indexer_kpool)
    calls = [line.strip() for line in source.splitlines() if ".topk_transform(" in line]
    assert calls == ["topk_full = metadata.topk_transform(dummy_logits, self.index_topk)"]
    assert source.count("._full_topk_for_short_sequence(") == source.count("._forward_cuda_skip_logits(") == 1
    prefill = "skip_logits_computation = False\n        if forward_batch.forward_mode.is_extend_without_speculative():"
    assert prefill in source


@pytest.mark.parametrize(("mode", "k"), [("decode", "2"), ("verify", "16"), ("extend", "2")])
def test_the_benchmark_times_them(mode: str, k: str, tmp_path: Path) -> None:
    """On a CPU its copy and share are right; a graph takes a GPU."""
    file = tmp_path / "b.json"
    sizes = ["--bs", "1", "--ctx", "150", "--steps", "2", "--width", "256", "--decode-impl", "fa3", "--mode", mode]
    assert main(["bench", "--engine", "sglang", "--index-kpool", k, *sizes, "--json", str(file)]) == 0
    (cell,) = json.loads(file.read_text())["cells"]
    assert cell["index_kpool"] == int(k) and {"sglang unfused", "copy", "share"} <= cell["contenders"].keys()
    assert all(row["differs"] == [] for row in cell["contenders"].values())


def test_a_backend_of_the_rig_fuses_unless_told_otherwise() -> None:
    for fused in (True, False):
        config = kit.Config(index_kpool=4, fused=fused)
        made = kit.make_backend(config, kit.req_to_token(config, torch.device("cpu")))
        assert made.experimental_kpool_metadata_fusion is fused
