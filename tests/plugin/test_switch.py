"""Off means off, whenever it is said: the reasons for it, threads that say it at once, forks, a file that can't be seen."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_plugin import UnavailableError, background, disable, enable, entry
from nsa_plugin.adapters.reporting import Mismatch
from nsa_plugin.hookspec import hookimpl
from nsa_plugin.host import Host
from nsa_plugin.settings import Settings
from nsa_plugin.switch import Switch

ACTIONS = ("file appears", "file goes", "look", "disable", "enable", "mismatch")
CALL, MISMATCH = "nsa_plugin.disable()", "a verification found a difference"


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads take turns after a few instructions."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


class Heard(Switch):
    """Writes down what it is asked after each change."""

    def __init__(self, file: Path | None = None) -> None:
        super().__init__(file)
        self.heard: list[bool] = []
        self.inside = 0

    def left_as_is(self, on: bool) -> list[str]:
        self.inside += 1
        assert self.inside == 1, "two changes are told at once"
        self.heard.append(on)
        self.inside -= 1
        return ["recorded work"]


def said(caplog: pytest.LogCaptureFixture, start: str = "nsa-plugin: switched") -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith(start)]


@settings(max_examples=200, deadline=None)
@given(actions=st.lists(st.sampled_from(ACTIONS), max_size=24))
def test_off_for_as_long_as_there_is_a_reason(tmp_path_factory: pytest.TempPathFactory, actions: list[str]) -> None:
    """A file that goes takes back its own reason only, `enable` takes back all, and each change is said once."""
    file = tmp_path_factory.mktemp("switch") / "off"
    switch, reasons, seen, changes = Heard(file), set[str](), False, list[bool]()
    for action in actions:
        if action == "file appears":
            file.touch()
        elif action == "file goes":
            file.unlink(missing_ok=True)
        elif action == "look":
            switch.look_at_switch_file()
            if file.exists() != seen:
                seen = not seen
                reasons = reasons | {"file"} if seen else reasons - {"file"}
        elif action == "enable":
            assert switch.switch(True, "nsa_plugin.enable()") == ["recorded work"]
            reasons = set()
        else:
            why = CALL if action == "disable" else MISMATCH
            assert switch.switch(False, why) == ["recorded work"]
            reasons |= {why}
        assert switch.on == (not reasons)
        assert {reason if reason in (CALL, MISMATCH) else "file" for reason in switch.reasons} == reasons
        assert len(switch.reasons) == len(reasons)
        if switch.on != (changes[-1] if changes else True):
            changes.append(switch.on)
    assert [on for index, on in enumerate(switch.heard) if on != ([True, *switch.heard])[index]] == changes


def test_each_change_is_said_once_and_what_keeps_it_off_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "off"
    switch = Heard(file)
    file.touch()
    for _ in range(3):
        switch.look_at_switch_file()
        switch.switch(False, CALL)
    assert said(caplog) == [f"nsa-plugin: switched off: the engine's own path is used ({file} is there)"]
    file.unlink()
    switch.look_at_switch_file()
    assert not switch.on and said(caplog, f"nsa-plugin: {file}") == [f"nsa-plugin: {file} is gone; still off ({CALL})"]
    switch.switch(True, "nsa_plugin.enable()")
    switch.switch(True, "nsa_plugin.enable()")
    assert said(caplog)[1:] == ["nsa-plugin: switched on (nsa_plugin.enable())"]
    assert said(caplog, "nsa-plugin: recorded work") == ["nsa-plugin: recorded work"] * 3


def test_the_file_does_not_undo_a_mismatch(tmp_path: Path) -> None:
    host = Host(Settings(switch_file=tmp_path / "off"))
    (tmp_path / "off").touch()
    host.look_at_switch_file()
    host.mismatched(logging.getLogger("toy"), Mismatch("toy", "draft decode", "share", None, None, ()))  # type: ignore[arg-type]
    (tmp_path / "off").unlink()
    host.look_at_switch_file()
    assert not host.on and host.reasons == (MISMATCH,)
    assert host.strategies == () and host.configured == ("graph", "share", "copy")
    host.switch(True, "test")
    assert host.on and host.strategies == host.configured


def test_a_file_that_cant_be_looked_at_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server of files that is away for a while neither switches on nor ends the watching."""
    file = tmp_path / "off"
    file.touch()
    switch = Heard(file)
    switch.watch_switch_file()
    try:
        with monkeypatch.context() as away:

            def stale(path: object) -> Any:
                raise OSError(116, "Stale file handle")

            away.setattr("nsa_plugin.switch.os.stat", stale)
            background.run_once()
            background.run_once()
        assert not switch.on and caplog.text.count("can't be looked at (OSError") == 1
        file.unlink()
        background.run_once()
        assert switch.on
    finally:
        background.cancel(switch.look_at_switch_file)


