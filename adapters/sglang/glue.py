"""sglang's metadata glue graph (0.5.20 and later, SGLANG_ENABLE_METADATA_GLUE_GRAPH) beside the plugin.

For each batch size it records what `init_forward_metadata_out_graph` launches and from then on calls that method no
more: verification, the switch and metrics would stop. Where ours prepares, the method is called instead, which costs
one launch or none; a glue graph only ever records, and replays, sglang's own code, while ours is off.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any
from weakref import WeakValueDictionary

from nsa_plugin.adapters.attached import Attached
from nsa_plugin.adapters.sglang.preparation import Preparation
from nsa_plugin.adapters.sglang.releases import GLUE_GRAPH, lacking
from nsa_plugin.adapters.sglang.reports import logger


class GlueGraphs:
    """The hooks of `MetadataGlueGraph`.

    Which of its keys ours prepares is not known beforehand, since its backend may pass the call on to one of ours; it is
    seen when the call arrives (`serves`). sglang calls the method itself at least once before it records.
    """

    def __init__(self) -> None:
        self._served: Attached[WeakValueDictionary[Any, Preparation]] = Attached("served")
        self._running: ContextVar[tuple[Any, Any] | None] = ContextVar("running", default=None)
        self._said = False

    def hooks(self) -> dict[str, Callable[..., Any]]:
        """Targets to what stands in for them; none in releases without a glue graph."""
        if lacking("glue graph"):
            return {}
        found: dict[str, Callable[..., Any]] = {f"{GLUE_GRAPH}.run": self.run}
        if hasattr(pkgutil.resolve_name(GLUE_GRAPH), "is_captured"):  # 0.5.23: sglang may replay it without `run`
            found[f"{GLUE_GRAPH}.is_captured"] = self.is_captured
        return found

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
        """Stand in for `MetadataGlueGraph.is_captured`: whether sglang may replay it right away."""
        return not self._is_ours(glue, key) and original(glue, key, *others, **more)

    def running(self) -> bool:
        """Whether a glue graph is asking, so that the call may be under capture."""
        return self._running.get() is not None

    def serves(self, preparation: Preparation) -> None:
        """Remember who prepares the key that is running, if one is."""
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
