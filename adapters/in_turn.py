"""Several refreshes as one: what a plan takes as `derive`."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def in_turn(calls: Sequence[Callable[[], None]]) -> Callable[[], None] | None:
    """What makes several calls one after the other, as `derive` of a plan; None without any."""
    if len(calls) < 2:
        return calls[0] if calls else None

    def derive() -> None:
        for call in calls:
            call()

    return derive
