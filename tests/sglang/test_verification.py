"""Verification at work and the switch, on the real sglang backends."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_plugin import hookimpl, repro
from nsa_plugin.adapters.sglang import preparation, reports
from nsa_plugin.adapters.sglang.own_path import native_replay
from nsa_plugin.cli import main
from nsa_plugin.core import reference
from nsa_plugin.rigs.sglang import backends as kit
from tests.sglang.batches import (
    CONFIG,
    TABLE,
    addresses,
    capture_batch,
    record,
    replays,
    wrong,
)
from tests.sglang.conftest import Install

LOGGER = "sglang.srt.plugins.nsa_plugin"
MODES = ("DECODE", "TARGET_VERIFY", "DRAFT_EXTEND_V2")


class Sometimes:
    """A precompute that gives one wrong value from call `right` on."""

    def __init__(self, right: int, field: str) -> None:
        self.left, self.field = right, field

    @hookimpl
    def nsa_plugin_bind_precompute(self, batch: Any, geometry: Any, out: Any, enabled: Any) -> Any:
        def bound(live: Any) -> None:
            reference.precompute(live, out, enabled)
            self.left -= 1
            if self.left < 0:
                value = getattr(out.steps[-1], self.field)
                value[(0,) * value.dim()] += 1 if enabled is None else enabled[0]

        return bound


def made(mode: str, config: kit.Config = CONFIG, num_steps: int = 4) -> tuple[Any, list[Any]]:
    """Something to hook, captured at batch size 4, and its backends."""
    owner: Any = kit.make_multi_step(config, TABLE, num_steps) if mode == "DECODE" else kit.make_backend(config, TABLE)
    owner.init_forward_metadata_out_graph(capture_batch(mode, 4), in_capture=True)
    return owner, owner.attn_backends if mode == "DECODE" else [owner]


@pytest.mark.parametrize("decode_impl", ["fa3", "flashmla_kv"])
@pytest.mark.parametrize("strategy", ["graph", "share", "copy"])
@pytest.mark.parametrize("mode", MODES)
def test_right_values_pass_and_captured_buffers_are_not_touched(
    install: Install, mode: str, strategy: str, decode_impl: str
) -> None:
    config = kit.Config(decode_impl=decode_impl)
    host, _ = install(strategy, verify=1)
    owner, backends = made(mode, config)
    buffers = [addresses(backend) for backend in backends]
    for live in replays(mode, CONFIG.width - CONFIG.draft_tokens):
        owner.init_forward_metadata_out_graph(kit.replay_view(live))
        assert wrong(mode, kit.make_backend(config, TABLE), live, backends) == []
        assert [addresses(backend) for backend in backends] == buffers
    assert not host.mismatches and not host.fallbacks and host.on
    assert host.verifications.total() == len(list(replays(mode, CONFIG.width - CONFIG.draft_tokens)))


@pytest.mark.parametrize("strategy", ["share", "copy"])
@pytest.mark.parametrize(
    ("mode", "field", "theirs"),
    [
        ("DECODE", "cache_seqlens", {"cache_seqlens", "seqlens_expanded", "paged_mqa_ctx_lens_2d"}),
        ("DECODE", "real_page_table", {"real_page_table"}),
        ("TARGET_VERIFY", "nsa_cu_seqlens_k", {"nsa_cu_seqlens_k"}),
        ("DRAFT_EXTEND_V2", "page_table_1", {"page_table_1"}),
    ],
)
def test_a_difference_gives_sglangs_values_switches_off_and_leaves_a_repro(
    install: Install, caplog: pytest.LogCaptureFixture, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    mode: str, field: str, theirs: set[str], strategy: str,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO)
    host, _ = install(strategy, Sometimes(3, field), verify=2, repro_dir=tmp_path)
    owner, backends = made(mode)
    fresh = kit.make_backend(CONFIG, TABLE)
    batches = replays(mode, CONFIG.width - CONFIG.draft_tokens)
    for number, live in enumerate(batches):
        owner.init_forward_metadata_out_graph(kit.replay_view(live))
        if number >= 2:  # 0 is right and looked at, 1 right, 2 wrong and looked at, what follows is sglang's own
            assert wrong(mode, fresh, live, backends) == []
        assert host.on == (number < 2)
    found = {key[3] for key in host.mismatches}
    assert theirs & found and found <= theirs | {"paged_mqa_schedule_metadata", "topk_v2_plan", "num_splits"}
    assert set(host.mismatches.values()) == {1}
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    (file,) = tmp_path.iterdir()
    assert f"nsa-plugin verify {file}" in line and "computed other values than sglang's own path" in line
    recorded = repro.load(file)
    assert recorded.facts["settings"]["NSA_PLUGIN_VERIFY"] == "2"
    assert recorded.facts["versions"]["sglang"] and recorded.batch.mode is reports.MODES[mode]
    assert torch.equal(recorded.batch.seq_lens, batches[2].seq_lens)
    assert main(["verify", str(file)]) == 0  # the implementations here are right: it was the planted one
    assert "Here every implementation gives the engine's values." in capsys.readouterr().out
    assert f"step 0: {field}" in repro.recompute(recorded, "reference")["plugin"]


def test_a_verification_that_fails_is_a_fall_back_not_an_error(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, _ = install("share", verify=1)
    owner, backends = made("DECODE")
    monkeypatch.setattr(preparation.Preparation, "_differences", lambda self, batch, live: 1 / 0)
    live = replays("DECODE", CONFIG.width)[0]
    owner.init_forward_metadata_out_graph(kit.replay_view(live))
    assert wrong("DECODE", kit.make_backend(CONFIG, TABLE), live, backends) == []
    assert list(host.fallbacks) == [("sglang", "draft decode", "replay", "share", "ZeroDivisionError")]


def test_the_number_of_repro_files_is_bounded(
    install: Install, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(repro.LIMIT_FILES):
        (tmp_path / f"{repro.FILE_PREFIX}-{number}.npz").touch()
    install("share", Sometimes(1, "cu_seqlens_k"), verify=1, repro_dir=tmp_path)
    owner, _ = made("DECODE")
    owner.init_forward_metadata_out_graph(kit.replay_view(replays("DECODE", CONFIG.width)[0]))
    assert len(list(tmp_path.iterdir())) == repro.LIMIT_FILES
    assert "holds 10 repro files already; move them away" in caplog.text


def test_exact_step_lengths_are_verified_against_the_same(install: Install) -> None:
    host, _ = install("share", step_lengths="exact", verify=1)
    multi, _ = made("DECODE")
    for live in replays("DECODE", CONFIG.width - 4):
        multi.init_forward_metadata_out_graph(kit.replay_view(live))
    assert host.on and not host.mismatches and not host.fallbacks


def test_a_wrong_last_step_is_found_with_exact_step_lengths(install: Install, tmp_path: Path) -> None:
    host, _ = install("share", Sometimes(1, "cu_seqlens_k"), step_lengths="exact", verify=1, repro_dir=tmp_path)
    multi, backends = made("DECODE")
    live = replays("DECODE", CONFIG.width - 4)[0]
    multi.init_forward_metadata_out_graph(kit.replay_view(live))
    assert [key[3] for key in host.mismatches] == ["cu_seqlens_k"]
    assert wrong("DECODE", kit.make_backend(CONFIG, TABLE), live, backends) == []
    (file,) = tmp_path.iterdir()
    assert repro.recompute(repro.load(file), "reference") == {"engine": [], "plugin": ["step 2: cu_seqlens_k"]}


@pytest.mark.parametrize("settings", [{"verify": 1}, {"step_lengths": "exact"}, {"step_lengths": "exact", "verify": 1}])
def test_undo_leaves_sglang_as_it_was_found(install: Install, settings: dict[str, Any]) -> None:
    host, adapter = install("auto", **settings)
    owner, backends = made("DECODE")
    own = [backend.decode_cuda_graph_metadata[4] for backend in backends]
    owner.init_forward_metadata_out_graph(kit.replay_view(replays("DECODE", CONFIG.width - 4)[0]))
    adapter.undo()
    held = [backend.decode_cuda_graph_metadata[4] for backend in backends]
    assert len({id(metadata) for metadata in held}) == 3 and not any(
        metadata is used for metadata in held for used in own
    )
    assert all(metadata.page_table_1 is not None for metadata in held)
    plain = kit.make_multi_step(CONFIG, TABLE, 4).attn_backends[0]
    assert all(vars(backend).keys() - {"forward_metadata"} == vars(plain).keys() for backend in backends)
    live = replays("DECODE", CONFIG.width)[1]
    native_replay(backends, live, live.forward_mode)
    assert wrong("DECODE", kit.make_backend(CONFIG, TABLE), live, backends) == []
    assert host.switch(False, "nothing is installed any more") == []


@pytest.mark.parametrize("strategy", ["share", "copy"])
@pytest.mark.parametrize("mode", MODES)
def test_the_switch_takes_effect_at_the_next_replay(
    install: Install, monkeypatch: pytest.MonkeyPatch, mode: str, strategy: str
) -> None:
    """Off, sglang's own code writes the captured buffers; on again, ours does."""
    called: list[str] = []

    def spy(*arguments: Any) -> None:
        called.append("sglang")
        native_replay(*arguments)

    monkeypatch.setattr(preparation, "native_replay", spy)
    host, _ = install(strategy)
    owner, backends = made(mode)
    fresh, buffers = kit.make_backend(CONFIG, TABLE), [addresses(backend) for backend in backends]
    batches = replays(mode, CONFIG.width - CONFIG.draft_tokens)
    for live, on in zip(batches, (True, False, False, True, False), strict=True):
        if host.on != on:
            assert host.switch(on, "test") == []
        called.clear()
        owner.init_forward_metadata_out_graph(kit.replay_view(live))
        assert called == ([] if on else ["sglang"])
        assert wrong(mode, fresh, live, backends) == []
        assert [addresses(backend) for backend in backends] == buffers


