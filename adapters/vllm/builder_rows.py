"""Runs at start, at capture and where asked: what a row of the table of vLLM's metadata builders says.

The rows are in `builders`.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nsa_plugin.adapters.base import Host, unproved
from nsa_plugin.adapters.probe import Need, missing
from nsa_plugin.adapters.vllm.v1.kept import Keeper

Changes = Literal[
    "request map",
    "request map and plan",
    "lengths and schedule",
    "tail slots",
    "FlashAttention schedule",
    "FlashMLA schedule",
    "nothing",
    "other",
]
"""What a builder derives from the lengths or from the batch, and so has to be recomputed at each draft step. All else in
its metadata is a view of the runner's buffers, a constant of the captured size, or depends on shapes alone. "other" is not
understood: vLLM's own code does it."""
Replaced = Literal["update", "rebuild"]
"""What of vLLM's own would run at a draft step without this adapter: a builder's update in place, or its `build`."""


@dataclass(frozen=True)
class Refusal:
    """A setting in which a builder is left to vLLM.

    Attributes
    ----------
    why : str
        For the log.
    holds : callable
        `holds(builder)`: whether the builder has that setting.
    """

    why: str
    holds: Callable[[Any], bool]


def refusal(refusals: tuple[Refusal, ...], holder: Any) -> str:
    """The first of `refusals` that holds for a builder, or for a configuration; empty if none does."""
    return next((each.why for each in refusals if each.holds(holder)), "")


def above_one(*names: str) -> Callable[[Any], bool]:
    """The question whether one of these settings of a builder, or of a configuration, is above 1."""
    return lambda holder: any(getattr(holder, name, 1) > 1 for name in names)


@dataclass(frozen=True)
class BuilderRow:
    """What is known of one class of metadata builders.

    Attributes
    ----------
    backends : tuple of str
        vLLM's names for the attention backends that have it, the best known first. A platform in parentheses is where
        vLLM gives another backend's name to this one.
    builder : str
        Dotted path of the class; exactly that class, since a subclass may build more.
    changes : Changes
        What this adapter writes at each step of Model Runner V2's drafts: in place where vLLM fuses the draft, into the
        first step's metadata where it does not.
    fields : mapping of str to frozenset of str
        By dotted path of a dataclass, all of its fields that are known. A field that is not named may change from step to
        step, so that metadata with more fields are left to vLLM.
    needs : tuple of Need
        What `changes` takes for granted.
    refusals : tuple of Refusal
        Settings that are not covered, by neither `changes` nor `keeper`.
    proved : bool
        Whether a GPU has run it in the fused draft, see `unproved`.
    stale : str
        What vLLM's own update in place leaves stale; empty if nothing is known. Where this adapter does not write it, it
        does not make a draft fused either: vLLM's rebuild is right.
    keeper : Keeper or None
        How Model Runner V1's draft keeps the metadata from step to step. None: vLLM rebuilds it at each step.
    unverified : str
        Why its drafts are left to vLLM where they are to be verified; empty where they are not.
    not_kept : str
        Why there is no keeper, where that is known.
    left_alone : str
        Why this adapter does nothing for it, where `changes` is "other".
    gpus : frozenset of str, or None
        Where vLLM chooses it by itself for a DSA model's draft, as in `PathPlan`; None is everywhere.
    vllm_updates : bool
        Whether the newest tested vLLM itself updates it in place. `changes` then is for earlier releases, and for drafts
        that are not fused.
    """

    backends: tuple[str, ...]
    builder: str
    changes: Changes = "other"
    fields: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)
    needs: tuple[Need, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    proved: bool = True
    stale: str = ""
    keeper: Keeper | None = None
    unverified: str = ""
    not_kept: str = ""
    left_alone: str = ""
    gpus: frozenset[str] | None = None
    vllm_updates: bool = False

    @property
    def backend(self) -> str:
        """The best known of its backends."""
        return self.backends[0]

    @property
    def module(self) -> str:
        """Where the builder is."""
        return self.builder.rpartition(".")[0]

    def uncovered(self, builder: Any) -> str:
        """Empty, or which setting of a builder, or which field of its metadata, is not covered."""
        return refusal(self.refusals, builder) or _unknown_fields(self.fields)

    def refused(self, builder: Any) -> str:
        """Empty, or why Model Runner V2's drafts leave a builder of this class to vLLM."""
        return next(iter(missing(self.needs)), "") or self.uncovered(builder)

    def left_by(self, host: Host) -> str:
        """Empty, or why a host's settings leave the builder to vLLM: no GPU has run it yet, or no verification covers it."""
        return unproved(self.proved, host) or (self.unverified if host.verify else "")


def _unknown_fields(fields: Mapping[str, frozenset[str]]) -> str:
    for path, known in fields.items():
        found = dataclasses.fields(pkgutil.resolve_name(path))
        if unknown := sorted({part.name for part in found} - known):
            return f"{path.rpartition('.')[2]} has fields that are not known here: {', '.join(unknown)}"
    return ""
