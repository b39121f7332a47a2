"""Runs at start: every attribute of vLLM that this adapter replaces, a row each, with the reason and until when.

A `Part` is a class of vLLM: its rows, what makes the replacements, and what those take for granted. Parts are patched when
vLLM imports their modules. Nothing is patched that is not here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.ledger import LedgerRow
from nsa_plugin.adapters.patches import Part, PatchSet
from nsa_plugin.adapters.probe import warn_if_untested
from nsa_plugin.adapters.vllm import builders, releases
from nsa_plugin.adapters.vllm.builder_rows import BuilderRow, Changes
from nsa_plugin.adapters.vllm.reports import logger
from nsa_plugin.adapters.vllm.v1 import proposer as v1_proposer
from nsa_plugin.adapters.vllm.v2 import choice as v2_choice
from nsa_plugin.adapters.vllm.v2 import fused as v2_fused
from nsa_plugin.adapters.vllm.v2 import step as v2_step
from nsa_plugin.adapters.vllm.v2 import switch as v2_switch
from nsa_plugin.adapters.vllm.v2 import unfused as v2_unfused
from nsa_plugin.adapters.vllm.v2 import updates as v2_updates
from nsa_plugin.adapters.vllm.v2.target import hooks as target_hooks
from nsa_plugin.adapters.vllm.v2.target.hooks import Target

V2, V1 = "Model Runner V2", "Model Runner V1"
NOT_PROPOSED = "not proposed"
AT_CAPTURE = "at capture, recorded in the draft's CUDA graph; at every draft that no graph replays"
PULLS = "https://github.com/vllm-project/vllm/pull"

UPDATE_IN_PLACE = (
    "Without this method vLLM rebuilds the metadata of every group, and replays a graph, for each draft step. With it the "
    "whole draft is one CUDA graph. "
)
IN_PLACE: Mapping[Changes | None, str] = {
    "request map": "The method recomputes the request map of the captured metadata. All else in it is a view of the runner's "
    "persistent buffers, a constant of the captured size, or depends on shapes alone.",
    "request map and plan": "The method recomputes the request map of the captured metadata, and clamps on the device what was "
    "planned on the host before the draft.",
    "lengths and schedule": "The method recomputes lengths and DeepGEMM's schedule.",
    "FlashAttention schedule": "The method makes FlashAttention's schedule anew, by the builder's own function.",
    "FlashMLA schedule": "The method makes FlashMLA's schedule anew, by vLLM's own function (fp8), or leaves that to the step's "
    "first layer (bf16).",
    "nothing": "The method does nothing: all that changes from step to step are values in the runner's own buffers, of which "
    "the metadata has views.",
}
"""By what changes from step to step: what the update in place does."""
FLASHMLA_PULL = f"{PULLS}/54790 (open; report 54369 is open, too)"


def v2_essential() -> tuple[Part, ...]:
    """The fused draft of Model Runner V2: all of it is patched, or nothing. Imports nothing."""
    speculator = releases.speculator()
    return (
        _builder(builders.FLASHMLA_SPARSE, FLASHMLA_PULL, "vLLM's builder has the method"),
        _builder(builders.INDEXER, "vLLM 0.32 has it", "support of vLLM 0.31 is dropped"),
        Part(
            v2_updates.PATH, speculator, v2_choice.needs(speculator), v2_choice.hooks,
            (_row(
                f"{speculator}.{releases.CHOOSE[speculator]}",
                "It chooses the fused draft if every builder says that it can be updated in place. Builders that this adapter "
                "updates say so here, and only if all ranks that share the draft agree.",
                "vLLM fuses the drafts of these builders by itself",
                "at start, when vLLM has made the draft's attention groups",
            ),),
            essential=True,
        ),
        Part(
            v2_step.PATH, speculator, (*releases.step_needs(speculator), *v2_switch.needs(speculator)), v2_fused.hooks,
            _step_rows(speculator), essential=True,
        ),
    )  # fmt: skip


def v2_more() -> tuple[Part, ...]:
    """Further builders of the fused draft, each for itself. Imports nothing."""
    rows = (row for row in (*builders.MORE, *builders.POOLED) if row.changes in v2_updates.UPDATES)
    return tuple(_builder(row, NOT_PROPOSED, "vLLM's builder has the method") for row in rows)


def v2_not_fused() -> Part:
    """Drafts of Model Runner V2 that are not fused. Imports nothing."""
    speculator = releases.speculator()
    row = _row(
        f"{speculator}.{v2_unfused.LOOP}",
        "vLLM's loop rebuilds the metadata of every group for each step. The groups that are understood keep what was built "
        "for the first one, and one launch per step writes what changes.",
        "every draft is fused, or vLLM's loop keeps metadata from step to step",
        "at every draft that is not fused",
    )
    needs = v2_unfused.needs(speculator)
    return Part(v2_unfused.PATH, speculator, needs, v2_unfused.hooks, (row,), essential=False)


def v1_proposals() -> Part:
    """Model Runner V1's draft. Imports nothing."""
    gone_when, runs = "vLLM drops Model Runner V1", "at every draft, once per step"
    return Part(
        v1_proposer.PATH, releases.V1_PROPOSER, releases.V1_NEEDS, v1_proposer.hooks,
        (_row(
            f"{releases.V1_PROPOSER}.{v1_proposer.UPDATE}",
            "vLLM launches a kernel per step that moves positions, slots and lengths on by one token. They are known from the "
            "start: the first step computes those of all, and the others copy theirs to where captured graphs read them.",
            gone_when, runs,
        ),
        _row(
            f"{releases.V1_PROPOSER}.{v1_proposer.BUILD}",
            "vLLM rebuilds the metadata of every group at each step. The groups of known builders keep theirs. The rebuild of "
            "the others is made right: vLLM leaves the request map of the step before the first in place (0.31 to 0.33), so "
            "that sparse attention reads the block table of request 0 for every request; computed tokens likewise.",
            gone_when, runs,
            f"{PULLS}/39632 (closed) proposed to keep metadata; of the stale request map no report was found",
        )),
        essential=True,
    )  # fmt: skip


