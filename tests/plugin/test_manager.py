"""The pluggy host: hooks, order, third parties, the allow-list, and the example plugin, installed for real."""

from __future__ import annotations

import inspect
import json
import logging
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pluggy
import pytest
import torch

from nsa_plugin import (
    BatchDescriptor,
    ForwardMode,
    Geometry,
    PrecomputedMetadata,
    TokenTable,
    UnavailableError,
    hookimpl,
    hookspec,
    manager,
)
from nsa_plugin.adapters.reporting import Fallback, Mismatch
from nsa_plugin.core import api
from nsa_plugin.host import Host
from nsa_plugin.manager import HOOKS, Manager
from nsa_plugin.settings import Settings

BATCH = BatchDescriptor(
    ForwardMode.DECODE, 1, torch.tensor([3]), TokenTable(torch.arange(64).view(1, 64), torch.tensor([0]))
)
GEOMETRY = Geometry(8, 16, 64)


def test_every_hook_says_what_it_asks_and_when_it_fires() -> None:
    assert HOOKS == (
        "nsa_plugin_adapters", "nsa_plugin_bind_copy", "nsa_plugin_bind_draft_steps", "nsa_plugin_bind_precompute",
        "nsa_plugin_bind_step_update", "nsa_plugin_describe",
        "nsa_plugin_fell_back", "nsa_plugin_mismatched", "nsa_plugin_observe_replays",
    )  # fmt: skip
    for name in HOOKS:
        hook = getattr(hookspec, name)
        assert "Fires" in (hook.__doc__ or ""), name
        assert inspect.signature(hook).return_annotation is not inspect.Signature.empty


class Silent:
    """Declines everything."""

    @hookimpl
    def nsa_plugin_bind_precompute(self) -> None:
        return None


class Loud:
    """Provides everything and writes down what happened."""

    def __init__(self) -> None:
        self.happened: list[str] = []

    @hookimpl
    def nsa_plugin_bind_precompute(self, out: PrecomputedMetadata) -> Any:
        return lambda batch: self.happened.append(f"precompute {batch.batch_size}")

    @hookimpl
    def nsa_plugin_bind_copy(self, destinations: Any) -> Any:
        return lambda: self.happened.append(f"copy to {len(destinations)}")

    @hookimpl
    def nsa_plugin_describe(self, engine: str) -> Any:
        return lambda native: BATCH

    @hookimpl
    def nsa_plugin_observe_replays(self, engine: str, path: str, strategy: str) -> Any:
        return lambda batch: self.happened.append(f"saw {engine} {path} {strategy}")

    @hookimpl
    def nsa_plugin_fell_back(self, fallback: Fallback) -> None:
        self.happened.append(f"fell back: {fallback.error}")


def buffers(count: int) -> list[Any]:
    return [PrecomputedMetadata.allocate(BATCH, GEOMETRY).steps[0] for _ in range(count)]


def test_providers_are_resolved_at_plan_time_and_the_first_that_answers_wins() -> None:
    host, loud = Host(), Loud()
    host.manager.register(loud, name="loud")
    host.manager.register(Silent(), name="silent")
    assert host.manager.providers()["nsa_plugin_bind_precompute"] == ["silent", "loud"]
    assert host.manager.providers()["nsa_plugin_adapters"] == ["built-in"]
    two_steps = BatchDescriptor(BATCH.mode, 1, BATCH.seq_lens, BATCH.slots, num_steps=2)
    run = host.plan(two_steps, GEOMETRY, buffers(2), "copy", None)
    host.manager.unregister(loud)  # a plan keeps what it was made with
    run(two_steps)
    assert loud.happened == ["precompute 1", "copy to 1"]


def test_built_in_implementations_come_last() -> None:
    host = Host()
    host.manager.register(Silent())
    (consumer,) = buffers(1)
    host.plan(BATCH, GEOMETRY, [consumer], "share", None)(BATCH)
    assert consumer.cache_seqlens.tolist() == [3]
    assert host.describe("toy", object(), lambda native: BATCH)(None) is BATCH


ON, OFF = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)


class Switched:
    """Provides a precompute that takes the switch, with a default too: pluggy passes only what has none."""

    @hookimpl
    def nsa_plugin_bind_precompute(self, batch: Any, out: Any, enabled: Any) -> Any:
        return api.bind_precompute(batch, out, impl="reference", enabled=enabled)


