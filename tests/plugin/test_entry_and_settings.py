"""Entry points never raise; settings are checked; without an engine nothing of it is needed."""

from __future__ import annotations

import importlib.util
import logging

import pytest

from nsa_plugin import entry
from nsa_plugin.settings import SettingError, Settings


def test_settings_from_the_environment() -> None:
    assert Settings.from_environment({}) == Settings()
    given = {
        "NSA_PLUGIN_STRATEGY": " Copy ",
        "NSA_PLUGIN_PLUGINS": "a, b,",
        "NSA_PLUGIN_LOG_LEVEL": "debug",
        "OTHER": "x",
    }
    assert Settings.from_environment(given) == Settings("copy", frozenset({"a", "b"}), logging.DEBUG)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NSA_PLUGIN_STRATEGY": "fast"}, r"NSA_PLUGIN_STRATEGY: expected auto\|graph\|share\|copy\|off, got 'fast'"),
        ({"NSA_PLUGIN_LOG_LEVEL": "loud"}, r"NSA_PLUGIN_LOG_LEVEL: expected DEBUG\|INFO\|WARNING\|ERROR, got 'loud'"),
        ({"NSA_PLUGIN_STRATEGIE": "off"}, "NSA_PLUGIN_STRATEGIE: expected one of NSA_PLUGIN_STRATEGY, .*; unset it"),
    ],
)
def test_unknown_settings_name_the_valid_ones(environment: dict[str, str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Settings.from_environment(environment)


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
