"""What each generation of sglang's names has to bring beyond the kit; runs on every release that has a hook registry.

The other tests of this folder speak the newest names. These speak to the backends as that release's runners do.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import logging
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_plugin import hookimpl
from nsa_plugin.adapters.probe import installed_version
from nsa_plugin.adapters.sglang import refusals, releases
from nsa_plugin.adapters.sglang.reports import MODES
from nsa_plugin.cli import main
from nsa_plugin.core import api
from nsa_plugin.core.errors import UnavailableError
from nsa_plugin.core.metadata import same_buffer
from nsa_plugin.rigs.sglang import backends as kit
from nsa_plugin.rigs.sglang import original_loop
from tests.sglang.batches import CONFIG, TABLE, batch, replays
from tests.sglang.conftest import Install

LOGGER = "sglang.srt.plugins.nsa_plugin"
SERVED = ["DECODE", "TARGET_VERIFY"]


def made(mode: str, lengths: torch.dtype = torch.int64) -> tuple[Any, list[Any]]:
    """A backend or four speculative steps, captured with batches of four; and the backends."""
    owner = kit.make_multi_step(CONFIG, TABLE, 4) if mode == "DECODE" else kit.make_backend(CONFIG, TABLE)
    kit.before_capture(owner, batch(mode, [1] * 4, [0] * 4, lengths))
    return owner, owner.attn_backends if mode == "DECODE" else [owner]


def replay(owner: Any, live: Any) -> None:
    kit.preparation(owner, live)()


def wrong(mode: str, live: Any, backends: list[Any]) -> list[str]:
    """Values that are not those of a backend's own path."""
    expected = kit.engine_metadata(kit.make_backend(CONFIG, TABLE), live, mode)
    return [
        field
        for backend in backends
        for field in kit.differences(expected, backend.forward_metadata, backend, live, MODES[mode])
    ]


class Broken:
    """A precompute that fails, or is wrong, from its third call on (two are made at capture)."""

    def __init__(self, fails: bool) -> None:
        self._fails = fails
        self.calls = 0

    @hookimpl
    def nsa_plugin_bind_precompute(self, batch: Any, geometry: Any, out: Any, enabled: Any) -> Any:
        right = api.bind_precompute(batch, out, enabled=enabled)

        def run(live: Any) -> None:
            right(live)
            self.calls += 1
            if self.calls > 1:
                out.steps[0].nsa_cu_seqlens_k[-1] += 1 if enabled is None else enabled[0]
                if self._fails:
                    raise RuntimeError("planted")

        return run


@pytest.mark.parametrize("mode", SERVED)
@pytest.mark.parametrize("strategy", ["share", "copy"])
def test_an_error_at_a_replay_hands_over_to_the_own_path(install: Install, strategy: str, mode: str) -> None:
    broken = Broken(fails=True)
    host, _ = install(strategy, broken)
    owner, backends = made(mode)
    for live in replays(mode, 1000):
        replay(owner, live)
        assert wrong(mode, live, backends) == []
    assert broken.calls == 2 and len(host.fallbacks) == 1


@pytest.mark.parametrize("mode", SERVED)
def test_verification_repairs_and_switches_off(install: Install, mode: str) -> None:
    host, _ = install("share", Broken(fails=False), verify=1)
    owner, backends = made(mode)
    for live in replays(mode, 1000):
        replay(owner, live)
        assert wrong(mode, live, backends) == []
    assert [key[3] for key in host.mismatches] == ["nsa_cu_seqlens_k"] and not host.on


@pytest.mark.parametrize("mode", SERVED)
def test_switching_off_and_on(install: Install, mode: str) -> None:
    host, _ = install("share")
    owner, backends = made(mode)
    for turn, live in enumerate(replays(mode, 1000)):
        host.switch(bool(turn % 2), "test")
        replay(owner, live)
        assert wrong(mode, live, backends) == []
    assert not host.fallbacks


@pytest.mark.parametrize("captured", [torch.int64, torch.int32])
def test_exact_step_lengths_need_lengths_of_each_step(
    install: Install, caplog: pytest.LogCaptureFixture, captured: torch.dtype
) -> None:
    """Where backends read the runner's own int32 lengths, to add to them would change the batch."""
    caplog.set_level(logging.INFO, LOGGER)
    host, _ = install("share", step_lengths="exact", verify=1)
    static = batch("DECODE", [1] * 4, [0] * 4, captured)
    owner = kit.make_multi_step(CONFIG, TABLE, 4)
    kit.before_capture(owner, static)
    first = owner.attn_backends[0].forward_metadata.cache_seqlens_int32
    shared = same_buffer(first, static.seq_lens)
    assert shared <= (captured is torch.int32)
    for live in replays("DECODE", 1000):
        replay(owner, live)
        for index, backend in enumerate(owner.attn_backends):
            longer = (live.seq_lens + (0 if shared else index + 1)).tolist()
            assert wrong("DECODE", batch("DECODE", longer, live.req_pool_indices.tolist()), [backend]) == []
    assert not host.mismatches and not host.fallbacks
    assert ("all steps read the lengths of the batch itself" in caplog.text) == shared


