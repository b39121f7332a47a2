"""On or off, and why: the one place that decides whether the engines' own paths are used.

Any thread may say off or on, at any time. It changes `Switch.on` and nothing else; whoever acts on that reads it once per
decision.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from pathlib import Path

from nsa_plugin import background

logger = logging.getLogger("nsa_plugin")

_changing = threading.RLock()
"""Held while reasons change, and across a fork: no child inherits half a change. No foreign code runs within it."""
_telling = threading.RLock()
"""Held while changes are told, one after the other."""


class Switch:
    """Off for as long as there is a reason to be.

    Parameters
    ----------
    file : Path or None
        A reason while it exists; see `watch_switch_file`.

    Attributes
    ----------
    on : bool
        Whether anything but the engines' own paths is used.
    reasons : tuple of str
        Why not, in the order in which they came up; empty while on.
    """

    def __init__(self, file: Path | None) -> None:
        self.on = True
        self.reasons: tuple[str, ...] = ()
        self._file = file
        self._file_is_there = False
        self._file_problem = ""
        self._untold: deque[str] = deque()

    def left_as_is(self, on: bool) -> list[str]:
        """What goes on as before although it was switched, one line each: it takes a restart, or a new capture."""
        return []

    def switch(self, on: bool, why: str) -> list[str]:
        """Use the engines' own paths from the next replay on, for one more reason; or ours again, whatever the reasons.

        Returns what goes on as before, one line each: it takes a restart, or a new capture.
        """
        with _changing:
            self._change(() if on else tuple(dict.fromkeys((*self.reasons, why))), why)
        return self._tell()

    def watch_switch_file(self) -> None:
        """Look at the switch file now and once a second from now on, if there is one to look at."""
        if self._file is not None:
            self.look_at_switch_file()
            background.every_second(self.look_at_switch_file)

    def look_at_switch_file(self) -> None:
        """Have one more reason when the switch file appears, and one less when it goes away.

        Does nothing while the file stays as it is: what `switch` says in the meantime holds.
        """
        there = self._look()
        with _changing:
            if there == self._file_is_there:
                return
            self._file_is_there = there
            reason = f"{self._file} is there"
            if there:
                self._change((*self.reasons, reason), reason)
            elif reason in self.reasons:
                self._change(tuple(other for other in self.reasons if other != reason), f"{self._file} is gone")
        if self._untold:
            self._tell()

    def _look(self) -> bool:
        """Whether the switch file is there; as it was if that can't be seen."""
        problem, there = "", self._file_is_there
        try:
            if self._file is not None:
                os.stat(self._file)
                there = True
        except (FileNotFoundError, NotADirectoryError):
            there = False
        except OSError as error:
            problem = f"{type(error).__name__}: {error}"
        if problem and not self._file_problem:
            logger.warning("nsa-plugin: the switch file can't be looked at (%s): all stays as it is", problem)
        self._file_problem = problem
        return there

    def _change(self, reasons: tuple[str, ...], why: str) -> None:
        was_on, had = self.on, self.reasons
        self.reasons, self.on = reasons, not reasons
        if self.on and not was_on:
            self._untold.append(f"switched on ({why})")
        elif was_on and not self.on:
            self._untold.append(f"switched off: the engine's own path is used ({why})")
        elif len(reasons) < len(had):
            self._untold.append(f"{why}; still off ({'; '.join(reasons)})")

    def _tell(self) -> list[str]:
        """Log what has changed, in that order, and ask what goes on as before: the last to ask asks about what holds."""
        with _telling:
            changed = bool(self._untold)
            while self._untold:
                logger.warning("nsa-plugin: %s", self._untold.popleft())
            left = self.left_as_is(self.on)
            for line in left if changed else ():
                logger.warning("nsa-plugin: %s", line)
            return left


def _before_fork() -> None:
    _changing.acquire()


def _after_fork_in_parent() -> None:
    _changing.release()


def _after_fork_in_child() -> None:
    """Of the threads only this one goes on: none will release what another held."""
    global _changing, _telling
    _changing, _telling = threading.RLock(), threading.RLock()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
