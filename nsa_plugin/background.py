"""One background thread, once a second: it flushes metrics and looks at the switch file.

A look at a file, or a Prometheus update, takes longer than a whole `graph` replay. So no replay does either.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable

logger = logging.getLogger("nsa_plugin")
PERIOD = 1.0
"""Seconds between two rounds."""

_tasks: list[Callable[[], None]] = []
_lock = threading.Lock()
_thread: threading.Thread | None = None


def every_second(task: Callable[[], None]) -> None:
    """Call `task` about once a second in a daemon thread, and at exit. A task that raises is logged and not called again."""
    with _lock:
        if task not in _tasks:
            _tasks.append(task)
    _start()


def cancel(task: Callable[[], None]) -> None:
    """Do not call `task` any more."""
    with _lock:
        if task in _tasks:
            _tasks.remove(task)


def run_once() -> None:
    """One round, in the calling thread."""
    for task in tuple(_tasks):
        try:
            task()
        except Exception:
            cancel(task)
            logger.exception("a background task of nsa-plugin failed: it is not called again")


def _start() -> None:
    global _thread
    with _lock:
        if _thread is None or not _thread.is_alive():
            _thread = threading.Thread(target=_loop, name="nsa-plugin", daemon=True)
            _thread.start()


def _loop() -> None:
    stop = threading.Event()
    while not stop.wait(PERIOD):
        run_once()


def _after_fork() -> None:
    """Start a new thread, with a new lock: threads do not survive a fork, and one of them may have held the lock."""
    global _thread, _lock
    _thread, _lock = None, threading.Lock()
    if _tasks:
        _start()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(run_once)
