"""Host time of calls, kept in memory and written to the folder `E2E_TIMES` whenever the process is idle.

The file `times_<pid>.json` is {name: [[start, seconds], …]}; start is `time.perf_counter()`, which all processes of a
machine share. Nothing is synchronised with the GPU.
"""

from __future__ import annotations

import functools
import json
import os
import pkgutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

Target = tuple[str, str, str]
"""Class (dotted path), method, and the name under which its calls are timed."""

TICK_S, QUIET_TICKS = 0.25, 3
"""Idle is who did nothing for so many ticks. Ticks, not seconds: a process that was stopped does not write when it goes on."""
times: dict[str, list[tuple[float, float]]] = {}


def measure(owner: type, method: str, name: str) -> None:
    """Wrap a method of a class as it is now; outermost if nobody wraps it later."""
    wrapped, entries, clock = getattr(owner, method), times.setdefault(name, []), time.perf_counter

    @functools.wraps(wrapped)
    def timed(*arguments: Any, **named: Any) -> Any:
        start = clock()
        try:
            return wrapped(*arguments, **named)
        finally:
            entries.append((start, clock() - start))

    setattr(owner, method, timed)


def from_first_call(module: str, owner: str, method: str, targets: Sequence[Target]) -> None:
    """Time `method` of class `owner` of `module` as "round", and the targets, from its first call on.

    By then all plugins are in place, so what is timed is outermost. Does nothing without `E2E_TIMES`.
    """
    if "E2E_TIMES" not in os.environ:
        return

    def watch(loaded: ModuleType) -> None:
        cls = getattr(loaded, owner)
        original = getattr(cls, method)

        def first(*arguments: Any, **named: Any) -> Any:
            setattr(cls, method, original)
            for path, timed, name in targets:
                measure(pkgutil.resolve_name(path), timed, name)
            measure(cls, method, "round")
            threading.Thread(target=_write, daemon=True).start()
            return getattr(cls, method)(*arguments, **named)

        setattr(cls, method, first)

    if module in sys.modules:
        watch(sys.modules[module])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path = [_WhenImported(module, watch), *sys.meta_path]  # others may be walking along the old list


class _WhenImported(MetaPathFinder):
    """Calls `call` with a module after its import. It stays on `sys.meta_path`, where others look at any time."""

    def __init__(self, module: str, call: Callable[[ModuleType], None]) -> None:
        self._module, self._call = module, call
        self._searching = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._module or vars(self._searching):
            return None
        self._searching.by = self
        try:
            spec = next(
                filter(None, (finder.find_spec(fullname, path, target) for finder in tuple(sys.meta_path))), None
            )
        finally:
            vars(self._searching).clear()
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._call)
        return spec


class _Loader:
    """Stands before a module's loader until the module runs."""

    def __init__(self, loader: Any, call: Callable[[ModuleType], None]) -> None:
        self._loader, self._call = loader, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        for owner, name in ((module.__spec__, "loader"), (module, "__loader__")):
            if getattr(owner, name, None) is self:
                setattr(owner, name, self._loader)
        self._loader.exec_module(module)
        self._call(module)


def _write() -> None:
    path = Path(os.environ["E2E_TIMES"]) / f"times_{os.getpid()}.json"
    written = seen = quiet = 0
    while True:
        time.sleep(TICK_S)
        known = sum(map(len, times.values()))
        quiet = quiet + 1 if known == seen else 0
        seen = known
        if quiet < QUIET_TICKS or known == written:
            continue
        part = path.with_suffix(".part")
        part.write_text(json.dumps(times))
        part.replace(path)
        written = known
