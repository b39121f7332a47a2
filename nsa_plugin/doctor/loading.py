"""Whether the installed engines would load the plugin, and whether it would be switched off there."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points

from nsa_plugin.doctor.check import Check
from nsa_plugin.settings import Settings

ENTRY_POINT = "nsa_plugin"


@dataclass(frozen=True)
class Loading:
    """How an engine chooses its plugins.

    Attributes
    ----------
    group : str
        Entry-point group in which it looks for them.
    variable : str
        Environment variable with the names, separated by commas, of those that it may load.
    empty_means_none : bool
        Whether the empty variable leaves all of them out; otherwise it is as good as unset.
    stripped : bool
        Whether spaces around a name do not count.
    """

    group: str
    variable: str
    empty_means_none: bool
    stripped: bool

    def leaves_out(self, value: str | None) -> bool:
        """Whether the engine would not load this plugin with that value of the variable."""
        if value is None or (not value and not self.empty_means_none):
            return False
        return ENTRY_POINT not in [name.strip() if self.stripped else name for name in value.split(",")]


LOADING = {
    "sglang": Loading("sglang.srt.plugins", "SGLANG_PLUGINS", empty_means_none=False, stripped=True),
    "vllm": Loading("vllm.general_plugins", "VLLM_PLUGINS", empty_means_none=True, stripped=False),
}


def loading(engines: Collection[str], settings: Settings) -> Iterator[Check]:
    """A check for whatever keeps the plugin out of an installed engine; nothing of that matters with strategy off."""
    wanted = settings.strategy != "off"
    if not engines:
        yield Check(
            "engine", "any", "fail" if wanted else "note", "neither sglang nor vLLM is installed here",
            "install the plugin into the engine's own environment, and run its nsa-plugin",
        )  # fmt: skip
    for name in engines:
        how = LOADING[name]
        value = os.environ.get(how.variable)
        if ENTRY_POINT not in {point.name for point in entry_points(group=how.group)}:
            detail = f"{name} finds no plugin {ENTRY_POINT} among the entry points {how.group}"
            yield Check(
                "engine", f"{name}: entry point", "fail" if wanted else "note", detail,
                "pip install nsa-plugin into this environment: its files alone are not enough",
            )  # fmt: skip
        if how.leaves_out(value):
            names = ",".join([*(name.strip() for name in (value or "").split(",") if name.strip()), ENTRY_POINT])
            yield Check(
                "engine", f"{name}: {how.variable}", "fail" if wanted else "note", f"{value!r} leaves this plugin out",
                f"export {how.variable}={names}, or unset it",
            )  # fmt: skip
        elif value:
            yield Check("engine", f"{name}: {how.variable}", "ok", f"{value!r} lets this plugin in")
    file = settings.switch_file
    if file is not None and file.exists():
        yield Check("setting", "switch file", "off" if wanted else "note", f"{file} is there: all is off", f"rm {file}")
