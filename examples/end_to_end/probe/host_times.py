"""Host time of calls, kept in memory and written to the folder `E2E_TIMES` whenever the process is idle.

The file `times_<pid>.json` is {name: [[start, seconds], …]}; start is `time.perf_counter()`, which all processes of a
machine share. Nothing is synchronised with the GPU.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

IDLE_S = 0.5
times: dict[str, list[tuple[float, float]]] = {}
_last = [0.0]


def measure(owner: type, method: str, name: str) -> None:
    """Wrap a method of a class as it is now; outermost if nobody wraps it later."""
    wrapped, entries, clock, last = getattr(owner, method), times.setdefault(name, []), time.perf_counter, _last

    @functools.wraps(wrapped)
    def timed(*arguments: Any, **named: Any) -> Any:
        start = clock()
        try:
            return wrapped(*arguments, **named)
        finally:
            end = clock()
            entries.append((start, end - start))
            last[0] = end

    setattr(owner, method, timed)


def write_when_idle() -> None:
    """Start the thread that writes."""
    threading.Thread(target=_write, daemon=True).start()


def _write() -> None:
    path = Path(os.environ["E2E_TIMES"]) / f"times_{os.getpid()}.json"
    written = 0
    while True:
        time.sleep(IDLE_S / 2)
        known = sum(map(len, times.values()))
        if known == written or time.perf_counter() - _last[0] < IDLE_S:
            continue
        part = path.with_suffix(".part")
        part.write_text(json.dumps(times))
        part.replace(path)
        written = known
