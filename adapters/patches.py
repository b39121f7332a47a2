"""Attributes of an engine's classes that were replaced, to be put back by identity."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("vllm.plugins.nsa_plugin")
_INHERITED = object()


class Patches:
    """Replaces attributes of classes, and undoes it.

    Attributes
    ----------
    live : bool
        False once undone: a replacement that somebody has wrapped in the meantime is still called, and then only passes
        its calls on.
    """

    def __init__(self) -> None:
        self.live = True
        self._replaced: list[tuple[type, str, Any, Any]] = []

    def set(self, owner: type, name: str, value: Any) -> None:
        """Give `owner` the attribute `name`, whether it has one of its own, inherits one, or has none."""
        self._replaced.append((owner, name, vars(owner).get(name, _INHERITED), value))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put everything back, last first, but for what somebody else has replaced since: theirs stays, and is named."""
        self.live = False
        while self._replaced:
            owner, name, original, value = self._replaced.pop()
            if vars(owner).get(name) is not value:
                logger.warning(
                    "nsa-plugin: %s.%s was patched by somebody else too, after this plugin: theirs stays, and this "
                    "plugin's, if they call it, does nothing of its own; undo theirs first to have vLLM's own back",
                    owner.__qualname__,
                    name,
                )
            elif original is _INHERITED:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
