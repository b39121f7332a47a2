"""Entry points never raise; settings are checked; without an engine nothing of it is needed."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

import pytest

from nsa_plugin import UnavailableError, disable, enable, entry
from nsa_plugin.host import Host
from nsa_plugin.settings import SettingError, Settings


def test_settings_from_the_environment() -> None:
    assert Settings.from_environment({}) == Settings()
    given = {
        "NSA_PLUGIN_STRATEGY": " Copy ",
        "NSA_PLUGIN_PLUGINS": "a, b,",
        "NSA_PLUGIN_LOG_LEVEL": "debug",
        "NSA_PLUGIN_VERIFY": "100",
        "NSA_PLUGIN_VERIFY_MODE": "Before",
        "NSA_PLUGIN_REPRO_DIR": "/tmp/repro",
        "NSA_PLUGIN_METRICS": "Prometheus, nvtx",
        "NSA_PLUGIN_SWITCH_FILE": "/tmp/off",
        "OTHER": "x",
    }
    settings = Settings.from_environment(given)
    assert settings == Settings(
        "copy", frozenset({"a", "b"}), logging.DEBUG, 100, Path("/tmp/repro"), "engine",
        frozenset({"prometheus", "nvtx"}), Path("/tmp/off"), "before",
    )  # fmt: skip
    assert Settings.from_environment({"NSA_PLUGIN_METRICS": "off"}) == Settings()
    rows = {name: (value, source) for name, value, source in settings.rows()}
    assert rows["NSA_PLUGIN_STRATEGY"] == ("copy", "environment")
    assert rows["NSA_PLUGIN_METRICS"] == ("nvtx,prometheus", "environment")
    assert rows["NSA_PLUGIN_STEP_LENGTHS"] == ("engine", "default")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NSA_PLUGIN_STRATEGY": "fast"}, r"NSA_PLUGIN_STRATEGY: expected auto\|graph\|share\|copy\|off, got 'fast'"),
        ({"NSA_PLUGIN_VERIFY": "-1"}, "NSA_PLUGIN_VERIFY: expected a whole number, 0 for never, got '-1'"),
        ({"NSA_PLUGIN_REPRO_DIR": "x"}, "NSA_PLUGIN_REPRO_DIR: expected an absolute path, got 'x'; engines change"),
        ({"NSA_PLUGIN_STRATEGY": "Grahp"}, "got 'Grahp'; did you mean graph"),
        ({"NSA_PLUGIN_STEP_LENGTHS": "exakt"}, "got 'exakt'; did you mean exact"),
        ({"NSA_PLUGIN_VERIFY_MODE": "grahp"}, r"expected auto\|before\|graph, got 'grahp'; did you mean graph"),
        ({"NSA_PLUGIN_VERIFY": "9" * 5000}, "write at most 18 digits"),
        ({"NSA_PLUGIN_VERIFY": "²"}, "expected a whole number"),
        ({"NSA_PLUGIN_STRATAGY": "off"}, "did you mean NSA_PLUGIN_STRATEGY"),
        ({"NSA_PLUGIN_STEP_LENGTHS": "long"}, r"NSA_PLUGIN_STEP_LENGTHS: expected engine\|exact, got 'long'"),
        (
            {"NSA_PLUGIN_STEP_LENGTHS": "exact", "NSA_PLUGIN_STRATEGY": "copy"},
            "expected engine with the strategy copy, got 'exact'; use NSA_PLUGIN_STRATEGY=auto, graph or share",
        ),
        ({"NSA_PLUGIN_STRATEGIE": "off"}, "NSA_PLUGIN_STRATEGIE: expected one of NSA_PLUGIN_STRATEGY, .*; unset it"),
    ],
)
def test_unknown_settings_name_the_valid_ones(environment: dict[str, str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Settings.from_environment(environment)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("NSA_PLUGIN_LOG_LEVEL", "loud", "expected DEBUG|INFO|WARNING|ERROR, got 'loud'"),
        ("NSA_PLUGIN_LOG_LEVEL", "warn", "did you mean WARNING?"),
        ("NSA_PLUGIN_METRICS", "graphite", "expected off, or some of prometheus,nvtx, got 'graphite'"),
        ("NSA_PLUGIN_METRICS", "promtheus", "did you mean prometheus?"),
        ("NSA_PLUGIN_LOGLEVEL", "DEBUG", "did you mean NSA_PLUGIN_LOG_LEVEL?"),
        ("NSA_PLUGIN_METRIC", "nvtx", "did you mean NSA_PLUGIN_METRICS?"),
    ],
)
def test_a_mistake_in_a_cosmetic_setting_leaves_the_plugin_on(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings.from_environment({variable: value, "NSA_PLUGIN_VERIFY": "5"})
    assert settings == Settings(verify=5) and [name for name, _ in settings.mistakes] == [variable]
    monkeypatch.setattr(entry, "_hosts", {})
    monkeypatch.setattr("nsa_plugin.host.VllmAdapter", Toy)
    monkeypatch.setenv(variable, value)
    caplog.set_level(logging.INFO)
    entry.register_vllm()
    warned = [record for record in caplog.records if message in record.getMessage()]
    assert [record.levelno for record in warned] == [logging.WARNING] and "vllm" in entry._hosts


@pytest.mark.parametrize(("asked", "expected"), [(None, logging.ERROR), ("DEBUG", logging.DEBUG)])
def test_the_log_level_is_the_engines_unless_one_is_asked_for(
    asked: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entry, "_hosts", {})
    monkeypatch.setattr("nsa_plugin.host.VllmAdapter", Toy)
    monkeypatch.delenv("NSA_PLUGIN_LOG_LEVEL", raising=False)
    if asked is not None:
        monkeypatch.setenv("NSA_PLUGIN_LOG_LEVEL", asked)
    loggers = [logging.getLogger(name) for name in ("vllm", "vllm.plugins.nsa_plugin", "nsa_plugin")]
    before = [logger.level for logger in loggers]
    try:
        for logger, level in zip(loggers, (logging.ERROR, logging.NOTSET, logging.NOTSET), strict=True):
            logger.setLevel(level)
        entry.register_vllm()
        assert loggers[1].getEffectiveLevel() == expected
        assert loggers[2].level == (logging.NOTSET if asked is None else expected)
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@pytest.mark.skipif(importlib.util.find_spec("sglang") is not None, reason="sglang is installed here")
def test_without_sglang_the_entry_point_says_so_and_does_not_raise(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    entry.register_sglang()
    assert "sglang is left as it is" in caplog.text
    assert "looked for the DSA backends, found ModuleNotFoundError" in caplog.text


def test_entry_points_survive_anything(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("NSA_PLUGIN_STRATEGY", "nonsense")
    entry.register_sglang()
    assert "expected auto|graph|share|copy|off, got 'nonsense'" in caplog.text


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed here")
def test_without_vllm_the_entry_point_says_so_and_does_not_raise(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    entry.register_vllm()
    assert "vllm is left as it is: looked for vLLM, found no such distribution" in caplog.text


def test_switching_without_an_engine_says_where_to_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "_hosts", {})
    for switch in (disable, enable):
        with pytest.raises(UnavailableError, match="NSA_PLUGIN_SWITCH_FILE"):
            switch()


class Toy:
    """An adapter that installs into nothing and honours no setting beyond the strategy."""

    name = "vllm"
    features: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.switched: list[bool] = []

    def install(self, host: object) -> list[str]:
        return []

    def summary(self) -> str:
        return "a toy"

    def switch(self, on: bool) -> list[str]:
        self.switched.append(on)
        return [] if on else ["recorded work goes on"]


def test_what_an_engine_cant_honour_is_said_and_an_installed_host_can_be_switched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    toy = Toy()
    monkeypatch.setattr(entry, "_hosts", {})
    monkeypatch.setattr("nsa_plugin.host.VllmAdapter", lambda: toy)
    monkeypatch.setenv("NSA_PLUGIN_VERIFY", "5")
    monkeypatch.setenv("NSA_PLUGIN_STEP_LENGTHS", "exact")
    entry.register_vllm()
    entry.register_vllm()
    for variable in ("NSA_PLUGIN_VERIFY", "NSA_PLUGIN_STEP_LENGTHS"):
        assert caplog.text.count(f"{variable} can't be had with vllm: it is ignored") == 1
    assert disable() == ["recorded work goes on"]
    assert enable() == [] and toy.switched == [False, True]
    assert caplog.text.count("nsa-plugin: recorded work goes on") == 1


def test_a_forked_process_says_in_its_own_log_what_was_loaded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A process that inherits the plugin by a fork may have a log of its own: it says the line at first use, once."""
    monkeypatch.setattr(entry, "_hosts", {})
    monkeypatch.setattr("nsa_plugin.host.VllmAdapter", Toy)
    monkeypatch.delenv("NSA_PLUGIN_STRATEGY", raising=False)
    logger = logging.getLogger("vllm.plugins.nsa_plugin")
    caplog.set_level(logging.INFO, logger.name)

    def log_to(name: str) -> None:
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        logger.addHandler(logging.FileHandler(tmp_path / name))

    def use(host: Host) -> None:
        report = host.path("vllm", "draft decode", logger)
        for _ in range(2):
            report.using("graph")

    log_to("parent")
    entry.register_vllm()
    host = entry._hosts["vllm"]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            log_to("child")
            host.switch(False, "a call")
            use(host)
            entry.register_vllm()  # engines load plugins again
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    use(host)
    log_to("nothing more")
    line, path = "strategy auto; a toy", "nsa-plugin: draft decode: strategy graph"
    parent, childs = ((tmp_path / name).read_text().splitlines() for name in ("parent", "child"))
    assert [line in said for said in parent] == [True, False] and parent[1] == path
    assert [line in said for said in childs] == [True, False] and childs[1] == path
    assert childs[0].endswith("switched off for now: a call")
    logger.removeHandler(logger.handlers[0])
