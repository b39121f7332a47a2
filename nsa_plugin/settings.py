"""Settings, from environment variables: engines spawn processes, and those inherit nothing else."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nsa_plugin.core.errors import InvalidValueError, reject

PREFIX = "NSA_PLUGIN_"
STRATEGIES = ("auto", "graph", "share", "copy", "off")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
METRICS = ("prometheus", "nvtx")
STEP_LENGTHS = ("engine", "exact")
NAMES = {
    "strategy": "STRATEGY",
    "verify": "VERIFY",
    "repro_dir": "REPRO_DIR",
    "step_lengths": "STEP_LENGTHS",
    "metrics": "METRICS",
    "switch_file": "SWITCH_FILE",
    "plugins": "PLUGINS",
    "log_level": "LOG_LEVEL",
}
"""Field of `Settings` to the variable's name without its prefix."""


class SettingError(InvalidValueError):
    """An environment variable of this package has an unknown name or value."""


@dataclass(frozen=True)
class Settings:
    """Resolved settings.

    Attributes
    ----------
    strategy : "auto", "graph", "share", "copy" or "off"  (NSA_PLUGIN_STRATEGY)
        How draft backends get their metadata. `auto` takes the best that the engine allows; `off` patches nothing.
    plugins : frozenset of str, or None  (NSA_PLUGIN_PLUGINS, comma-separated)
        Third-party plugins of the entry-point group `nsa_plugin` that may be loaded; None allows all.
    log_level : int  (NSA_PLUGIN_LOG_LEVEL)
        Level of this package's loggers.
    verify : int >= 0  (NSA_PLUGIN_VERIFY)
        Every how many replays the engine's own code recomputes the metadata for comparison; 0 is never.
    repro_dir : Path or None  (NSA_PLUGIN_REPRO_DIR)
        Directory for a file about each difference that a verification finds; None writes none.
    step_lengths : "engine" or "exact"  (NSA_PLUGIN_STEP_LENGTHS)
        Which lengths draft steps see: the engine's own, or with the draft tokens before them.
    metrics : frozenset of "prometheus" and "nvtx"  (NSA_PLUGIN_METRICS, comma-separated)
        Where to report to.
    switch_file : Path or None  (NSA_PLUGIN_SWITCH_FILE)
        While this file exists, running processes use the engine's own path.
    given : frozenset of str
        Fields that the environment gave; the others are defaults.
    """

    strategy: str = "auto"
    plugins: frozenset[str] | None = None
    log_level: int = logging.INFO
    verify: int = 0
    repro_dir: Path | None = None
    step_lengths: str = "engine"
    metrics: frozenset[str] = frozenset()
    switch_file: Path | None = None
    given: frozenset[str] = field(default=frozenset(), compare=False)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the settings; raise `SettingError` that names the valid ones for an unknown name or value."""
        environ = os.environ if environ is None else environ
        given = {name: value.strip() for name, value in environ.items() if name.startswith(PREFIX) and value.strip()}
        known = [PREFIX + name for name in NAMES.values()]
        for name in given:
            if name not in known:
                reject(name, f"one of {', '.join(known)}", "an unknown setting", fix="unset it", error=SettingError)
        plugins = given.get(PREFIX + "PLUGINS")
        level = _choice(given, "LOG_LEVEL", LOG_LEVELS, "INFO")
        settings = cls(
            strategy=_choice(given, "STRATEGY", STRATEGIES, "auto"),
            plugins=None if plugins is None else frozenset(_list(plugins)),
            log_level=int(getattr(logging, level)),
            verify=_count(given, "VERIFY"),
            repro_dir=_path(given, "REPRO_DIR"),
            step_lengths=_choice(given, "STEP_LENGTHS", STEP_LENGTHS, "engine"),
            metrics=_metrics(given),
            switch_file=_path(given, "SWITCH_FILE"),
            given=frozenset(field for field, name in NAMES.items() if PREFIX + name in given),
        )
        if settings.step_lengths == "exact" and settings.strategy == "copy":
            fix = f"use {PREFIX}STRATEGY=auto, graph or share"
            reject(f"{PREFIX}STEP_LENGTHS", "engine with the strategy copy", "'exact'", fix=fix, error=SettingError)
        return settings

    def beyond(self, features: frozenset[str]) -> list[str]:
        """Variables that ask for more than an adapter with these features can give."""
        asked = {"verify": self.verify > 0, "step_lengths": self.step_lengths != "engine"}
        return [PREFIX + NAMES[name] for name, wanted in asked.items() if wanted and name not in features]

    def rows(self) -> list[tuple[str, str, str]]:
        """Variable, value as one would write it, and where it came from, for each setting."""
        shown = []
        for name, variable in NAMES.items():
            value = getattr(self, name)
            if name == "log_level":
                value = logging.getLevelName(value)
            elif isinstance(value, frozenset):
                value = ",".join(sorted(value))
            source = "environment" if name in self.given else "default"
            shown.append((PREFIX + variable, "" if value is None else str(value), source))
        return shown


def _choice(given: Mapping[str, str], name: str, valid: tuple[str, ...], default: str) -> str:
    value = given.get(PREFIX + name, default)
    for choice in valid:
        if choice.lower() == value.lower():
            return choice
    reject(PREFIX + name, "|".join(valid), repr(value), error=SettingError)


def _count(given: Mapping[str, str], name: str) -> int:
    value = given.get(PREFIX + name, "0")
    if not value.isdecimal():
        reject(PREFIX + name, "a whole number, 0 for never", repr(value), error=SettingError)
    return int(value)


def _path(given: Mapping[str, str], name: str) -> Path | None:
    value = given.get(PREFIX + name)
    if value is None:
        return None
    if not Path(value).is_absolute():
        fix = "engines change their working directory"
        reject(PREFIX + name, "an absolute path", repr(value), fix=fix, error=SettingError)
    return Path(value)


def _metrics(given: Mapping[str, str]) -> frozenset[str]:
    names = [name.lower() for name in _list(given.get(PREFIX + "METRICS", "off"))]
    if names == ["off"]:
        return frozenset()
    for name in names:
        if name not in METRICS:
            reject(PREFIX + "METRICS", f"off, or some of {','.join(METRICS)}", repr(name), error=SettingError)
    return frozenset(names)


def _list(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
