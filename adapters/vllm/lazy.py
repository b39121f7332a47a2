"""Run something right after a module is imported, whenever that is."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class WhenImported(MetaPathFinder):
    """Calls `call` once after the module `name` has been imported; at once if it is there already.

    `call` must not raise: the import is not ours.
    """

    def __init__(self, name: str, call: Callable[[], None]) -> None:
        self._name = name
        self._call = call
        if name in sys.modules:
            call()
        else:
            sys.meta_path.insert(0, self)

    def cancel(self) -> None:
        """Forget about it, unless the module has been imported."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Leave the search to the others; stand behind the loader that they find, at every attempt until one succeeds."""
        if fullname != self._name:
            return None
        self.cancel()  # the search below must not come here again
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.cancel()
            self._call()

        loader.exec_module = exec_module
        return spec
