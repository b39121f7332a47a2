"""When an engine imports a module: something is run right after that import, whenever it comes.

Other threads import at any time. So one finder is put at the front of `sys.meta_path`, as part of a new list, and stays
there: a thread that walks along the old list still meets all finders of that list. What is watched is data of this module.
The engine's own loaders stay as they are: a loader of ours stands before theirs until the module has run.
"""

from __future__ import annotations

import importlib
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)


class WhenImported:
    """Calls `call` once after the module `name` has been imported; at once if it is there already.

    A first import that fails leaves the watch as it is. `call` should not raise, since the import belongs to somebody
    else: an error is logged, to `logger`.
    """

    def __init__(self, name: str, call: Callable[[], None], logger: logging.Logger = logger) -> None:
        self.name = name
        self._call, self._logger = call, logger
        _waiting.append(self)
        if sys.meta_path[:1] != [_FINDER]:  # who stands before it finds modules without it
            sys.meta_path = [_FINDER, *sys.meta_path]  # no call in this line: another thread's change can't be lost
        _wait_for_import(name)
        if name in sys.modules:
            self.run()

    def run(self) -> None:
        """Make the call, unless it was made or cancelled."""
        if self.cancel():
            try:
                self._call()
            except Exception:
                self._logger.exception("nsa-plugin: what was to be done after the import of %s failed", self.name)

    def cancel(self) -> bool:
        """Forget about it; returns whether the call was still to be made. Of several threads one gets True."""
        try:
            _waiting.remove(self)
        except ValueError:
            return False
        return True


_waiting: list[WhenImported] = []
"""In order of making. Changed by single calls, read as a copy: no lock that a fork could leave locked."""


class _Finder(MetaPathFinder):
    """Finds what is waited for by asking all the others."""

    def __init__(self) -> None:
        self._searching = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The others' spec of a module that is waited for, with `_Loader` before its loader; of any other module None."""
        names: set[str] = vars(self._searching).setdefault("names", set())
        if fullname in names or not any(watch.name == fullname for watch in tuple(_waiting)):
            return None
        names.add(fullname)  # the search comes here again, and others may search too
        try:
            found = (_ask(finder, fullname, path, target) for finder in tuple(sys.meta_path))
            spec = next((spec for spec in found if spec is not None), None)
        finally:
            names.discard(fullname)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader, fullname)  # type: ignore[assignment]
        return spec


_FINDER = _Finder()


class _Loader:
    """Stands before the loader of one import of a module. It is gone when the module's own code runs."""

    def __init__(self, loader: Any, name: str) -> None:
        self.loader, self._name = loader, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then the calls that wait for it."""
        for owner, name in ((module.__spec__, "loader"), (module, "__loader__")):
            if getattr(owner, name, None) is self:
                setattr(owner, name, self.loader)
        self.loader.exec_module(module)
        for watch in tuple(_waiting):
            if watch.name == self._name:
                watch.run()


def _ask(finder: Any, fullname: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    search = getattr(finder, "find_spec", None)
    spec: ModuleSpec | None = None if search is None else search(fullname, path, target)
    return spec


def _wait_for_import(name: str) -> None:
    """Wait for a thread that is importing a module: it may have asked the finder before the watch was there."""
    importlib._bootstrap._lock_unlock_module(name)  # type: ignore[attr-defined]
