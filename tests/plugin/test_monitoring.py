"""Metrics: nothing when off, counted when on, served from what several processes wrote."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_plugin import BatchDescriptor, ForwardMode, Geometry, TokenTable, __version__, background, monitoring
from nsa_plugin.adapters.build import source
from nsa_plugin.adapters.reporting import Fallback, Mismatch
from nsa_plugin.host import Host
from nsa_plugin.settings import Settings

WITH = pytest.mark.skipif(
    importlib.util.find_spec("prometheus_client") is None, reason="prometheus_client is not installed"
)
BATCH = BatchDescriptor(
    ForwardMode.DECODE, 1, torch.tensor([3]), TokenTable(torch.arange(64).view(1, 64), torch.tensor([0]))
)


def nothing(batch: Any) -> None:
    pass


def test_off_a_replay_is_called_as_it_is() -> None:
    assert Host().instrument(nothing, "toy", "draft decode", "share", 3) is nothing


def test_without_the_package_it_says_what_to_install_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    host = Host(Settings(metrics=frozenset({"prometheus"})))
    assert "pip install 'nsa-plugin[metrics]'" in caplog.text
    assert host.instrument(nothing, "toy", "draft decode", "share", 3) is nothing


@WITH
def test_a_prometheus_that_fails_costs_the_metrics_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(monitoring, "prometheus", lambda: 1 / 0)
    host = Host(Settings(metrics=frozenset({"prometheus"})))
    logger = logging.getLogger("toy")
    host.fell_back(logger, Fallback("toy", "draft decode", "replay", "copy", ValueError("a")))
    assert host.instrument(nothing, "toy", "draft decode", "share", 3) is nothing
    host.buffers("toy", "draft decode", "share", 1)
    assert caplog.text.count("NSA_PLUGIN_METRICS=prometheus failed: it is left out from now on") == 1


def test_a_torch_without_nvtx_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delattr(torch._C, "_nvtx", raising=False)
    host = Host(Settings(metrics=frozenset({"nvtx"})))
    assert "NSA_PLUGIN_METRICS=nvtx: this build of torch has no NVTX; install one for CUDA" in caplog.text
    assert host.instrument(nothing, "toy", "draft decode", "share", 3) is nothing


def test_nvtx_ranges_surround_a_replay_that_raises_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.cuda import nvtx

    happened: list[str] = []
    monkeypatch.setattr(monitoring, "missing", lambda settings: {})
    monkeypatch.setattr(nvtx, "range_push", happened.append)
    monkeypatch.setattr(nvtx, "range_pop", lambda: happened.append("pop"))
    host = Host(Settings(metrics=frozenset({"nvtx"})))

    def fail(batch: Any) -> None:
        happened.append("replay")
        raise RuntimeError("replay")

    with pytest.raises(RuntimeError, match="replay"):
        host.instrument(fail, "toy", "draft decode", "share", 3)(None)
    assert happened == ["nsa-plugin draft decode share", "replay", "pop"]


WORKER = """
import logging, sys
from nsa_plugin.adapters.reporting import Fallback
from nsa_plugin.host import Host
from nsa_plugin.settings import Settings
assert "prometheus_client" not in sys.modules
host = Host(Settings.from_environment())
assert "prometheus_client" not in sys.modules, "imported before the engine could set PROMETHEUS_MULTIPROC_DIR"
replay = host.instrument(lambda batch: None, "toy", "draft decode", "share", 3)
for _ in range(5):
    replay(None)
