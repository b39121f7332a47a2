"""The sglang adapter: probe, install through sglang's `HookRegistry`, undo.

Patches, each to go when sglang itself computes the metadata of a draft once, fresh for every backend
(sglang pull requests 14781, 17554 and 29499 went part of the way; 38213, the reuse of a draft's metadata, is open):

(For 0.5.11 and 0.5.12 read `NativeSparseAttn…` and, for the two methods, `init_forward_metadata_capture_cuda_graph` and
`…_replay_cuda_graph`: `releases.Names`. They go with the support of those releases.)

- `DeepseekSparseAttnMultiStepBackend.init_forward_metadata_out_graph` and `…_in_graph`: one computation for all draft
  backends, before the draft's graph or recorded in it. The shipped code also leaves the DeepGEMM schedule and the top-k
  plan of the first three backends stale when there are more than two.
- `DeepseekSparseAttnMultiStepBackend.init_cuda_graph_state`: one page table for all draft backends instead of one each.
- `DeepseekSparseAttnMultiStepBackend.__init__`: to know what the draft model's configuration says of shared top-k
  indices. It goes when a batch says it for every worker.
- `DeepseekSparseAttnBackend.init_forward_metadata_out_graph` and `…_in_graph`: target verify and draft extend with the
  same engine.
- `MetadataGlueGraph.run` and `is_captured`: sglang's experimental recording of what the methods above launch; see
  `nsa_plugin.adapters.sglang.glue`. They go with it, or when it asks before it records.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nsa_plugin.adapters.base import Host, PathPlan
from nsa_plugin.adapters.probe import installed_version, untested, warn_if_untested, warn_of_untested
from nsa_plugin.adapters.sglang import hooking, releases
from nsa_plugin.adapters.sglang.glue import GlueGraphs
from nsa_plugin.adapters.sglang.owners import MultiStepDraft, SingleBackend
from nsa_plugin.adapters.sglang.paths import Path, not_graph, usable
from nsa_plugin.adapters.sglang.reports import ENGINE, logger


class SglangAdapter:
    """Implements `nsa_plugin.adapters.base.Adapter` for sglang's DSA backends."""

    name = ENGINE
    features = frozenset({"verify", "step_lengths"})

    def __init__(self) -> None:
        self._paths: list[Path] = []
        self._glue = GlueGraphs()
        self._hooks: dict[str, Callable[..., Any]] = {}
        self._left_alone = ""

    def probe(self) -> list[str]:
        """What the installed sglang lacks; empty if it fits."""
        return releases.probe()

    def untested(self) -> list[str]:
        """Hooked functions of the installed sglang with parameters that no tested release has."""
        return untested(releases.every_need())

    def install(self, host: Host) -> list[str]:
        """Hook sglang, completely or not at all; returns the problems that kept it from doing so."""
        if self._hooks:
            return []
        if problems := self.probe():
            return problems
        self._left_alone = releases.lacking("draft extend")
        warn_if_untested(logger, "sglang", releases.TESTED)
        warn_of_untested(logger, releases.every_need())
        names, glue = releases.names(), GlueGraphs()
        paths: dict[str, Path] = {
            names.multi_step: MultiStepDraft(host, glue),
            names.backend: SingleBackend(host, glue),
        }
        hooks = {
            f"{owner}.{method}": replacement
            for owner, path in paths.items()
            for method, replacement in path.hooks().items()
        } | glue.hooks()
        if covered := hooking.covered(hooks):
            return [
                f"looked for sglang's own hooks on {target}, found another patch over them; install this plugin before what "
                "patches it"
                for target in covered
            ]
        self._paths, self._glue, self._hooks = list(paths.values()), glue, hooks
        try:
            hooking.put_on(hooks)
        except Exception:
            self.undo()
            raise
        return []

    def undo(self) -> None:
        """Put back every attribute that was replaced, by identity. Other plugins' hooks on the same methods stay.

        CUDA graphs go on reading the buffers that they were captured with: draft backends that shared buffers go on doing
        so, which sglang's own code fills with equal values.
        """
        if not self._hooks:
            return
        recorded = sorted({path for hooked in self._paths for path in hooked.undo()})
        self._glue.undo()
        if recorded:
            logger.warning(
                "nsa-plugin: %s: CUDA graphs go on with the work that they recorded; a new capture, or a restart, frees them "
                "of it",
                ", ".join(recorded),
            )
        for target in hooking.take_off(self._hooks):
            logger.warning("nsa-plugin: another patch covers the hook of %s: it stays there, and does nothing", target)
        self._paths, self._hooks = [], {}

    def summary(self) -> str:
        """What is accelerated and what is left alone, for one log line."""
        served = ["the multi-step draft", "target verify"] + ([] if self._left_alone else ["draft extend"])
        text = f"sglang {installed_version('sglang')}: metadata of {', '.join(served)} is computed once"
        return text + (f"; draft extend is left alone: {self._left_alone}" if self._left_alone else "")

    def switch(self, on: bool) -> list[str]:
        """What takes more than the next replay. Replays, what graphs recorded included, look at the host's switch."""
        return [f"{ENGINE}: {line}" for path in self._paths for line in path.captured_off()] if on else []

    def paths(self, host: Host) -> list[PathPlan]:
        """What would be done for each path with the host's settings; asks the installed sglang, captures nothing."""
        problems = self.probe()
        problem = problems[0] if problems else ""
        extend = problem or releases.lacking("draft extend")
        needs = {"draft decode": problem, "target verify": problem, "draft extend": extend}
        return [PathPlan(path, *_plan(host, lacking)) for path, lacking in needs.items()]


def _plan(host: Host, problem: str) -> tuple[str, str]:
    """The strategy that would be tried first, and why not a better one."""
    if problem:
        return "off", problem
    asked = host.strategies
    if not asked:
        return "off", "switched off"
    strategies = usable(asked, host.verify)
    if strategies[0] == "graph":
        return "graph", ""
    if asked[0] == "graph" and (why := not_graph()):
        return strategies[0], why
    if host.verify and asked[0] == "graph":
        return strategies[0], "NSA_PLUGIN_VERIFY: what a CUDA graph computes can't be repaired before it is used"
    return strategies[0], "NSA_PLUGIN_STRATEGY asks for it"
