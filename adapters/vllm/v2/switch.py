"""Runs at every draft: while the plugin is off, or undone, a fused draft is drafted by vLLM's own unfused loop.

A captured draft computes its metadata at every replay. vLLM never rebuilds the metadata of a fused draft, so it has no
values of its own for it. A draft that is switched off therefore leaves its graph alone and takes `_multi_step_decode`. That
rebuilds the metadata for each step and runs the model eagerly: slower, and all vLLM's own.

So does a draft after an error in a schedule that this adapter makes in place: its graph holds the schedule of another step.

A rank that shares its draft with others must not leave the graph alone: collectives inside a graph and outside of it do not
meet. There captured drafts go on until a restart, and `lines` says so.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nsa_plugin.adapters.attached import Attached
from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.probe import Need, missing
from nsa_plugin.adapters.vllm import agreement, releases
from nsa_plugin.adapters.vllm.reports import report
from nsa_plugin.adapters.vllm.v2 import plans
from nsa_plugin.adapters.vllm.v2 import updates as v2_builder

BEGIN = "_fused_multi_step_decode"
UNFUSED = "_multi_step_decode"
PATH = f"{v2_builder.PATH} (Model Runner V2)"


def needs(speculator: str) -> tuple[Need, ...]:
    """What it takes of the speculator at a dotted path."""
    known = ("num_tokens_across_dp", "seq_lens_cpu_upper_bound", "num_speculative_steps")
    parameters = ("num_reqs", "skip_attn", "batch_desc")
    return (
        Need(f"{speculator}.{BEGIN}", parameters, "see a fused draft begin", hooked=True, known=known),
        Need(f"{speculator}.{UNFUSED}", parameters, "draft as vLLM does while switched off"),
    )


@dataclass
class FusedDraft:
    """What is known of a speculator that fuses its draft, or would if the plugin were on.

    Attributes
    ----------
    host : Host
    fuses : bool
        Whether it fuses because of this adapter's updates in place.
    alone : bool
        Whether its rank shares the draft with no other, so that it may leave a captured draft alone.
    refused_while_off : bool
        Whether it does not fuse only because the plugin was off.
    recorded : bool
        Whether a step of this adapter's has run in its draft: its captured drafts may hold it.
    switchable : bool
        Whether all its captured drafts read metadata that vLLM's own code can write, too.
    undone : bool
    scheduled : tuple of AttentionMetadataBuilder
        Those of its builders whose schedules this adapter makes in place.
    """

    host: Host
    fuses: bool
    alone: bool
    refused_while_off: bool = False
    recorded: bool = False
    switchable: bool = False
    undone: bool = False
    scheduled: tuple[Any, ...] = ()

    @property
    def goes_on(self) -> bool:
        """Whether captured drafts go on with this adapter's work, or what it left behind, while it is off."""
        return (self.fuses or self.recorded) and not self.alone and not self.prepared

    @property
    def stale(self) -> bool:
        """Whether a schedule in its captured drafts is that of another step, because an update has failed."""
        return any(v2_builder.stale.get(builder) for builder in self.scheduled)

    @property
    def prepared(self) -> bool:
        """Whether vLLM's own code writes what a captured draft reads, before each replay. Once undone, nobody does."""
        return self.switchable and not self.undone


drafts: Attached[FusedDraft] = Attached("fused_draft")


def builders(speculator: Any) -> list[Any]:
    """The metadata builders of a draft's attention groups."""
    return [group.get_metadata_builder() for group in releases.groups_of(speculator)]


def chosen(
    host: Host, speculator: Any, *, fuses: bool, refused_while_off: bool, scheduled: tuple[Any, ...] = ()
) -> None:
    """Remember what a speculator has just chosen."""
    for owner, name in ((speculator, BEGIN), *((builder, v2_builder.METHOD) for builder in builders(speculator))):
        vars(owner).pop(name, None)  # left by an earlier undo
    drafts.set(speculator, FusedDraft(host, fuses, _alone(speculator), refused_while_off, scheduled=scheduled))


def of(host: Host, speculator: Any) -> FusedDraft:
    """What is known of a speculator; one that chose by itself, without asking this adapter, becomes known now."""
    found = drafts.get(speculator)
    if found is None or found.host is not host:
        found = drafts.set(speculator, FusedDraft(host, False, _alone(speculator)))
    return found


