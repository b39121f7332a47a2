"""Runs at start: probe, install and undo of the vLLM adapter. What is patched, and why, is in `ledger`."""

from __future__ import annotations

from collections.abc import Sequence

from nsa_plugin.adapters.base import Host, PathPlan
from nsa_plugin.adapters.ledger import LedgerRow
from nsa_plugin.adapters.patches import PatchSet
from nsa_plugin.adapters.probe import installed_version, missing, untested
from nsa_plugin.adapters.vllm import builders, ledger, releases
from nsa_plugin.adapters.vllm.builder_rows import BuilderRow
from nsa_plugin.adapters.vllm.reports import ENGINE, logger
from nsa_plugin.adapters.vllm.v1 import proposer as v1_proposer
from nsa_plugin.adapters.vllm.v2 import switch as v2_switch
from nsa_plugin.adapters.vllm.v2 import unfused as v2_unfused
from nsa_plugin.adapters.vllm.v2.target import hooks as v2_target
from nsa_plugin.adapters.vllm.v2.target import refusals as v2_refusals
from nsa_plugin.adapters.vllm.v2.verified import watch as v2_watch

LEFT_OUT = "it takes {}, which NSA_PLUGIN_STRATEGY leaves out"


class VllmAdapter:
    """Implements `nsa_plugin.adapters.base.Adapter` for the drafts of both of vLLM's model runners."""

    name = ENGINE
    features = frozenset({"verify"})

    def __init__(self) -> None:
        self._patches: tuple[PatchSet, ...] = ()
        self._served: list[str] = []
        self._host: Host | None = None
        self._target: v2_target.Target | None = None

    def probe(self) -> list[str]:
        """What the installed vLLM lacks for Model Runner V2; empty if it fits. Imports what would be patched."""
        return ledger.v2_patches().probe()

    def untested(self) -> list[str]:
        """Hooked functions of the installed vLLM with parameters that no tested release has."""
        parts = (*ledger.v2_essential(), ledger.v2_not_fused(), *ledger.v2_target(), ledger.v1_proposals())
        return untested(tuple(need for part in parts for need in part.needs))

    def install(self, host: Host) -> list[str]:
        """Patch what the strategies allow as soon as vLLM imports it; returns what is wrong already.

        Model Runner V2's fused draft takes `graph`. A draft that is not fused, and Model Runner V1's, take `copy`. What V1
        lacks is logged and stops nothing else.
        """
        if self._served:
            return []
        if installed_version("vllm") == "unknown":
            return ["looked for vLLM, found no such distribution; install vllm 0.28 or later"]
        if "copy" not in host.configured:
            return ["looked for a strategy to try, found none; NSA_PLUGIN_STRATEGY is auto, graph, share or copy"]
        fused = "graph" in host.configured
        target = v2_target.Target(host) if fused else None
        v2, v1 = ledger.v2_patches(fused), ledger.v1_patches()
        self._host, self._target, self._patches = host, target, (v2, v1)
        if problems := v2.install(host):
            return problems
        v1.report(v1.install(host))
        if target is not None:
            refreshed = ledger.target_patches(target)
            self._patches = (*self._patches, refreshed)
            refreshed.report(refreshed.install(host))
            self._served.append(
                "FlashMLA-sparse joins the fused multi-step draft of Model Runner V2, whose steps update their metadata in "
                "one kernel"
            )
            self._served.append("the target's graph refreshes the metadata of the tokens that it verifies")
        self._served.append("steps of its drafts that are not fused keep the metadata of the first one")
        self._served.append("Model Runner V1's draft steps are computed at once")
        return []

    def undo(self) -> None:
        """Put back every attribute, by identity. What goes on in captured drafts is logged."""
        for line in () if self._host is None else v2_switch.undo(self._host):
            logger.warning("nsa-plugin: undone: %s", line)
        if self._target is not None:
            self._target.undo()
        for patches in reversed(self._patches):
            patches.undo()
        self._patches, self._served, self._target = (), [], None

    def ledger(self) -> Sequence[LedgerRow]:
        """Every attribute that `install` replaces in the installed engine, a row each."""
        sets = self._patches or (ledger.v2_patches(), ledger.v1_patches(), ledger.target_patches())
        return [row for patches in sets for row in patches.ledger()]

    def summary(self) -> str:
        """What is accelerated and what is left to the engine, for one log line."""
        return f"vllm {installed_version('vllm')}: {'; '.join(self._served)}; other backends are left to vLLM"

    def switch(self, on: bool) -> list[str]:
        """What goes on as before: drafts of Model Runner V2 that other ranks share, whose metadata CUDA graphs compute."""
        lines = [] if self._host is None else v2_switch.lines(self._host, on)
        return [f"{ENGINE}: {line}" for line in (*lines, *(() if self._target is None else self._target.lines(on)))]

    def paths(self, host: Host) -> list[PathPlan]:
        """What would be done with the host's settings, and the attention backends that are left to vLLM."""
        plans: list[PathPlan] = []
        target = [problem] if (problem := v2_refusals.unverified(host)) else ledger.target_patches().probe()
        for path, needs, strategy, better, problems in (
            (v2_switch.PATH, "graph", *_plan_v2(host), self.probe()),
            (f"{v2_unfused.PATH} ({ledger.V2})", "copy", "copy", "vLLM captures one step", _plan_unfused(host)),
            (v1_proposer.PATH, "copy", "copy", "vLLM captures no whole draft there", ledger.v1_patches().probe()),
            (f"{v2_target.PATH} ({ledger.V2})", "graph", "graph", "", target),
            (f"{v2_target.FIRST_PASS} ({ledger.V2})", "graph", "graph", v2_target.READS, target),
        ):
            if needs not in host.strategies:
                plans.append(PathPlan(path, "off", LEFT_OUT.format(needs)))
            elif problems:
                plans.append(PathPlan(path, "off", problems[0]))
            else:
                plans.append(PathPlan(path, strategy, better))
        rows = (*builders.SCHEDULED_DENSE, *builders.POOLED, *builders.REBUILT)
        return [*plans, *(plan for row in rows for plan in _plan_row(host, row))]


def _plan_v2(host: Host) -> tuple[str, str]:
    """What Model Runner V2's drafts would get, and why not more."""
    if not host.verify:
        return "graph", ""
    if problems := missing(releases.WATCH_NEEDS):
        return "graph", f"NSA_PLUGIN_VERIFY can't be had: {problems[0]}"
    if v2_watch.verified(host) == "graph":
        return "graph", "NSA_PLUGIN_VERIFY: each step's copy of what it read is compared after the draft"
    return "copy", "NSA_PLUGIN_VERIFY: what a CUDA graph computes can't be repaired before it is used"


def _plan_row(host: Host, row: BuilderRow) -> list[PathPlan]:
    """What the fused draft would do for a builder of a row. Settings of the builder itself are known at the choice only."""
    why = row.left_alone or ("" if "graph" in host.strategies else LEFT_OUT.format("graph"))
    why = why or row.left_by(host) or row.refused(None)
    if why and row.stale:
        why = f"{row.stale}; {why}"
    strategy = "off" if why else "graph"
    return [PathPlan(f"draft decode with {name}", strategy, why, row.gpus) for name in row.backends]


def _plan_unfused(host: Host) -> list[str]:
    """What is in the way of Model Runner V2's drafts that are not fused."""
    return [v2_unfused.UNVERIFIED] if host.verify else missing(v2_unfused.needs(releases.speculator()))