host.buffers("toy", "draft decode", "share", 1000)
host.fell_back(logging.getLogger("toy"), Fallback("toy", "draft decode", "replay", "share", ValueError("planted")))
"""


@WITH
def test_a_scrape_sums_what_every_process_wrote(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """As sglang and vLLM serve it: a `MultiProcessCollector` over PROMETHEUS_MULTIPROC_DIR, in another process."""
    environment = {
        **os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "NSA_PLUGIN_METRICS": "prometheus",
        "PYTHONPATH": os.pathsep.join([str(pytestconfig.rootpath), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    for _ in range(2):
        subprocess.run([sys.executable, "-c", WORKER], env=environment, check=True, capture_output=True)
    scrape = (
        "import prometheus_client as c\nfrom prometheus_client import multiprocess\n"
        "r = c.CollectorRegistry(); multiprocess.MultiProcessCollector(r); print(c.generate_latest(r).decode())"
    )
    done = subprocess.run(
        [sys.executable, "-c", scrape], env=environment, check=True, capture_output=True, text=True
    ).stdout
    which = 'framework="toy",path="draft decode",strategy="share"'
    assert f"nsa_plugin_preparation_seconds_count{{{which}}} 10.0" in done
    assert f"nsa_plugin_steps_total{{{which}}} 30.0" in done
    assert "nsa_plugin_fallbacks_total{" in done and 'cause="ValueError"' in done and 'stage="replay"' in done
    assert 'le="1e-06"' in done
    (info,) = re.findall(r"^nsa_plugin_info\{(.*)\} 1\.0$", done, re.MULTILINE)
    assert f'version="{__version__}"' in info and 'framework="toy"' in info and 'strategy="auto"' in info
    assert f'build="{source()}"' in info and 'engine_version="unknown"' in info


@WITH
def test_fall_backs_and_mismatches_are_counted_and_their_causes_have_a_time() -> None:
    host = Host(Settings(metrics=frozenset({"prometheus"})))
    logger, started = logging.getLogger("toy"), time.time()
    for error in (ValueError("a"), ValueError("b"), TypeError("c")):
        host.fell_back(logger, Fallback("toy", "target verify", "replay", "copy", error))
    values = ((0, {"cu_seqlens_k": torch.zeros(2)}, {"cu_seqlens_k": torch.ones(2)}),)
    host.mismatched(logger, Mismatch("toy", "target verify", "copy", BATCH, Geometry(8, 16, 64), values))
    metrics = monitoring.prometheus()
    which = ("toy", "target verify", "copy")
    assert metrics.fallbacks.labels(*which, "replay")._value.get() == 3
    for cause in ("ValueError", "TypeError"):
        assert started <= metrics.last_fallback.labels(*which, "replay", cause)._value.get() <= time.time()
    assert metrics.mismatches.labels(*which)._value.get() == 1
    assert started <= metrics.last_mismatch.labels(*which, "cu_seqlens_k")._value.get() <= time.time()


def test_a_background_task_runs_and_one_that_fails_is_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []

    def failing() -> None:
        calls.append("failing")
        raise RuntimeError("background")

    def working() -> None:
        calls.append("working")

    for task in (failing, working):
        background.every_second(task)
    try:
        background.run_once()
        background.run_once()
    finally:
        background.cancel(working)
    assert calls.count("failing") == 1 and calls.count("working") >= 2
    assert "a background task of nsa-plugin failed" in caplog.text


FORK = """
import os, time
from nsa_plugin import background
background.PERIOD = 0.01
read, write = os.pipe()
background.every_second(lambda: os.write(write, b"%d " % os.getpid()))
if os.fork() == 0:
    time.sleep(1)
    os._exit(0)
os.wait()
assert len(set(os.read(read, 1 << 16).split())) == 2, "the child's thread did not run"
"""


def test_the_thread_lives_on_in_a_forked_child() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=60)


def test_the_switch_file_is_looked_at_off_the_replay_path(tmp_path: Path) -> None:
    file = tmp_path / "off"
    host = Host(Settings(switch_file=file))
    host.watch_switch_file()
    try:
        assert host.on
        file.touch()
        deadline = time.monotonic() + 30
        while host.on and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not host.on and host.strategies == ()
        file.unlink()
        while not host.on and time.monotonic() < deadline:
            time.sleep(0.05)
        assert host.on
    finally:
        background.cancel(host.look_at_switch_file)


def test_a_switch_file_that_is_there_at_the_start_counts(tmp_path: Path) -> None:
    (tmp_path / "off").touch()
    host = Host(Settings(switch_file=tmp_path / "off"))
    host.watch_switch_file()
    background.cancel(host.look_at_switch_file)
    assert not host.on


def test_a_difference_keeps_it_off_while_the_switch_file_stays_away(tmp_path: Path) -> None:
    host = Host(Settings(switch_file=tmp_path / "off"))
    host.look_at_switch_file()
    host.switch(False, "a difference")
    host.look_at_switch_file()
    assert not host.on


@WITH
def test_the_overhead_benchmark_measures_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import overhead

    monkeypatch.setattr(overhead, "CALLS", 50)
    drafts = {"vllm_v1_added_ns_per_draft_of_3", "vllm_v1_added_ns_per_draft_of_7", "vllm_v2_added_ns_per_draft"}
    for metrics in (frozenset[str](), frozenset({"prometheus"})):
        measured = overhead.measure(metrics)
        assert measured.keys() == {"added_ns", "flush_ns_in_background"} | drafts
        assert metrics or not any(measured[name] for name in drafts), "something is in between with everything off"
    seconds = monitoring.prometheus().seconds.labels("sglang", "draft decode", "graph")
    assert sum(bucket.get() for bucket in seconds._buckets) == 50 * overhead.REPEATS
