"""Settings, from environment variables: engines spawn processes, and those inherit nothing else."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

from nsa_plugin.core.errors import InvalidValueError, reject

PREFIX = "NSA_PLUGIN_"
STRATEGIES = ("auto", "graph", "share", "copy", "off")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


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
    """

    strategy: str = "auto"
    plugins: frozenset[str] | None = None
    log_level: int = logging.INFO

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the settings; raise `SettingError` that names the valid ones for an unknown name or value."""
        environ = os.environ if environ is None else environ
        given = {name: value.strip() for name, value in environ.items() if name.startswith(PREFIX) and value.strip()}
        known = [PREFIX + name for name in ("STRATEGY", "PLUGINS", "LOG_LEVEL")]
        for name in given:
            if name not in known:
                reject(name, f"one of {', '.join(known)}", "an unknown setting", fix="unset it", error=SettingError)
        plugins = given.get(PREFIX + "PLUGINS")
        level = _choice(given, "LOG_LEVEL", LOG_LEVELS, "INFO")
        return cls(
            strategy=_choice(given, "STRATEGY", STRATEGIES, "auto"),
            plugins=None if plugins is None else frozenset(name.strip() for name in plugins.split(",") if name.strip()),
            log_level=int(getattr(logging, level)),
        )


def _choice(given: Mapping[str, str], name: str, valid: tuple[str, ...], default: str) -> str:
    value = given.get(PREFIX + name, default)
    for choice in valid:
        if choice.lower() == value.lower():
            return choice
    reject(PREFIX + name, "|".join(valid), repr(value), error=SettingError)
