"""A thread that switches a host all the time, for tests of what goes on meanwhile."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from nsa_plugin.host import Host


class Storm:
    """What the thread has done so far.

    Attributes
    ----------
    switches : int
    raised : list of exceptions
        What a switch raised, which none should.
    """

    def __init__(self) -> None:
        self.switches = 0
        self.raised: list[BaseException] = []


@contextmanager
def storm(host: Host) -> Iterator[Storm]:
    """Within it, another thread switches without a pause, and threads take turns after a few instructions."""
    found, over, interval = Storm(), threading.Event(), sys.getswitchinterval()

    def toggle() -> None:
        while not over.is_set():
            found.switches += 1
            try:
                host.switch(not host.on, "test")
            except BaseException as error:
                found.raised.append(error)

    thread = threading.Thread(target=toggle)
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(interval)
