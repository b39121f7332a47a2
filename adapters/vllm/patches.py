"""Attributes of an engine's classes that were replaced, to be put back by identity."""

from __future__ import annotations

from typing import Any

_INHERITED = object()


class Patches:
    """Replaces attributes of classes, and undoes it."""

    def __init__(self) -> None:
        self._replaced: list[tuple[type, str, Any]] = []

    def set(self, owner: type, name: str, value: Any) -> None:
        """Give `owner` the attribute `name`, whether it has one of its own, inherits one, or has none."""
        self._replaced.append((owner, name, vars(owner).get(name, _INHERITED)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put everything back, last first."""
        while self._replaced:
            owner, name, original = self._replaced.pop()
            if original is _INHERITED:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
