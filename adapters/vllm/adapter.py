"""The vLLM adapter: probe, install, undo.

Patches of Model Runner V2, each to go when vLLM has it itself:

- `FlashMLASparseMetadataBuilder`, what Hopper gets for DSA models, has no `update_draft_decode_metadata`. Model Runner V2
  then rebuilds the metadata of every group, and replays a graph, for each draft step. With the method, which only has to
  recompute the request map of the captured metadata, the whole draft becomes one CUDA graph. Everything else in that
  metadata is a view of the runner's persistent buffers, a constant of the captured size, or depends on shapes alone.
  (Upstream report 54369 and pull request 54790, both open.)
- `DeepseekV32IndexerMetadataBuilder` of vLLM 0.28 to 0.31 lacks it too: lengths and DeepGEMM's schedule are recomputed.
  (vLLM 0.32 has it.)
- `TargetDependentARSpeculator._configure_decode_metadata_update` (`_configure_fused_multi_step_decode` until 0.31), which
  chooses the fused draft: all ranks choose alike (see `v2_choice`).
- `TargetDependentARSpeculator._generate_fused_drafts` and `_update_draft_decode_metadata`: one kernel per step of that graph
  in place of one launch for the slots and one to six for each attention group (see `v2_step`; not proposed upstream).
- `TargetDependentARSpeculator._fused_multi_step_decode`: to see each draft begin, which is drafted unfused while the
  plugin is off (see `v2_switch`), and verified or measured if the settings say so (see `v2_watch`).
- `_multi_step_decode` of the same class, where vLLM does not fuse: see `v2_copy` (not proposed upstream).

Model Runner V1's draft is patched by `v1_proposer`.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nsa_plugin.adapters.base import Host, PathPlan
from nsa_plugin.adapters.patches import Patches
from nsa_plugin.adapters.probe import Need, installed_version, missing, untested, warn_if_untested, warn_of_untested
from nsa_plugin.adapters.vllm import backends, in_place, releases
from nsa_plugin.adapters.vllm.in_place import InPlace
from nsa_plugin.adapters.vllm.lazy import WhenImported
from nsa_plugin.adapters.vllm.reports import ENGINE, logger
from nsa_plugin.adapters.vllm.v1 import proposer as v1_proposer
from nsa_plugin.adapters.vllm.v1.proposer import V1Draft
from nsa_plugin.adapters.vllm.v2 import choice as v2_choice
from nsa_plugin.adapters.vllm.v2 import fused
from nsa_plugin.adapters.vllm.v2 import switch as v2_switch
from nsa_plugin.adapters.vllm.v2 import unfused as v2_copy
from nsa_plugin.adapters.vllm.v2 import updates as v2_builder
from nsa_plugin.adapters.vllm.v2.target import hooks as v2_target


@dataclass(frozen=True)
class Part:
    """A class of Model Runner V2 that is patched as soon as vLLM imports its module."""

    module: str
    owner: str
    needs: tuple[Need, ...]
    hooks: Callable[[Host, type, Callable[[], bool]], Mapping[str, Callable[..., Any]]]


def v2_parts() -> tuple[Part, ...]:
    """All of them are patched, or none. Imports nothing."""
    speculator = releases.speculator()
    builders = (_part(row, releases.NEEDS) for row in in_place.ESSENTIAL)
    module = speculator.rpartition(".")[0]
    choice = Part(module, speculator, v2_choice.needs(speculator), v2_choice.hooks)
    needs = (*releases.step_needs(speculator), *v2_switch.needs(speculator))
    return (*builders, choice, Part(module, speculator, needs, fused.hooks))


def _part(row: InPlace, needs: tuple[Need, ...] = ()) -> Part:
    return Part(row.module, row.builder, (*needs, *row.needs), functools.partial(v2_builder.hooks, row))


class VllmAdapter:
    """Implements `nsa_plugin.adapters.base.Adapter` for the drafts of both of vLLM's model runners."""

    name = ENGINE
    features = frozenset({"verify"})

    def __init__(self) -> None:
        self._watches: list[WhenImported] = []
        self._patches = Patches()
        self._v1 = V1Draft()
        self._served: list[str] = []
        self._host: Host | None = None
        self._target: v2_target.Target | None = None

    def probe(self) -> list[str]:
        """What the installed vLLM lacks for Model Runner V2; empty if it fits. Imports what would be patched."""
        return missing(tuple(need for part in v2_parts() for need in part.needs))

    def untested(self) -> list[str]:
        """Hooked functions of the installed vLLM with parameters that no tested release has."""
        hooked = (need for part in v2_parts() for need in part.needs)
        unfused = v2_copy.needs(releases.speculator())
        return untested((*hooked, *unfused, *v2_target.needs(), *releases.V1_NEEDS))

    def install(self, host: Host) -> list[str]:
        """Patch what the strategies allow as soon as vLLM imports it; returns what is wrong already.

        Model Runner V2's fused draft takes `graph`, one that is not fused and Model Runner V1's `copy`. What V1 lacks is logged and stops nothing else.
        """
        if self._served:
            return []
        if installed_version("vllm") == "unknown":
            return ["looked for vLLM, found no such distribution; install vllm 0.28 or later"]
        if "copy" not in host.configured:
            return ["looked for a strategy to try, found none; NSA_PLUGIN_STRATEGY is auto, graph, share or copy"]
        self._host = host
        problems: list[str] = []
        if "graph" in host.configured:
            warned: list[bool] = []
            for part in v2_parts():
                self._watches.append(
                    WhenImported(part.module, lambda part=part: self._patch(host, part, problems, warned))  # type: ignore[misc]
                )
            if problems:
                self._leave_v2_alone()
                return problems
            for row in in_place.MORE:
                path = f"draft decode with {row.backend}"
                patch = functools.partial(self._patch_more, host, path, _part(row))
                self._watches.append(WhenImported(row.module, patch))
            self._target = v2_target.Target(host)
            for method, owner in v2_target.OWNERS.items():
                part = Part(v2_target.MODULE, owner, v2_target.NEEDS[method], self._target.hooks)
                patch = functools.partial(self._patch_more, host, v2_target.PATH, part)
                self._watches.append(WhenImported(part.module, patch))
            self._served.append(
                "FlashMLA-sparse joins the fused multi-step draft of Model Runner V2, whose steps update their metadata in "
                "one kernel"
            )
            self._served.append("the target's graph refreshes the metadata of the tokens that it verifies")
        self._served.append("steps of its drafts that are not fused keep the metadata of the first one")
        speculator = releases.speculator()
        part = Part(speculator.rpartition(".")[0], speculator, v2_copy.needs(speculator), v2_copy.hooks)
        self._watches.append(WhenImported(part.module, functools.partial(self._patch_more, host, v2_copy.PATH, part)))
        self._v1.install(host)
        self._served.append("Model Runner V1's draft steps are computed at once")
        return []

    def undo(self) -> None:
        """Put back every attribute, by identity. What goes on in captured drafts is logged."""
        for line in () if self._host is None else v2_switch.undo(self._host):
            logger.warning("nsa-plugin: undone: %s", line)
        if self._target is not None:
            self._target.undo()
        self._v1.undo()
        self._leave_v2_alone()
        self._served = []

    def summary(self) -> str:
        """What is accelerated and what is left alone, for one log line."""
        return f"vllm {installed_version('vllm')}: {'; '.join(self._served)}; other backends are left alone"

    def switch(self, on: bool) -> list[str]:
        """What goes on as before: drafts of Model Runner V2 that other ranks share, whose metadata CUDA graphs compute."""
        lines = [] if self._host is None else v2_switch.lines(self._host, on)
        return [f"{ENGINE}: {line}" for line in (*lines, *(() if self._target is None else self._target.lines(on)))]

    def paths(self, host: Host) -> list[PathPlan]:
        """What would be done with the host's settings, and the attention backends that are left to vLLM."""
        plans = []
        for path, needs, strategy, better, problems in (
            (f"{v2_builder.PATH} (Model Runner V2)", "graph", *_plan_v2(host), self.probe()),
            (f"{v2_copy.PATH} (Model Runner V2)", "copy", "copy", "vLLM captures one step", _plan_unfused(host)),
            (v1_proposer.PATH, "copy", "copy", "vLLM captures no whole draft there", self._v1.probe()),
            (f"{v2_target.PATH} (Model Runner V2)", "graph", "graph", "", missing(v2_target.needs())),
            (
                f"{v2_target.FIRST_PASS} (Model Runner V2)",
                "graph",
                "graph",
                v2_target.READS,
                missing(v2_target.needs()),
            ),
        ):
            if needs not in host.strategies:
                plans.append(PathPlan(path, "off", f"it takes {needs}, which NSA_PLUGIN_STRATEGY leaves out"))
            elif problems:
                plans.append(PathPlan(path, "off", problems[0]))
            else:
                plans.append(PathPlan(path, strategy, better))
        return plans + [PathPlan(f"draft decode with {name}", "off", why) for name, why in backends.LACKING_HOOK]

    def _patch_more(self, host: Host, path: str, part: Part) -> None:
        """Patch what other parts do without; what this vLLM lacks concerns this path alone."""
        try:
            problems = missing(part.needs)
            if not problems:
                self._set(host, part)
        except Exception as error:
            logger.exception("nsa-plugin: patching %s failed", part.owner)
            problems = [str(error)]
        if problems:
            logger.info("nsa-plugin: %s: left as it is: %s", path, "; ".join(problems))

    def _set(self, host: Host, part: Part) -> None:
        warn_of_untested(logger, part.needs)
        owner, patches = pkgutil.resolve_name(part.owner), self._patches
        for name, replacement in part.hooks(host, owner, lambda: patches.live).items():
            patches.set(owner, name, replacement)

    def _leave_v2_alone(self) -> None:
        for watch in self._watches:
            watch.cancel()
        self._watches = []
        self._patches.undo()
        self._patches = Patches()

    def _patch(self, host: Host, part: Part, problems: list[str], warned: list[bool]) -> None:
        """Patch one part; what is wrong goes to `problems`, takes back the others and keeps later ones from starting."""
        if problems:
            return
        try:
            problems += missing(part.needs)
            if not problems:
                self._set(host, part)
        except Exception as error:
            logger.exception("nsa-plugin: patching %s failed", part.owner)
            problems.append(str(error))
        if problems:
            self._leave_v2_alone()
            if self._served:  # else install() returns it, for whoever called it to log
                logger.warning("nsa-plugin: Model Runner V2 is left as it is: %s", "; ".join(problems))
        elif not warned:
            warned.append(True)
            warn_if_untested(logger, "vllm", releases.TESTED)


def _plan_v2(host: Host) -> tuple[str, str]:
    """What Model Runner V2's drafts would get, and why not more."""
    if not host.verify:
        return "graph", ""
    if problems := missing(releases.WATCH_NEEDS):
        return "graph", f"NSA_PLUGIN_VERIFY can't be had: {problems[0]}"
    return "copy", "NSA_PLUGIN_VERIFY: what a CUDA graph computes can't be repaired before it is used"


def _plan_unfused(host: Host) -> list[str]:
    """What is in the way of Model Runner V2's drafts that are not fused."""
    return [v2_copy.UNVERIFIED] if host.verify else missing(v2_copy.needs(releases.speculator()))
