"""Settings from environment variables. Engines spawn processes, and those inherit the environment only."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nsa_plugin.core.errors import InvalidValueError, reject

PREFIX = "NSA_PLUGIN_"
STRATEGIES = ("auto", "graph", "share", "copy", "off")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
METRICS = ("prometheus", "nvtx")
MAX_DIGITS = 18
STEP_LENGTHS = ("engine", "exact")
VERIFY_MODES = ("auto", "before", "graph")
NAMES = {
    "strategy": "STRATEGY",
    "verify": "VERIFY",
    "verify_mode": "VERIFY_MODE",
    "repro_dir": "REPRO_DIR",
    "step_lengths": "STEP_LENGTHS",
    "metrics": "METRICS",
    "switch_file": "SWITCH_FILE",
    "plugins": "PLUGINS",
    "log_level": "LOG_LEVEL",
}
"""Field of `Settings` to the variable's name without its prefix."""
COSMETIC = ("log_level", "metrics")
"""Fields that do not change how an engine works. A mistake in one is a warning, and its default is used."""


class SettingError(InvalidValueError):
    """An environment variable of this package has an unknown name or value."""


@dataclass(frozen=True)
class Settings:
    """Resolved settings.

    Attributes
    ----------
    strategy : "auto", "graph", "share", "copy" or "off"  (NSA_PLUGIN_STRATEGY)
        How draft steps get their metadata. `auto` takes the best strategy that the engine allows; `off` patches nothing.
    plugins : frozenset of str, or None  (NSA_PLUGIN_PLUGINS, comma-separated)
        Third-party plugins of the entry-point group `nsa_plugin` that may be loaded; None allows all.
    log_level : int or None  (NSA_PLUGIN_LOG_LEVEL)
        Level of this package's loggers; None leaves them at the engine's.
    verify : int >= 0  (NSA_PLUGIN_VERIFY)
        Every n-th replay is compared with the engine's own computation; 0 compares none.
    repro_dir : Path or None  (NSA_PLUGIN_REPRO_DIR)
        Directory for repro files, one per difference that a verification finds; None writes none.
    step_lengths : "engine" or "exact"  (NSA_PLUGIN_STEP_LENGTHS)
        Lengths that draft steps see: those of the engine's own code, or those that count the draft tokens before them.
    metrics : frozenset of "prometheus" and "nvtx"  (NSA_PLUGIN_METRICS, comma-separated)
        What to report to.
    switch_file : Path or None  (NSA_PLUGIN_SWITCH_FILE)
        While this file exists, running processes use the engine's own path.
    verify_mode : "auto", "before" or "graph"  (NSA_PLUGIN_VERIFY_MODE)
        Whether a verified path takes a strategy that can be repaired before use, or keeps the work in the engine's graph and
        is compared after the replay. `auto` is `before` where a path has it, else `graph`.
    given : frozenset of str
        Fields that the environment sets; the others have their defaults.
    mistakes : tuple of (variable, message)
        Fields of `COSMETIC` whose values are invalid; they have their defaults.
    """

    strategy: str = "auto"
    plugins: frozenset[str] | None = None
    log_level: int | None = None
    verify: int = 0
    repro_dir: Path | None = None
    step_lengths: str = "engine"
    metrics: frozenset[str] = frozenset()
    switch_file: Path | None = None
    verify_mode: str = "auto"
    given: frozenset[str] = field(default=frozenset(), compare=False)
    mistakes: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the settings.

        Raises
        ------
        SettingError
            A name is unknown, or a value outside `COSMETIC` is invalid. It names the valid ones and the nearest.
        """
        environ = os.environ if environ is None else environ
        given = {name: value.strip() for name, value in environ.items() if name.startswith(PREFIX) and value.strip()}
        readers = {
            "strategy": _choice, "plugins": _names, "log_level": _level, "verify": _count, "repro_dir": _path,
            "step_lengths": _choice, "metrics": _metrics, "switch_file": _path,
            "verify_mode": _choice,
        }  # fmt: skip
        fields = {PREFIX + variable: name for name, variable in NAMES.items()}
        values: dict[str, Any] = {}
        mistakes = []
        for variable, value in given.items():
            name = fields.get(variable)
            try:
                if name is None:
                    guess = _meant(variable)
                    fix = f"unset it; did you mean {guess}?" if guess else "unset it"
                    reject(variable, f"one of {', '.join(fields)}", "an unknown setting", fix=fix, error=SettingError)
                values[name] = readers[name](variable, value)
            except SettingError as error:
                if (name or fields.get(_meant(variable))) not in COSMETIC:
                    raise
                mistakes.append((variable, str(error)))
        settings = replace(cls(**values), given=frozenset(values), mistakes=tuple(mistakes))
        if settings.step_lengths == "exact" and settings.strategy == "copy":
            fix = f"use {PREFIX}STRATEGY=auto, graph or share"
            reject(f"{PREFIX}STEP_LENGTHS", "engine with the strategy copy", "'exact'", fix=fix, error=SettingError)
        return settings

    def beyond(self, features: frozenset[str]) -> list[str]:
        """Variables that ask for a feature which is not in `features`, those of an adapter."""
        asked = {"verify": self.verify > 0, "step_lengths": self.step_lengths != "engine"}
        return [PREFIX + NAMES[name] for name, wanted in asked.items() if wanted and name not in features]

    def rows(self) -> list[tuple[str, str, str]]:
        """(variable, value as text, "environment" or "default") of each setting."""
        shown = []
        for name, variable in NAMES.items():
            value = getattr(self, name)
            if name == "log_level" and value is not None:
                value = logging.getLevelName(value)
            elif isinstance(value, frozenset):
                value = ",".join(sorted(value))
            source = "environment" if name in self.given else "default"
            shown.append((PREFIX + variable, "" if value is None else str(value), source))
        return shown


def _choice(variable: str, value: str) -> str:
    valid = {"STRATEGY": STRATEGIES, "STEP_LENGTHS": STEP_LENGTHS, "VERIFY_MODE": VERIFY_MODES}[
        variable.removeprefix(PREFIX)
    ]
    return _one_of(variable, value, valid)


def _level(variable: str, value: str) -> int:
    return int(getattr(logging, _one_of(variable, value, LOG_LEVELS)))


def _one_of(variable: str, value: str, valid: tuple[str, ...]) -> str:
    for choice in valid:
        if choice.lower() == value.lower():
            return choice
    reject(variable, "|".join(valid), repr(value), fix=_nearest(value, valid), error=SettingError)


def _count(variable: str, value: str) -> int:
    if not (value.isascii() and value.isdecimal() and len(value) <= MAX_DIGITS):
        fix = f"write at most {MAX_DIGITS} digits"
        reject(variable, "a whole number, 0 for never", repr(value[:40]), fix=fix, error=SettingError)
    return int(value)


def _path(variable: str, value: str) -> Path:
    if not Path(value).is_absolute():
        fix = "engines change their working directory"
        reject(variable, "an absolute path", repr(value), fix=fix, error=SettingError)
    return Path(value)


def _metrics(variable: str, value: str) -> frozenset[str]:
    names = [name.lower() for name in _list(value)]
    if names == ["off"]:
        return frozenset()
    for name in names:
        if name not in METRICS:
            expected = f"off, or some of {','.join(METRICS)}"
            reject(variable, expected, repr(name), fix=_nearest(name, (*METRICS, "off")), error=SettingError)
    return frozenset(names)


def _names(variable: str, value: str) -> frozenset[str]:
    return frozenset(_list(value))


def _list(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _meant(variable: str) -> str:
    guess = _guess(variable.removeprefix(PREFIX), NAMES.values())
    return PREFIX + guess if guess else ""


def _guess(word: str, valid: Iterable[str]) -> str:
    """The valid word that is nearest to `word`; empty if none is near."""
    known = {choice.lower(): choice for choice in valid}
    found = difflib.get_close_matches(word.lower(), known, n=1)
    return known[found[0]] if found else ""


def _nearest(word: str, valid: Iterable[str]) -> str:
    guess = _guess(word, valid)
    return f"did you mean {guess}?" if guess else ""
