"""At start and at undo: attributes of an engine's classes are replaced, complete or not at all, and put back by identity."""

from __future__ import annotations

import functools
import logging
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.lazy import WhenImported
from nsa_plugin.adapters.ledger import LedgerRow
from nsa_plugin.adapters.probe import Need, missing, warn_of_untested

_INHERITED = object()


class Patches:
    """Replaces attributes of classes, and puts them back.

    Attributes
    ----------
    live : bool
        False after `undo`. A replacement that somebody has wrapped is still called then, and only passes its calls on.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self.live = True
        self._logger = logger
        self._replaced: list[tuple[type, str, Any, Any]] = []

    @property
    def replaced(self) -> bool:
        """Whether anything is replaced."""
        return bool(self._replaced)

    def set(self, owner: type, name: str, value: Any) -> None:
        """Give `owner` the attribute `name`. It may have one of its own, inherit one, or have none."""
        self._replaced.append((owner, name, vars(owner).get(name, _INHERITED), value))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put everything back, last first. What somebody else has replaced since stays, and a warning names it."""
        self.live = False
        replaced, self._replaced = self._replaced, []
        for owner, name, original, value in reversed(replaced):
            if vars(owner).get(name) is not value:
                self._logger.warning(
                    "nsa-plugin: %s.%s was patched by somebody else too, after this plugin: theirs stays, and this "
                    "plugin's, if they call it, does nothing of its own; undo theirs first to have the engine's own back",
                    owner.__qualname__,
                    name,
                )
            elif original is _INHERITED:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


def _never(owner: type) -> bool:
    return False


@dataclass(frozen=True)
class Part:
    """Attributes of one class that are replaced together, as soon as the engine has imported the class.

    Attributes
    ----------
    path : str
        What they serve, for the log.
    owner : str
        Dotted path of the class.
    needs : tuple of Need
        What the replacements take for granted.
    make : callable
        `make(host, owner, live)`: the replacements by attribute. They only pass their calls on while `live()` is False.
    rows : tuple of LedgerRow
        One for each attribute that `make` replaces.
    essential : bool
        Whether the other parts are of no use without this one.
    gone : callable
        `gone(owner)`: whether the engine has by itself what the rows wait for. Nothing is replaced then.
    """

    path: str
    owner: str
    needs: tuple[Need, ...]
    make: Callable[[Host, type, Callable[[], bool]], Mapping[str, Callable[..., Any]]]
    rows: tuple[LedgerRow, ...]
    essential: bool
    gone: Callable[[type], bool] = _never

    @property
    def module(self) -> str:
        """Where the class is."""
        return self.owner.rpartition(".")[0]

    def fits(self) -> bool:
        """Whether the installed engine has what this takes, and lacks what this brings. Imports the class."""
        return not missing(self.needs) and not self.gone(pkgutil.resolve_name(self.owner))


class PatchSet:
    """Parts of an engine that are patched, each as soon as the engine has imported its class.

    The essential parts are patched completely or not at all: the first that lacks something, or fails, takes back the whole
    set and keeps the rest of it from starting. What another part lacks concerns the path of that part alone.

    Parameters
    ----------
    name : str
        What the set serves, for the log.
    parts : sequence of Part
    logger : logging.Logger
        The engine's own.
    used : callable
        Called after an essential part was patched.
    """

    def __init__(
        self, name: str, parts: Sequence[Part], logger: logging.Logger, used: Callable[[], None] = lambda: None
    ) -> None:
        self.name = name
        self._parts = sorted(parts, key=lambda part: not part.essential)
        self._logger, self._used = logger, used
        self._watches: list[WhenImported] = []
        self._patches: list[tuple[Part, Patches]] = []
        self._problems: list[str] = []
        self._started = self._installing = False

    def probe(self) -> list[str]:
        """What the engine lacks for the essential parts; empty if it fits. Imports what would be patched."""
        return missing(tuple(need for part in self._parts if part.essential for need in part.needs))

    def install(self, host: Host) -> list[str]:
        """Patch what is imported, and the rest when it is; returns what keeps the set from that already.

        What keeps it from that later is a warning. Does nothing if it is installed already.
        """
        if self._started:
            return []
        self._started = self._installing = True
        self._problems = []
        for part in self._parts:
            if self._problems:
                self.undo()  # again: another thread may have taken back the set before the last watch was in the list
                break
            patch = functools.partial(self._patch, host, part)
            self._watches.append(WhenImported(part.module, patch, self._logger))
        self._installing = False
        return self._problems

    def undo(self) -> None:
        """Put back every attribute, by identity, and wait for no import any more."""
        watches, self._watches = self._watches, []
        patches, self._patches = self._patches, []
        for watch in watches:
            watch.cancel()
        for _, made in reversed(patches):
            made.undo()
        self._started = False

    def ledger(self) -> list[LedgerRow]:
        """The rows of what is patched, or would be. Imports what would be patched."""
        patched = [part for part, patches in self._patches if patches.replaced]
        return [row for part in self._parts if part in patched or part.fits() for row in part.rows]

    def report(self, problems: list[str]) -> None:
        """Say that nothing of the set is patched, if there are problems."""
        if problems:
            self._logger.warning("nsa-plugin: %s is left as it is: %s", self.name, "; ".join(problems))

    def _patch(self, host: Host, part: Part) -> None:
        if self._problems:
            return
        patches = Patches(self._logger)
        self._patches.append((part, patches))
        problems = self._replace(host, part, patches)
        if problems or not self._started:  # another thread may have taken back the set meanwhile
            patches.undo()
        if not part.essential:
            if problems:
                self._logger.info("nsa-plugin: %s: left as it is: %s", part.path, "; ".join(problems))
        elif problems:
            self._problems = problems
            self.undo()
            if not self._installing:
                self.report(problems)
        else:
            self._used()

    def _replace(self, host: Host, part: Part, patches: Patches) -> list[str]:
        """Replace the attributes of a part; returns what kept it from that."""
        try:
            if problems := missing(part.needs):
                return problems
            owner = pkgutil.resolve_name(part.owner)
            if part.gone(owner):
                return []
            warn_of_untested(self._logger, part.needs)
            made = part.make(host, owner, lambda: patches.live)
            listed = {row.target.rpartition(".")[2] for row in part.rows}
            if made.keys() != listed:
                return [f"expected replacements of {sorted(listed)}, got {sorted(made)}: the ledger is wrong"]
            for name, replacement in made.items():
                patches.set(owner, name, replacement)
        except Exception as error:
            self._logger.exception("nsa-plugin: patching %s failed", part.owner)
            return [str(error)]
        return []