def begin(host: Host, live: Callable[[], bool], original: Callable[..., Any]) -> Callable[..., Any]:
    """In place of `_fused_multi_step_decode`; `original` is vLLM's, or what verifies and measures around it."""

    @functools.wraps(original)
    def fused_multi_step_decode(
        speculator: Any, num_reqs: int, skip_attn: bool, batch_desc: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if live():
            draft = drafts.get(speculator)
            if draft is not None and (not host.on or draft.stale) and _can_leave(draft, batch_desc):
                return unfused(speculator, num_reqs, skip_attn, batch_desc, *args, **kwargs)
        return original(speculator, num_reqs, skip_attn, batch_desc, *args, **kwargs)

    return fused_multi_step_decode


def planned(host: Host, original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, vLLM's `_fused_multi_step_decode`, with the plans that captured drafts need, on or off.

    A vLLM whose method has other parameters has no draft that needs them: see `builders.FLASHINFER_SPARSE_SM90`.
    """
    if missing((releases.FUSED_DRAFT,)):
        return original

    def leave(speculator: Any, error: Exception, *args: Any, **kwargs: Any) -> Any:
        report(host, PATH).fell_back("replay", "graph", error)
        return unfused(speculator, *args, **kwargs)

    return plans.around(original, leave)


def unfused(speculator: Any, num_reqs: int, skip_attn: bool, batch_desc: Any, *args: Any, **kwargs: Any) -> Any:
    """Draft as vLLM does without a fused draft, and without its graph, which holds the whole draft."""
    if batch_desc.cg_mode.name == "FULL":
        none = type(batch_desc.cg_mode).NONE
        batch_desc = dataclasses.replace(batch_desc, cg_mode=none, num_tokens=num_reqs, num_reqs=num_reqs)
    return getattr(speculator, UNFUSED)(num_reqs, skip_attn, batch_desc, *args, **kwargs)


def undo(host: Host) -> list[str]:
    """Make speculators that fuse because of a host draft as vLLM does; returns what goes on, a line each.

    Call it before the patches are undone. What was chosen and captured outlives them: at a new capture the speculator still
    asks its builders for an update in place, so they keep theirs.
    """
    found = [(speculator, draft) for speculator, draft in drafts.items() if draft.host is host and not draft.undone]
    for speculator, draft in found:
        draft.undone = True
        if draft.fuses or draft.recorded:
            for builder in builders(speculator) if draft.fuses else ():
                setattr(builder, v2_builder.METHOD, getattr(builder, v2_builder.METHOD))
            setattr(speculator, BEGIN, functools.partial(_after_undo, draft, speculator))
    return _going_on([draft for _, draft in found])


def lines(host: Host, on: bool) -> list[str]:
    """What goes on as before although a host was switched, one line each."""
    known = [draft for draft in drafts.values() if draft.host is host]
    if not on:
        return _going_on(known)
    if any(draft.refused_while_off for draft in known):
        return [f"{PATH} was chosen while switched off: it takes a restart"]
    return []


def _going_on(known: list[FusedDraft]) -> list[str]:
    if not any(draft.goes_on for draft in known):
        return []
    return [f"{PATH} keeps what its CUDA graphs recorded, because other ranks share the draft; restart"]


def _after_undo(
    draft: FusedDraft, speculator: Any, num_reqs: int, skip_attn: bool, batch_desc: Any, *args: Any, **kwargs: Any
) -> Any:
    drafted = unfused
    if not _can_leave(draft, batch_desc):
        drafted = planned(draft.host, getattr(type(speculator), BEGIN))
    return drafted(speculator, num_reqs, skip_attn, batch_desc, *args, **kwargs)


def _can_leave(draft: FusedDraft, batch_desc: Any) -> bool:
    """Whether a draft may be drafted unfused. Without a graph it always may: it issues the same forwards either way."""
    if batch_desc.cg_mode.name != "FULL":
        return draft.fuses
    return draft.alone and not draft.prepared and (draft.fuses or draft.recorded)


def _alone(speculator: Any) -> bool:
    """Whether no other rank shares the draft of this one."""
    parallel = speculator.vllm_config.parallel_config
    if agreement.is_elastic(speculator) or parallel.data_parallel_size > 1:
        return False
    try:
        return len(agreement.sharing()) == 1
    except Exception:  # a rank that can't tell keeps its graph, as if it were not alone
        return False