def test_a_switching_storm(tmp_path: Path, caplog: pytest.LogCaptureFixture, hurried: None) -> None:
    """Threads that say on and off all the time, by call and by file: nobody sees half a change, the log tells them in order."""
    file, stop, wrong = tmp_path / "off", threading.Event(), list[str]()
    switch = Heard(file)

    def until_stopped(action: Callable[[], object]) -> threading.Thread:
        def loop() -> None:
            while not stop.is_set():
                try:
                    action()
                except Exception as error:
                    wrong.append(repr(error))
                    return

        thread = threading.Thread(target=loop)
        thread.start()
        return thread

    def forward() -> None:
        on, reasons = switch.on, switch.reasons
        if on not in (True, False) or len(set(reasons)) != len(reasons):
            wrong.append(f"{on} {reasons}")

    def toggle_file() -> None:
        file.touch()
        switch.look_at_switch_file()
        file.unlink()
        switch.look_at_switch_file()

    threads = [
        until_stopped(forward),
        until_stopped(toggle_file),
        until_stopped(switch.look_at_switch_file),
        *(until_stopped(lambda n=n: switch.switch(False, f"thread {n}")) for n in range(2)),  # type: ignore[misc]
        *(until_stopped(lambda: switch.switch(True, "on again")) for _ in range(2)),
    ]
    try:
        time.sleep(1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    switch.switch(True, "the end")
    assert switch.on and switch.reasons == () and switch.heard[-1]
    states = ["switched on" in line for line in said(caplog)]
    assert states == [bool(index % 2) for index in range(len(states))] and len(states) > 2


class Slow(Switch):
    """Other threads come in between a look at the reasons and the change."""

    def _change(self, reasons: tuple[str, ...], why: str) -> None:
        time.sleep(0.01)
        super()._change(reasons, why)


def test_no_reason_is_lost_between_threads() -> None:
    switch = Slow(None)
    threads = [threading.Thread(target=switch.switch, args=(False, f"thread {n}")) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(switch.reasons) == [f"thread {n}" for n in range(8)]


FORK = """
import os, sys, threading, time
sys.setswitchinterval(1e-6)
from pathlib import Path
from nsa_plugin import background
from nsa_plugin.host import Host
from nsa_plugin.settings import Settings
background.PERIOD = 0.01
file, stormy = Path(sys.argv[1]), sys.argv[2] == "storm"
host = Host(Settings(switch_file=file))
host.watch_switch_file()
if not stormy:
    host.switch(False, "before the fork")

def storm():
    while True:
        host.switch(False, "storm")
        host.switch(True, "storm")

for _ in range(3 if stormy else 0):
    threading.Thread(target=storm, daemon=True).start()

def child():
    assert host.on == (not host.reasons), "half a change was inherited"
    if not stormy:
        assert not host.on and host.reasons == ("before the fork",)
    host.switch(True, "in the child")
    assert host.on
    if not stormy:
        file.touch()
        deadline = time.monotonic() + 30
        while host.on and time.monotonic() < deadline:
            time.sleep(0.01)
        assert host.reasons == (f"{file} is there",), "a file that appeared after the fork was not seen"
        file.unlink()

for _ in range(40 if stormy else 1):
    if (process := os.fork()) == 0:
        try:
            child()
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0
"""


@pytest.mark.parametrize("how", ["calm", "storm"])
def test_a_forked_child_inherits_the_state_and_sees_the_file(tmp_path: Path, how: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORK, str(tmp_path / "off"), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


class Toy:
    """An adapter that writes down whether the host was on when it was installed."""

    name = "toy"
    features: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.installed: list[bool] = []

    def install(self, host: Any) -> list[str]:
        self.host = host
        self.installed.append(host.on)
        return []

    def summary(self) -> str:
        return "a toy"

    def switch(self, on: bool) -> list[str]:
        return []


class Offer:
    def __init__(self, adapter: Toy) -> None:
        self._adapter = adapter

    @hookimpl
    def nsa_plugin_adapters(self) -> Any:
        return [self._adapter]


def test_a_file_that_is_there_first_counts_before_anything_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is installed all the same: once the file goes, it serves."""
    file, toy = tmp_path / "off", Toy()
    file.touch()
    monkeypatch.setattr(entry, "_hosts", {})
    monkeypatch.setenv("NSA_PLUGIN_SWITCH_FILE", str(file))
    caplog.set_level(logging.INFO)
    entry.register("toy", logging.getLogger("toy"), Offer(toy))
    try:
        assert toy.installed == [False] and toy.host.strategies == ()
        assert f"strategy auto; a toy; switched off for now: {file} is there" in caplog.text
        file.unlink()
        background.run_once()
        assert toy.host.on
        disable()
        file.touch()
        background.run_once()
        file.unlink()
        background.run_once()
        assert not toy.host.on
        enable()
        assert toy.host.on
    finally:
        background.cancel(toy.host.look_at_switch_file)


def test_an_engine_that_is_left_alone_is_not_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy()
    monkeypatch.setattr(toy, "install", lambda host: ["looked for much, found little; do more"])
    monkeypatch.setattr(entry, "_hosts", {})
    monkeypatch.setattr(background, "_tasks", [])
    monkeypatch.setenv("NSA_PLUGIN_SWITCH_FILE", str(tmp_path / "off"))
    entry.register("toy", logging.getLogger("toy"), Offer(toy))
    assert background._tasks == []
    with pytest.raises(UnavailableError):
        disable()