def test_what_was_captured_while_off_takes_a_new_capture_and_the_switch_says_so(install: Install) -> None:
    host, _ = install("graph")
    multi = kit.make_multi_step(CONFIG, TABLE, 4)
    multi.init_forward_metadata_out_graph(capture_batch("DECODE", 4), in_capture=True)
    assert host.switch(False, "test") == []
    multi.init_forward_metadata_out_graph(capture_batch("DECODE", 2), in_capture=True)
    assert len({id(backend.decode_cuda_graph_metadata[2]) for backend in multi.attn_backends}) == 3
    assert host.switch(True, "test") == [
        "sglang: draft decode: was captured while switched off; it takes a new capture"
    ]
    multi.init_forward_metadata_out_graph(capture_batch("DECODE", 2), in_capture=True)
    assert host.switch(False, "test") == host.switch(True, "test") == []


def test_a_failed_path_stays_with_sglang_when_the_switch_goes_on(install: Install) -> None:
    host, _ = install("share", Sometimes(99, "cu_seqlens_k"))
    owner, backends = made("DECODE")
    (captured,) = next(iter(host.manager.adapters()["sglang"]._backends[0]._prepared.values())).values()  # type: ignore[attr-defined]
    captured.fail()
    assert not captured.look_at_switch() and captured.native
    live = replays("DECODE", CONFIG.width)[0]
    owner.init_forward_metadata_out_graph(kit.replay_view(live))
    assert wrong("DECODE", kit.make_backend(CONFIG, TABLE), live, backends) == []