class Defaulted:
    @hookimpl
    def nsa_plugin_bind_precompute(self, batch: Any, out: Any, enabled: Any = None) -> Any:
        return api.bind_precompute(batch, out, impl="reference", enabled=enabled)


class Wrapping:
    """Looks at what others provide."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    @hookimpl(wrapper=True)
    def nsa_plugin_bind_precompute(self) -> Any:
        self.seen.append((yield))
        return self.seen[-1]


@pytest.mark.parametrize(
    "plugins", [[], [Switched()], [Silent()], [Loud(), Switched()]], ids=["none", "one", "silent", "first"]
)
@pytest.mark.parametrize(("enabled", "length"), [(None, 3), (ON, 3), (OFF, 0)], ids=["without", "on", "off"])
def test_the_switch_reaches_the_precompute(plugins: list[Any], enabled: torch.Tensor | None, length: int) -> None:
    host, wrapping = Host(), Wrapping()
    for plugin in (*plugins, wrapping):
        host.manager.register(plugin)
    (consumer,) = buffers(1)
    host.plan(BATCH, GEOMETRY, [consumer], "share", None, enabled)(BATCH)
    assert consumer.cache_seqlens.tolist() == [length]
    assert len([found for found in wrapping.seen if found]) == sum(isinstance(plugin, Switched) for plugin in plugins)


@pytest.mark.parametrize("deaf", [Loud(), Defaulted()], ids=["without", "with a default"])
def test_a_precompute_that_does_not_take_the_switch_cant_be_switched(deaf: Any) -> None:
    host, (consumer,) = Host(), buffers(1)
    host.manager.register(Switched(), name="switched")
    host.manager.register(deaf, name="deaf")  # asked first
    with pytest.raises(
        UnavailableError, match=r"plugin 'deaf': its nsa_plugin_bind_precompute does not take 'enabled'.*add"
    ):
        host.plan(BATCH, GEOMETRY, [consumer], "share", None, ON)
    host.plan(BATCH, GEOMETRY, [consumer], "share", None)
    host.manager.unregister(deaf)
    host.plan(BATCH, GEOMETRY, [consumer], "share", None, ON)(BATCH)
    assert consumer.cache_seqlens.tolist() == [3]


def test_a_failing_observer_is_dropped_and_does_not_disturb_the_replay(caplog: pytest.LogCaptureFixture) -> None:
    class Failing:
        calls = 0

        @hookimpl
        def nsa_plugin_observe_replays(self) -> Any:
            def observe(batch: BatchDescriptor) -> None:
                self.calls += 1
                raise RuntimeError("observer")

            return observe

        @hookimpl
        def nsa_plugin_fell_back(self) -> None:
            raise RuntimeError("observer of fall-backs")

    host, failing, loud = Host(), Failing(), Loud()
    assert host.observer("toy", "draft decode", "share", BATCH) is None
    host.manager.register(failing)
    host.manager.register(loud)
    observe = host.observer("toy", "draft decode", "share", BATCH)
    assert observe is not None
    observe(BATCH)
    observe(BATCH)
    assert failing.calls == 1 and loud.happened == ["saw toy draft decode share"] * 2
    host.fell_back(logging.getLogger("toy"), Fallback("toy", "draft decode", "replay", "share", ValueError("x")))
    assert "an observer of replays failed" in caplog.text and "an observer of fall-backs failed" in caplog.text


def test_a_fall_back_is_logged_once_per_cause_and_counted_each_time(caplog: pytest.LogCaptureFixture) -> None:
    host, loud = Host(), Loud()
    host.manager.register(loud)
    for error in (ValueError("first"), ValueError("again"), RuntimeError("other")):
        host.fell_back(logging.getLogger("toy"), Fallback("toy", "draft decode", "replay", "share", error))
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert "draft decode: strategy share failed at replay (ValueError: first); toy's own values are used" in caplog.text
    assert host.fallbacks["toy", "draft decode", "replay", "share", "ValueError"] == 2
    assert loud.happened == ["fell back: first", "fell back: again", "fell back: other"]


def test_observers_learn_of_a_mismatch_and_may_fail(caplog: pytest.LogCaptureFixture) -> None:
    class Observer:
        def __init__(self) -> None:
            self.seen: list[list[str]] = []

        @hookimpl
        def nsa_plugin_mismatched(self, mismatch: Mismatch) -> None:
            self.seen.append(mismatch.fields)
            raise RuntimeError("observer of mismatches")

    host, observer = Host(), Observer()
    host.manager.register(observer)
    sides = (
        {"cu_seqlens_k": torch.zeros(2), "same": torch.ones(1)},
        {"cu_seqlens_k": torch.ones(2), "same": torch.ones(1)},
    )
    for _ in range(2):
        mismatch = Mismatch("toy", "draft decode", "share", BATCH, GEOMETRY, ((0, *sides),))
        host.mismatched(logging.getLogger("toy"), mismatch)
    assert observer.seen == [["cu_seqlens_k"]] * 2 and not host.on
    assert host.mismatches == {("toy", "draft decode", "share", "cu_seqlens_k"): 2}
    assert caplog.text.count("computed other values than toy's own path (cu_seqlens_k)") == 1
    assert "NSA_PLUGIN_REPRO_DIR names no directory" in caplog.text
    assert "an observer of mismatches failed" in caplog.text


def test_an_adapter_that_cant_be_switched_is_named() -> None:
    class Old:
        name = "toy"

    class Offer:
        @hookimpl
        def nsa_plugin_adapters(self) -> Any:
            return [Old()]

    host = Host()
    host.manager.register(Offer())
    (line,) = host.switch(False, "test")
    assert line.startswith("toy: its adapter can't be switched (AttributeError")


def test_a_plugin_with_an_unknown_hook_is_refused() -> None:
    class Wrong:
        @hookimpl
        def nsa_plugin_precompute_all(self) -> None: ...

    host = Host()
    with pytest.raises(pluggy.PluginValidationError, match="unknown hook 'nsa_plugin_precompute_all'"):
        host.manager.register(Wrong(), name="wrong")
    assert all("wrong" not in names for names in host.manager.providers().values())


def test_third_parties_load_by_entry_point_under_an_allow_list(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nsa_plugin")
    points = [
        EntryPoint("good", "tests.plugin.test_manager:GOOD", "nsa_plugin"),
        EntryPoint("other", "tests.plugin.test_manager:GOOD", "nsa_plugin"),
        EntryPoint("broken", "tests.plugin.no_such_module", "nsa_plugin"),
    ]
    monkeypatch.setattr(manager, "entry_points", lambda group: points if group == "nsa_plugin" else [])
    assert Manager(frozenset({"good", "absent", "broken"})).load_third_parties() == ["good"]
    assert "'other' is not in NSA_PLUGIN_PLUGINS: not loaded" in caplog.text
    assert "'absent' is allowed by NSA_PLUGIN_PLUGINS but not installed" in caplog.text
    assert "'broken' failed to load: left out" in caplog.text


GOOD = Silent()

USE_IT = """
import json, torch
from nsa_plugin import *
from nsa_plugin.host import Host
host = Host()
loaded = host.manager.load_third_parties()
import counting_precompute
batch = BatchDescriptor(ForwardMode.DECODE, 2, torch.tensor([3, 9]), TokenTable(torch.arange(128).view(2, 64), torch.tensor([0, 1])))
geometry = Geometry(8, 16, 64)
consumer = PrecomputedMetadata.allocate(batch, geometry).steps[0]
run = host.plan(batch, geometry, [consumer], "share", None)
run(batch); run(batch)
enabled = torch.zeros(1, dtype=torch.int32)
run = host.plan(batch, geometry, [consumer], "share", None, enabled)
consumer.cu_seqlens_k.fill_(-7); run(batch)
left_alone = consumer.cu_seqlens_k.tolist()
enabled.fill_(1); run(batch)
print(json.dumps([loaded, host.manager.providers()["nsa_plugin_bind_precompute"], counting_precompute.calls, left_alone, consumer.cu_seqlens_k.tolist()]))
"""


def test_the_example_plugin_installed_for_real_replaces_the_precompute(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    source = pytestconfig.rootpath / "examples" / "third_party"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), str(source)]
    subprocess.run(pip, check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(pytestconfig.rootpath)])}
    done = subprocess.run([sys.executable, "-c", USE_IT], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [["counting"], ["counting"], 4, [-7, -7, -7], [0, 3, 12]]
    blocked = subprocess.run(
        [sys.executable, "-m", "nsa_plugin", "plugins"], env={**environment, "NSA_PLUGIN_PLUGINS": "another"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "counting" not in blocked.stdout.replace("'counting' is not in", "")


def test_settings_reach_the_host() -> None:
    assert Host(Settings(strategy="copy")).strategies == ("copy",)
    assert Host(Settings(strategy="off")).strategies == ()
    assert Host().strategies == ("graph", "share", "copy")
