"""The sglang adapter: probe, install through sglang's `HookRegistry`, undo.

Patches, each to go when sglang itself computes the metadata of a draft once, fresh for every backend
(sglang pull requests 14781, 17554 and 29499 went part of the way; 38213, the reuse of a draft's metadata, is open):

- `DeepseekSparseAttnMultiStepBackend.init_forward_metadata_out_graph`: one computation for all draft backends. The
  shipped code also leaves the DeepGEMM schedule and the top-k plan of the first three stale when there are more than two.
- `DeepseekSparseAttnBackend.init_forward_metadata_out_graph`: target verify and draft extend with the same engine.
"""

from __future__ import annotations

import inspect
import logging
import pkgutil
from typing import Any

from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.sglang import capabilities
from nsa_plugin.adapters.sglang.paths import ENGINE, MultiStepDraft, Path, SingleBackend

logger = logging.getLogger("sglang.srt.plugins.nsa_plugin")


class SglangAdapter:
    """Implements `nsa_plugin.adapters.base.Adapter` for sglang's DSA backends."""

    name = ENGINE

    def __init__(self) -> None:
        self._paths: dict[str, Path] = {}
        self._hooks: dict[str, Any] = {}
        self._originals: dict[str, Any] = {}
        self._left_alone: list[str] = []

    def probe(self) -> list[str]:
        """What the installed sglang lacks; empty if it fits."""
        return capabilities.probe()

    def install(self, host: Host) -> list[str]:
        """Hook sglang, completely or not at all; returns the problems that kept it from doing so."""
        if self._hooks:
            return []
        if problems := self.probe():
            return problems
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType, _current_plugin_source

        self._left_alone = capabilities.missing(capabilities.SINGLE_NEEDS)
        version = capabilities.installed_version()
        if version not in capabilities.TESTED:
            logger.warning(
                "nsa-plugin: sglang %s is not among the tested releases (%s); it has all that is needed and is used",
                version,
                ", ".join(capabilities.TESTED),
            )
        self._paths = {capabilities.MULTI_STEP: MultiStepDraft(host)}
        if not self._left_alone:
            self._paths[capabilities.BACKEND] = SingleBackend(host)
        try:
            for owner, path in self._paths.items():
                target = f"{owner}.{capabilities.OUT_GRAPH}"
                self._originals[owner] = self._bare(owner)
                self._hooks[target] = _hook(path)
                HookRegistry.register(target, self._hooks[target], HookType.AROUND)
            if _current_plugin_source.get() is None:  # else load_plugins() applies the hooks of all plugins together
                HookRegistry.apply_hooks()
        except Exception:
            self.undo()
            raise
        return []

    def undo(self) -> None:
        """Put back every attribute that was replaced, by identity. Other plugins' hooks on the same methods stay."""
        if not self._hooks:
            return
        from sglang.srt.plugins.hook_registry import HookRegistry

        for path in self._paths.values():
            path.undo()
        for owner in self._originals:
            target = f"{owner}.{capabilities.OUT_GRAPH}"
            self._bare(owner)
            others = [entry for entry in HookRegistry._hooks.pop(target, []) if entry[1] is not self._hooks.get(target)]
            if others:
                HookRegistry._hooks[target] = others
        HookRegistry.apply_hooks()
        self._paths, self._hooks, self._originals = {}, {}, {}

    def _bare(self, owner: str) -> Any:
        """sglang's own method, with the hooks of all plugins taken off it until they are applied again."""
        from sglang.srt.plugins.hook_registry import HookRegistry

        cls, target = pkgutil.resolve_name(owner), f"{owner}.{capabilities.OUT_GRAPH}"
        method = cls.__dict__[capabilities.OUT_GRAPH]
        if target in HookRegistry._patched:
            method = self._originals.get(owner) or inspect.unwrap(method)
            setattr(cls, capabilities.OUT_GRAPH, method)
            HookRegistry._patched.discard(target)
        return method

    def summary(self) -> str:
        """What is accelerated and what is left alone, for one log line."""
        served = ["the multi-step draft"] + ([] if self._left_alone else ["target verify", "draft extend"])
        text = f"sglang {capabilities.installed_version()}: metadata of {', '.join(served)} is computed once"
        return text + (
            f"; target verify and draft extend are left alone: {self._left_alone[0]}" if self._left_alone else ""
        )


def _hook(path: Path) -> Any:
    def hook(original: Any, *args: Any, **kwargs: Any) -> None:
        path(original, *args, **kwargs)

    return hook
