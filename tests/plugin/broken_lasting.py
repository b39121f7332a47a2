"""Adapters for the example's toy engine that break what lasts: new parameters, the switch, memory."""

from __future__ import annotations

import time
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

from toy_adapter import ToyAdapter

# parameters that the adapter does not know


class TakesWhatItKnows(ToyAdapter):
    def _prepare(self, forward: Any, batch: Any) -> None:
        super()._prepare(forward, batch)


class KeepsWhatItDoesNotKnow(ToyAdapter):
    def _capture(self, forward: Any, batch: Any, **keywords: Any) -> None:
        super()._capture(forward, batch)


class KeepsItWhileOff(ToyAdapter):
    def _prepare(self, forward: Any, batch: Any, **keywords: Any) -> None:
        super()._prepare(forward, batch)


class DoesNotSayWhatIsUntested(ToyAdapter):
    def install(self, host: Any) -> list[str]:
        with mock.patch("toy_adapter.warn_of_untested"):
            return super().install(host)


# off


class IgnoresTheSwitch(ToyAdapter):
    def _prepare(self, forward: Any, batch: Any, *arguments: Any, **keywords: Any) -> None:
        prepared = self._plans(forward).get(batch.size)
        if prepared is None:
            self._originals["prepare"](forward, batch, *arguments, **keywords)
        else:
            prepared.run(batch)


class CapturesWhileOff(ToyAdapter):
    def _capture(self, forward: Any, batch: Any, *arguments: Any, **keywords: Any) -> None:
        with mock.patch.object(type(self._host), "strategies", self._host.configured):
            super()._capture(forward, batch, *arguments, **keywords)


class OffAtTheStartForEver(ToyAdapter):
    """Installs for what is on when it is installed."""

    def install(self, host: Any) -> list[str]:
        return super().install(host) if host.on else []


class StaysOff(ToyAdapter):
    off = False

    def switch(self, on: bool) -> list[str]:
        self.off = self.off or not on
        return []

    def _prepare(self, forward: Any, batch: Any, *arguments: Any, **keywords: Any) -> None:
        if self.off:
            self._originals["prepare"](forward, batch, *arguments, **keywords)
        else:
            super()._prepare(forward, batch, *arguments, **keywords)


class LeavesThePagesWhileOff(ToyAdapter):
    """The engine's own code is not asked for all that its graphs read."""

    def _prepare(self, forward: Any, batch: Any, *arguments: Any, **keywords: Any) -> None:
        if self._host.on:
            super()._prepare(forward, batch, *arguments, **keywords)


class AsksTwice(ToyAdapter):
    """Between two looks at the switch it may have changed."""

    def _capture(self, forward: Any, batch: Any, *arguments: Any, **keywords: Any) -> None:
        deadline = time.monotonic() + 0.1
        while time.monotonic() < deadline:
            if self._host.strategies:
                time.sleep(0.001)
                assert self._host.strategies[0]
        super()._capture(forward, batch, *arguments, **keywords)


# memory


class KeepsOldCaptures(ToyAdapter):
    def __init__(self) -> None:
        super().__init__()
        self._kept: list[Any] = []

    def _capture(self, forward: Any, batch: Any, *arguments: Any, **keywords: Any) -> None:
        super()._capture(forward, batch, *arguments, **keywords)
        self._kept.append(forward.captured[batch.size])


class KeepsItsForwards(ToyAdapter):
    """A dictionary with weak keys, whose values hold their keys."""

    def __init__(self) -> None:
        super().__init__()
        self._weak: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def _capture(self, forward: Any, batch: Any, *arguments: Any, **keywords: Any) -> None:
        super()._capture(forward, batch, *arguments, **keywords)
        self._weak[forward] = lambda: forward


BROKEN: list[tuple[str, type[ToyAdapter], str]] = [
    ("parameters", TakesWhatItKnows, "it raised TypeError"),
    ("parameters", KeepsWhatItDoesNotKnow, "capture: the engine's own is called without the new parameter"),
    ("parameters", KeepsItWhileOff, "prepare: the engine's own is called without the new parameter"),
    ("parameters", DoesNotSayWhatIsUntested, "no warning that names"),
    ("switch", IgnoresTheSwitch, "off after the capture: ours runs"),
    ("switch", CapturesWhileOff, "off before the install: ours runs"),
    ("switch", CapturesWhileOff, "off before the capture: ours runs"),
    ("switch", OffAtTheStartForEver, "on again after a new capture: ours does not run"),
    ("switch", StaysOff, "on again: ours does not run"),
    ("switch", LeavesThePagesWhileOff, "off after the capture: round"),
    ("switch", AsksTwice, "in a storm: it raised IndexError"),
    ("memory", KeepsOldCaptures, "more are live after"),
    ("memory", KeepsItsForwards, "Forward is kept"),
]
"""Line of the contract, an adapter that breaks it, and part of what must be said."""