@pytest.mark.parametrize(
    ("mode", "step_lengths", "field", "theirs"),
    [
        ("DECODE", "engine", "real_page_table", "real_page_table"),
        ("DECODE", "exact", "cu_seqlens_k", "cu_seqlens_k"),
        ("TARGET_VERIFY", "engine", "nsa_cu_seqlens_k", "nsa_cu_seqlens_k"),
        ("DRAFT_EXTEND_V2", "engine", "page_table_1", "page_table_1"),
    ],
)
@pytest.mark.parametrize("right", [True, False])
def test_what_a_graph_has_written_is_compared_after_its_replay(
    install: Install, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path,
    mode: str, step_lengths: str, field: str, theirs: str, right: bool,
) -> None:  # fmt: skip
    """The strategy stays; a difference is seen when the next batch begins, which has sglang's own values."""
    caplog.set_level(logging.INFO)
    planted = Sometimes(99, field)
    host, _ = install("graph", planted, verify=1, verify_mode="graph", repro_dir=tmp_path, step_lengths=step_lengths)
    owner, backends = made(mode)
    static = capture_batch(mode, 4)
    owner.init_forward_metadata_out_graph(static, in_capture=True)
    record(owner, static, monkeypatch)
    planted.left = 99 if right else 1
    batches = replays(mode, CONFIG.width - CONFIG.draft_tokens)
    for number, live in enumerate(batches[:4]):
        for name in ("seq_lens", "req_pool_indices"):
            getattr(static, name).copy_(getattr(live, name))
        owner.init_forward_metadata_out_graph(kit.replay_view(live))
        assert host.on == (right or number < 2), number
        owner.init_forward_metadata_in_graph(static)
        if step_lengths == "engine" and (right or number != 1):
            assert wrong(mode, kit.make_backend(CONFIG, TABLE), live, backends) == []
    assert not host.fallbacks and {key[2] for key in host.verifications} == {"graph"}
    assert host.verifications.total() == (4 if right else 2)
    assert any("strategy graph" in line for line in caplog.messages)
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert bool(errors) == (not right)
    if not right:
        assert theirs in {key[3] for key in host.mismatches}
        assert "from the next batch on: this one was computed with the others" in errors[0]
        (file,) = tmp_path.iterdir()
        recorded = repro.load(file)
        assert torch.equal(recorded.batch.seq_lens, batches[1].seq_lens)
        assert repro.recompute(recorded, "reference")["engine"] == []


def test_a_late_comparison_that_fails_is_a_fall_back(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    host, _ = install("graph", verify=1, verify_mode="graph")
    owner, _ = made("DECODE")
    static = capture_batch("DECODE", 4)
    owner.init_forward_metadata_out_graph(static, in_capture=True)
    record(owner, static, monkeypatch)
    monkeypatch.setattr(preparation, "differing_values", lambda *_: 1 / 0)
    for live in replays("DECODE", CONFIG.width)[:3]:
        owner.init_forward_metadata_out_graph(kit.replay_view(live))
    assert list(host.fallbacks.items()) == [(("sglang", "draft decode", "replay", "graph", "ZeroDivisionError"), 1)]
    assert host.on and host.verifications.total() == 1