def v2_target(target: Target | None = None) -> tuple[Part, ...]:
    """The tokens that Model Runner V2 verifies: all of it is patched, or nothing. Without a `target` the parts are to be looked
    at only. Imports nothing."""
    gone_when = "vLLM replays the target's graph without a rebuild of its metadata"
    rows = {
        "capture": (
            "The graph of each uniform batch refreshes, at its start, what vLLM would rebuild on the host before the replay.",
            "at capture",
        ),
        "prepare_attn": (
            "vLLM rebuilds the metadata of every group for every batch. Where a refreshed graph may follow, they are built "
            "when somebody asks for them.",
            "at every batch of the target",
        ),
        "run_fullgraph": (
            "It alone knows the exact graph: before one that is not refreshed vLLM builds, as ever.",
            "at every replay of the target",
        ),
    }
    make = _looked_at if target is None else target.hooks
    return tuple(
        Part(
            target_hooks.PATH, owner, target_hooks.NEEDS[method], make,
            (_row(f"{owner}.{method}", rows[method][0], gone_when, rows[method][1]),), essential=True,
        )
        for method, owner in target_hooks.OWNERS.items()
    )  # fmt: skip


def _looked_at(host: Host, owner: type, live: Callable[[], bool]) -> Mapping[str, Callable[..., Any]]:
    raise AssertionError("these parts were made to be looked at")


def v2_patches(fused: bool = True) -> PatchSet:
    """What is patched of Model Runner V2: all of it, or only the drafts that are not fused."""
    parts = (*v2_essential(), *v2_more()) if fused else ()
    # The set calls it after each essential part; one warning is enough.
    used = functools.cache(lambda: warn_if_untested(logger, "vllm", releases.TESTED))
    return PatchSet(V2, (*parts, v2_not_fused()), logger, used)


def target_patches(target: Target | None = None) -> PatchSet:
    """What is patched around the target of Model Runner V2; without a `target`, to be looked at."""
    return PatchSet(f"{V2}'s target", v2_target(target), logger)


def v1_patches() -> PatchSet:
    """What is patched of Model Runner V1."""
    return PatchSet(V1, (v1_proposals(),), logger)


def _row(target: str, why: str, gone_when: str, runs: str, upstream: str = NOT_PROPOSED) -> LedgerRow:
    return LedgerRow(target, why, upstream, gone_when, runs)


def _builder(row: BuilderRow, upstream: str, gone_when: str) -> Part:
    essential = row in builders.ESSENTIAL
    needs = (*releases.NEEDS, *row.needs) if essential else row.needs
    why = UPDATE_IN_PLACE + IN_PLACE[row.changes]
    return Part(
        f"{v2_updates.PATH} with {row.backend}", row.builder, needs,
        functools.partial(v2_updates.hooks, row),
        (_row(f"{row.builder}.{v2_updates.METHOD}", why, gone_when, AT_CAPTURE, upstream),),
        essential, v2_updates.has_own,
    )  # fmt: skip


def _step_rows(speculator: str) -> tuple[LedgerRow, ...]:
    one_launch = "vLLM writes the metadata of a step in one launch"
    asked = _row(
        f"{speculator}.{releases.UPDATE_STEP}",
        "vLLM asks every attention group to update its metadata. Here that one kernel runs instead, and then the update of "
        "each group that is not understood.",
        one_launch,
        AT_CAPTURE,
    )
    return (
        _row(
            f"{speculator}.{v2_step.GENERATE}",
            "One kernel per step writes slots and metadata. It takes the place of one launch for the slots and of one to six "
            "for each attention group.",
            one_launch,
            AT_CAPTURE,
        ),
        *((asked,) if releases.has_update(speculator) else ()),
        _row(
            f"{speculator}.{v2_switch.BEGIN}",
            "It begins every fused draft. While the plugin is off the draft is drafted unfused, by vLLM alone. If the settings "
            "say so, it is verified and measured.",
            "vLLM can be told to leave the graph of a fused draft alone, and to compute its metadata before",
            "at every draft",
        ),
    )
