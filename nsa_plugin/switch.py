"""`Switch`: on or off, and why. It alone decides whether the engines' own paths are used.

Any thread may switch at any time. Switching sets `Switch.on`; readers read that once per decision.
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
"""Held while reasons change, and across a fork, so that no child inherits half a change. No foreign code runs under it."""
_telling = threading.RLock()
"""Held while changes are logged, one after the other."""


class Switch:
    """On as long as there is no reason to be off.

    Parameters
    ----------
    file : Path or None
        Switch file. It is a reason to be off while it exists; see `watch_switch_file`.

    Attributes
    ----------
    on : bool
        Whether the plugin's paths are used; else the engines' own.
    reasons : tuple of str
        Why it is off, the oldest reason first; empty while on.
    """

    def __init__(self, file: Path | None) -> None:
        self.on = True
        self.reasons: tuple[str, ...] = ()
        self._file = file
        self._file_is_there = False
        self._file_problem = ""
        self._untold: deque[str] = deque()

    def left_as_is(self, on: bool) -> list[str]:
        """Work that a switch does not reach without a restart or a new capture, one line each."""
        return []

    def switch(self, on: bool, why: str) -> list[str]:
        """Switch from the next replay on: off adds the reason `why`; on removes all reasons.

        Returns `left_as_is(on)`.
        """
        with _changing:
            self._change(() if on else tuple(dict.fromkeys((*self.reasons, why))), why)
        return self._tell()

    def watch_switch_file(self) -> None:
        """Look at the switch file now and then once a second, if the settings name one."""
        if self._file is not None:
            self.look_at_switch_file()
            background.every_second(self.look_at_switch_file)

    def look_at_switch_file(self) -> None:
        """Add a reason when the switch file appears; remove it when the file goes away.

        While the file stays as it is, nothing changes: a `switch` since then holds.
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
        """Whether the switch file exists. If a look fails, the answer stays what it was."""
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
        """Log the changes in their order; return (and log, if anything changed) what is left as it is.

        `left_as_is` is asked about `self.on` as it is then: of several switches at a time, the last one's answer holds.
        """
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
    """Make new locks: threads that held the old ones do not exist in the child."""
    global _changing, _telling
    _changing, _telling = threading.RLock(), threading.RLock()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
