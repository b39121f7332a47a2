"""At start and at undo: attributes of an engine's classes are replaced, and put back by identity."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("vllm.plugins.nsa_plugin")
_INHERITED = object()


class Patches:
    """Replaces attributes of classes, and puts them back.

    Attributes
    ----------
    live : bool
        False after `undo`. A replacement that somebody has wrapped is still called then, and only passes its calls on.
    """

    def __init__(self) -> None:
        self.live = True
        self._replaced: list[tuple[type, str, Any, Any]] = []

    def set(self, owner: type, name: str, value: Any) -> None:
        """Give `owner` the attribute `name`. It may have one of its own, inherit one, or have none."""
        self._replaced.append((owner, name, vars(owner).get(name, _INHERITED), value))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put everything back, last first. What somebody else has replaced since stays, and a warning names it."""
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
