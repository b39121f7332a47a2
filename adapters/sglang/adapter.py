"""The sglang adapter: probe, install through sglang's `HookRegistry`, undo.

Patches, each to go when sglang itself computes the metadata of a draft once, fresh for every backend
(sglang pull requests 14781, 17554 and 29499 went part of the way; 38213, the reuse of a draft's metadata, is open):

(For 0.5.11 and 0.5.12 read `NativeSparseAttn…` and, for the two methods, `init_forward_metadata_capture_cuda_graph` and
`…_replay_cuda_graph`: `capabilities.Names`. They go with the support of those releases.)

- `DeepseekSparseAttnMultiStepBackend.init_forward_metadata_out_graph` and `…_in_graph`: one computation for all draft
  backends, before the draft's graph or recorded in it. The shipped code also leaves the DeepGEMM schedule and the top-k
  plan of the first three backends stale when there are more than two.
- `DeepseekSparseAttnMultiStepBackend.init_cuda_graph_state`: one page table for all draft backends instead of one each.
- `DeepseekSparseAttnBackend.init_forward_metadata_out_graph` and `…_in_graph`: target verify and draft extend with the
  same engine.
"""

from __future__ import annotations

import inspect
import logging
import pkgutil
from typing import Any

from nsa_plugin.adapters.base import Host, PathPlan
from nsa_plugin.adapters.probe import installed_version, untested, warn_if_untested, warn_of_untested
from nsa_plugin.adapters.sglang import capabilities
from nsa_plugin.adapters.sglang.paths import MultiStepDraft, Path, SingleBackend, not_graph, usable
from nsa_plugin.adapters.sglang.preparation import ENGINE

logger = logging.getLogger("sglang.srt.plugins.nsa_plugin")


class SglangAdapter:
    """Implements `nsa_plugin.adapters.base.Adapter` for sglang's DSA backends."""

    name = ENGINE
    features = frozenset({"verify", "step_lengths"})

    def __init__(self) -> None:
        self._paths: list[Path] = []
        self._hooks: dict[str, Any] = {}
        self._left_alone = ""

    def probe(self) -> list[str]:
        """What the installed sglang lacks; empty if it fits."""
        return capabilities.probe()

    def untested(self) -> list[str]:
        """Hooked functions of the installed sglang with parameters that no tested release has."""
        return untested(capabilities.names().needs())

    def install(self, host: Host) -> list[str]:
        """Hook sglang, completely or not at all; returns the problems that kept it from doing so."""
        if self._hooks:
            return []
        if problems := self.probe():
            return problems
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType, _current_plugin_source

        self._left_alone = capabilities.lacking("draft extend")
        warn_if_untested(logger, "sglang", capabilities.TESTED)
        warn_of_untested(logger, capabilities.names().needs())
        names = capabilities.names()
        paths: dict[str, Path] = {names.multi_step: MultiStepDraft(host), names.backend: SingleBackend(host)}
        self._paths = list(paths.values())
        try:
            for owner, path in paths.items():
                for method, replacement in path.hooks().items():
                    target = f"{owner}.{method}"
                    _take_hooks_off(target)
                    self._hooks[target] = replacement
                    HookRegistry.register(target, replacement, HookType.AROUND)
            if _current_plugin_source.get() is None:  # else load_plugins() applies the hooks of all plugins together
                HookRegistry.apply_hooks()
        except Exception:
            self.undo()
            raise
        return []

    def undo(self) -> None:
        """Put back every attribute that was replaced, by identity. Other plugins' hooks on the same methods stay.

        Page tables that were given back stay shared: all draft backends hold equal values in sglang's own code too.
        """
        if not self._hooks:
            return
        from sglang.srt.plugins.hook_registry import HookRegistry

        for path in self._paths:
            path.undo()
        for target, replacement in self._hooks.items():
            _take_hooks_off(target)
            others = [entry for entry in HookRegistry._hooks.pop(target, []) if entry[1] is not replacement]
            if others:
                HookRegistry._hooks[target] = others
        HookRegistry.apply_hooks()
        self._paths, self._hooks = [], {}

    def summary(self) -> str:
        """What is accelerated and what is left alone, for one log line."""
        served = ["the multi-step draft", "target verify"] + ([] if self._left_alone else ["draft extend"])
        text = f"sglang {installed_version('sglang')}: metadata of {', '.join(served)} is computed once"
        return text + (f"; draft extend is left alone: {self._left_alone}" if self._left_alone else "")

    def switch(self, on: bool) -> list[str]:
        """Use sglang's own path from the next replay on, or ours again; returns what goes on as before."""
        return [f"{ENGINE}: {line}" for path in self._paths for line in path.switch(on)]

    def paths(self, host: Host) -> list[PathPlan]:
        """What would be done for each path with the host's settings; asks the installed sglang, captures nothing."""
        problems = self.probe()
        problem = problems[0] if problems else ""
        extend = problem or capabilities.lacking("draft extend")
        needs = {"draft decode": problem, "target verify": problem, "draft extend": extend}
        return [PathPlan(path, *_plan(host, lacking)) for path, lacking in needs.items()]


def _plan(host: Host, problem: str) -> tuple[str, str]:
    """The strategy that would be tried first, and why not a better one."""
    if problem:
        return "off", problem
    if not host.strategies:
        return "off", "switched off"
    strategies = usable(host)
    if strategies[0] == "graph":
        return "graph", ""
    if host.strategies[0] == "graph" and (why := not_graph()):
        return strategies[0], why
    if host.verify and host.strategies[0] == "graph":
        return strategies[0], "NSA_PLUGIN_VERIFY: what a CUDA graph computes can't be repaired before it is used"
    return strategies[0], "NSA_PLUGIN_STRATEGY asks for it"


def _take_hooks_off(target: str) -> None:
    """Restore sglang's own method, if hooks have been applied to it, so that they can be applied anew."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    if target not in HookRegistry._patched:
        return
    owner, _, name = target.rpartition(".")
    cls = pkgutil.resolve_name(owner)
    original = inspect.unwrap(cls.__dict__[name])
    if any(base.__dict__.get(name) is original for base in cls.__mro__[1:]):
        delattr(cls, name)  # it was inherited
    else:
        setattr(cls, name, original)
    HookRegistry._patched.discard(target)
