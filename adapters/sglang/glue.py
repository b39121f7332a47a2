"""At every replay of sglang's metadata glue graph (SGLANG_ENABLE_METADATA_GLUE_GRAPH): whose turn it is, sglang's or ours.

For each batch size a glue graph records what `init_forward_metadata_out_graph` launches. From then on it calls that method
no more: verification, the switch and metrics would stop. Where ours prepares, the hooks call the method instead, which
costs one launch or none. While ours is off, a glue graph records and replays sglang's own code.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any
from weakref import WeakValueDictionary

from nsa_plugin.adapters.attached import Attached
from nsa_plugin.adapters.sglang.preparation import Preparation
from nsa_plugin.adapters.sglang.reports import logger


class GlueGraphs:
    """What the hooks of `MetadataGlueGraph` do.

    Its backend may pass the call on to one of ours. Ours therefore learns which keys it prepares when a call arrives
    (`serves`). sglang calls the method itself at least once before it records.
    """

    def __init__(self) -> None:
        self._served: Attached[WeakValueDictionary[Any, Preparation]] = Attached("served")
        self._running: ContextVar[tuple[Any, Any] | None] = ContextVar("running", default=None)
        self._said = False

    def run(
        self,
        original: Callable[..., Any],
        glue: Any,
        attn_backend: Any,
        fb_view: Any,
        key: Any,
        *others: Any,
        **more: Any,
    ) -> None:
        """Stand in for `MetadataGlueGraph.run`: prepare one replay."""
        running = self._running.set((glue, key))
        try:
            if self._is_ours(glue, key):
                attn_backend.init_forward_metadata_out_graph(fb_view)
            else:
                original(glue, attn_backend, fb_view, key, *others, **more)
        finally:
            self._running.reset(running)

    def is_captured(self, original: Callable[..., bool], glue: Any, key: Any, *others: Any, **more: Any) -> bool:
        """Stand in for `MetadataGlueGraph.is_captured`: whether sglang may replay the glue graph right away."""
        return not self._is_ours(glue, key) and original(glue, key, *others, **more)

    def running(self) -> bool:
        """Whether a glue graph is asking: the call may then be under capture."""
        return self._running.get() is not None

    def serves(self, preparation: Preparation) -> None:
        """Remember what prepares the key that is running, if one is."""
        if (running := self._running.get()) is None:
            return
        glue, key = running
        self._served.setdefault(glue, WeakValueDictionary())[key] = preparation
        if not self._said:
            self._said = True
            logger.info(
                "nsa-plugin: sglang's metadata glue graph is not used where the plugin prepares the metadata, which is one "
                "launch or none; it is used while the plugin is off"
            )

    def undo(self) -> None:
        """Forget all glue graphs."""
        self._served.clear()

    def _is_ours(self, glue: Any, key: Any) -> bool:
        served = self._served.get(glue)
        preparation = None if served is None else served.get(key)
        return preparation is not None and preparation.look_at_switch()