def test_the_strategy_says_what_it_can_be(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    host, adapter = install("graph")
    made("DECODE")
    (line,) = [line for line in caplog.messages if "draft decode: strategy" in line]
    plans = {plan.path: plan for plan in adapter.paths(host)}
    if why := refusals.not_graph():
        assert "strategy share, not graph: looked for " in line and "init_forward_metadata_in_graph" in line
        assert plans["draft decode"].strategy == plans["target verify"].strategy == "share"
        assert plans["draft decode"].why == plans["target verify"].why == why
    else:
        assert "strategy graph" in line and plans["draft decode"].strategy == "graph"


@pytest.mark.parametrize("mode", ["decode", "verify", "extend"])
def test_the_benchmark_compares_every_strategy(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or it says what the release lacks."""

    def offline(folder: Path) -> Path:
        raise UnavailableError("no network in this test")

    monkeypatch.setattr(original_loop, "fetch_wheel", offline)
    cell = [
        "bench",
        "--engine",
        "sglang",
        "--mode",
        mode,
        "--bs",
        "2",
        "--ctx",
        "300",
        "--steps",
        "3",
        "--width",
        "512",
    ]
    status = main([*cell, "--json", str(tmp_path / "b.json")])
    if mode == "extend" and (problem := releases.lacking("draft extend")):
        assert status == 2 and f"--mode extend: {problem}" in capsys.readouterr().err
        return
    assert status == 0
    (measured,) = json.loads((tmp_path / "b.json").read_text())["cells"]
    wrong = {name: row["differs"] for name, row in measured["contenders"].items()}
    shipped: dict[str, list[str]] = {"sglang shipped": []} if mode == "decode" else {}
    assert wrong == {"sglang loop": [], **shipped, "copy": [], "share": []}


def test_the_arguments_of_the_older_methods_are_batches() -> None:
    lengths = torch.tensor([5, 6])
    captured = releases.nsa_batch_to_capture(2, 8, "pool", lengths, None, "mode", "spec")
    live = releases.nsa_batch_to_replay(
        2, "pool", lengths, 11, None, "mode", "spec", seq_lens_cpu="cpu", out_cache_loc=None
    )
    for made in (captured, live):
        assert made.seq_lens is lengths
        assert (made.batch_size, made.req_pool_indices, made.forward_mode, made.spec_info) == (
            2,
            "pool",
            "mode",
            "spec",
        )
    assert torch.equal(captured.seq_lens_cpu, lengths) and live.seq_lens_cpu == "cpu" and live.seq_lens_sum == 11
    draft = SimpleNamespace()
    assert releases.nsa_draft_batch(draft) is releases.nsa_draft_batch(draft, bs=2) is draft


def test_top_k_plans_count_as_written_where_sglang_cant_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "sglang.kernels.ops.attention.dsv4.topk"
    monkeypatch.setitem(sys.modules, name, module := types.ModuleType(name))
    on_a_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    assert releases.topk_plan_is_written(on_a_gpu)
    vars(module)["topk_v2_plan_is_written"] = lambda lengths: lengths is not on_a_gpu
    assert not releases.topk_plan_is_written(on_a_gpu) and releases.topk_plan_is_written(torch.ones(2))


@pytest.fixture
def uncached() -> Iterator[None]:
    releases.generation.cache_clear()
    yield
    releases.generation.cache_clear()


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        (["dsa", "nsa"], releases.DSA),
        (["nsa"], releases.NSA),
        (["dsa"], releases.DSA),
        ([], releases.DSA),
    ],
)
def test_the_generation_goes_by_the_module_that_is_there(
    monkeypatch: pytest.MonkeyPatch, uncached: None, there: list[str], expected: releases.Generation
) -> None:
    modules = {generation.module: generation.prefix in there for generation in releases.GENERATIONS}

    def find_spec(name: str) -> Any:
        return importlib.machinery.ModuleSpec(name, None) if modules[name] else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    assert releases.generation() is expected


AUTOLOAD = """
import logging, pkgutil, sys
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
from sglang.srt.plugins import load_plugins
load_plugins()
load_plugins()
from nsa_plugin.adapters.sglang.releases import generation
found = generation()
for owner, entries in ((found.multi_step, found.draft_entries), (found.backend, found.single_entries)):
    for entry in entries:
        method = getattr(pkgutil.resolve_name(owner), entry.method)
        print("hooked:", hasattr(method, "__wrapped__"), hasattr(getattr(method, "__wrapped__", None), "__wrapped__"))
"""


@pytest.mark.skipif(
    not any(point.name == "nsa_plugin" for point in entry_points(group="sglang.srt.plugins")),
    reason="nsa-plugin is not installed in this environment",
)
@pytest.mark.parametrize("chosen", [None, "another"])
def test_sglang_loads_it_and_its_own_switch_keeps_working(chosen: str | None) -> None:
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("NSA_PLUGIN_", "SGLANG_PLUGINS"))
    }
    settings = {} if chosen is None else {"SGLANG_PLUGINS": chosen}
    command = [sys.executable, "-W", "ignore", "-c", AUTOLOAD]
    done = subprocess.run(command, env={**clean, **settings}, capture_output=True, text=True, check=True, cwd="/")
    seen = [line for line in done.stdout.splitlines() if line.startswith("hooked:")]
    assert seen == [f"hooked: {chosen is None} False"] * 4
    said = f"strategy auto; sglang {installed_version('sglang')}: metadata of the multi-step draft, target verify"
    lines = [line for line in done.stdout.splitlines() if line.startswith("INFO nsa-plugin") and said in line]
    assert len(lines) == (chosen is None)
