"""At start: what every row of a table of dense backends says: which class, which forward mode, and whether it is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from nsa_plugin.adapters.base import Host, Strategy, unproved
from nsa_plugin.adapters.sglang.releases import Part, lacking


@dataclass(frozen=True)
class BackendRow:
    """A class of backends in one forward mode.

    Attributes
    ----------
    path : str
        Its name in reports.
    backend : str
        Dotted path of the class.
    mode : str
        Name of sglang's forward mode.
    part : Part
        What it needs of sglang.
    unsupported : callable(backend)
        Empty, or what about a backend is not covered.
    proved : bool
        Whether it has run on a GPU, see `unproved`.
    gpus : frozenset of str
        As in `PathPlan`.
    """

    least: ClassVar[Strategy] = "graph"
    """The last strategy that serves it: `share` also means work before the replay."""

    path: str
    backend: str
    mode: str
    part: Part
    unsupported: Callable[[Any], str]
    proved: bool
    gpus: frozenset[str]

    def has(self, owner: Any) -> bool:
        """Whether an object is such a backend, or of a subclass."""
        return any(f"{kind.__module__}.{kind.__qualname__}" == self.backend for kind in type(owner).__mro__)

    def left_out(self, host: Host) -> str:
        """Empty, or why the settings leave it to sglang."""
        if self.least not in host.configured:
            return "NSA_PLUGIN_STRATEGY asks for another strategy"
        return unproved(self.proved, host)

    def is_taken(self, host: Host | None) -> bool:
        """Whether the settings take it, and the installed sglang has what it needs; without `host` the settings take all."""
        return not (host is not None and self.left_out(host)) and not lacking(self.part)
