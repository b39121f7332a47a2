"""Model Runner V1's draft: positions, slots and lengths of all steps in one launch, metadata kept instead of rebuilt.

One patch, of two methods of `SpecDecodeBaseProposer`, to go with Model Runner V1. (Upstream pull request 39632 proposed
to keep metadata across draft steps and was closed; a report of the stale request map was not found.)

- `_update_positions_dependent_metadata`, once per draft step, launches a kernel that moves positions, slots and lengths
  on by one token. They are known from the start: here the first step computes those of all, and the others copy theirs
  to where captured graphs read them.
- `build_per_group_and_layer_attn_metadata`, once per draft step, rebuilds the metadata of every attention group. Here
  the groups in `v1_metadata.KEPT` keep theirs. Of the others, vLLM's rebuild is made right: `propose` leaves the batch's
  request map of the step before the first (`_token_to_req_indices_cache`, vLLM 0.31 to 0.33) in place, so that sparse
  attention reads the block table of request 0 for every request; and the same for computed tokens.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nsa_plugin.adapters.attached import Attached
from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.patches import Patches
from nsa_plugin.adapters.probe import missing, warn_of_untested
from nsa_plugin.adapters.vllm import releases
from nsa_plugin.adapters.vllm.lazy import WhenImported
from nsa_plugin.adapters.vllm.reports import logger, report
from nsa_plugin.adapters.vllm.v1.kept import keeper_of
from nsa_plugin.adapters.vllm.v1.steps import DraftSteps
from nsa_plugin.adapters.vllm.v1.verified import watch as v1_watch

PATH = "draft decode (Model Runner V1)"
STRATEGY = "copy"
UPDATE = "_update_positions_dependent_metadata"
BUILD = "build_per_group_and_layer_attn_metadata"


class V1Draft:
    """Installs and undoes the patch."""

    def __init__(self) -> None:
        self._watch: WhenImported | None = None
        self._patches = Patches()
        self._patch_made: Patch | None = None

    def probe(self) -> list[str]:
        """What the installed vLLM lacks; empty if it fits."""
        return missing(releases.V1_NEEDS)

    def install(self, host: Host) -> None:
        """Patch the proposer as soon as vLLM imports it, completely or not at all; what is missing is logged."""
        if self._watch is None:
            self._watch = WhenImported(releases.V1_MODULE, lambda: self._patch(host))

    def undo(self) -> None:
        """Put the methods back, by identity; what somebody has wrapped since leaves all drafts to vLLM."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._patch_made is not None:
            self._patch_made.retire()
        self._patches.undo()
        self._patches, self._patch_made = Patches(), None

    def _patch(self, host: Host) -> None:
        try:
            if problems := self.probe():
                logger.warning("nsa-plugin: Model Runner V1 is left as it is: %s", "; ".join(problems))
                return
            warn_of_untested(logger, releases.V1_NEEDS)
            base = pkgutil.resolve_name(releases.V1_PROPOSER)
            update, build = (vars(base)[name] for name in (UPDATE, BUILD))
            patch = self._patch_made = Patch(host, base, update, build)
            ours = v1_watch.watched(host, patch, STRATEGY)
            for name, stock, replacement in zip((UPDATE, BUILD), (update, build), ours, strict=True):
                self._patches.set(base, name, functools.wraps(stock)(replacement))
        except Exception as error:
            logger.exception("nsa-plugin: Model Runner V1 is left as it is: %s", error)


@dataclass
class Served:
    """A proposer with these attention groups: its draft steps, or None if it is left to vLLM."""

    groups: list[Any]
    draft: DraftSteps | None


class Patch:
    """The two methods, and the drafts of the proposers that they were called for."""

    def __init__(self, host: Host, base: type, update: Callable[..., Any], build: Callable[..., Any]) -> None:
        self._host, self._base, self.report = host, base, report(host, PATH)
        self.stock_update, self.stock_build = update, build
        self._drafts: Attached[Served] = Attached("v1_draft")
        self._retired = False
        self._on_for_this_draft = True

    def serving(self, proposer: Any) -> Served | None:
        """What serves the draft that is under way; None if it is left to vLLM."""
        served = self._drafts.get(proposer)
        return served if served is not None and served.draft is not None and self._on_for_this_draft else None

    def hand_back(self, served: Served, batch: Any) -> None:
        """Let vLLM do the rest of the draft that is under way, from the step on that the batch is at."""
        if served.draft is not None:
            served.draft.settle(batch)
        forget_step(batch, 1)
        self._on_for_this_draft = False

    def retire(self) -> None:
        """Leave everything to vLLM from now on, in a draft that has begun, too."""
        self._retired, self._on_for_this_draft = True, False

    def build(self) -> Callable[..., Any]:
        """In place of `build_per_group_and_layer_attn_metadata`."""

        def build(proposer: Any, common_attn_metadata: Any, draft_index: int = 0, *args: Any, **kwargs: Any) -> Any:
            if draft_index == 0:
                self._begin(proposer)
                return self.stock_build(proposer, common_attn_metadata, draft_index, *args, **kwargs)
            if not self._retired:
                forget_step(common_attn_metadata, draft_index)
            served = self._under_way(proposer, common_attn_metadata)
            if served is not None and served.draft is not None and served.draft.under_way:
                try:
                    return served.draft.metadata(served.groups, common_attn_metadata, draft_index)
                except Exception as error:
                    self.step_down(served, common_attn_metadata, error)
            return self.stock_build(proposer, common_attn_metadata, draft_index, *args, **kwargs)

        return build

    def update(self) -> Callable[..., torch.Tensor]:
        """In place of `_update_positions_dependent_metadata`."""

        def update(
            proposer: Any,
            positions: torch.Tensor,
            common_attn_metadata: Any,
            batch_size: int,
            input_batch_size: int,
            block_size: int,
            *args: Any,
            **kwargs: Any,
        ) -> torch.Tensor:
            batch = (positions, common_attn_metadata, batch_size, input_batch_size, block_size)
            served = self._under_way(proposer, common_attn_metadata)
            if served is not None and served.draft is not None:
                try:
                    return served.draft.advance(proposer.num_speculative_tokens - 1, *batch)
                except Exception as error:
                    self.step_down(served, common_attn_metadata, error)
            moved: torch.Tensor = self.stock_update(proposer, *batch, *args, **kwargs)
            return moved

        return update

    def _under_way(self, proposer: Any, batch: Any) -> Served | None:
        """As `serving`; a draft that was left to vLLM half-way is settled first."""
        served = self._drafts.get(proposer)
        if served is None or served.draft is None or self._on_for_this_draft:
            return served
        served.draft.settle(batch)
        return None

    def _begin(self, proposer: Any) -> None:
        """A draft begins: decide about a proposer that is new, forget the batch of the last draft."""
        self._on_for_this_draft = self._host.on and not self._retired
        served = self._drafts.get(proposer)
        if not self._on_for_this_draft:
            if served is not None and served.draft is not None:
                served.draft.begin()
            return
        if served is None or served.groups is not proposer.draft_attn_groups:
            served = self._drafts.set(proposer, Served(proposer.draft_attn_groups, None))
            try:
                if problem := self._unsupported(proposer):
                    self.report.left_alone(problem)
                else:
                    served.draft = DraftSteps(proposer, self._host, self.report, STRATEGY)
                    self.report.using(STRATEGY)
            except Exception as error:
                self.report.fell_back("capture", STRATEGY, error)
        if served.draft is not None:
            served.draft.begin()

    def step_down(self, served: Served, batch: Any, error: Exception) -> None:
        """Hand the rest of this draft, and all later ones of this proposer, back to vLLM."""
        if served.draft is not None:
            served.draft.settle(batch)
        served.draft = None
        forget_step(batch, 1)
        self.report.fell_back("replay", STRATEGY, error)

    def _unsupported(self, proposer: Any) -> str:
        """Empty, or what about the proposer is not covered."""
        kind = type(proposer)
        for name in (UPDATE, BUILD):
            if getattr(kind, name) is not getattr(self._base, name):
                return f"{kind.__name__} has its own {name}"
        theirs = releases.not_vllms(self.stock_update) or releases.not_vllms(self.stock_build)
        return theirs or unsupported(proposer)


def unsupported(proposer: Any) -> str:
    """Empty, or what about a proposer with the base class's methods is not covered."""
    for name, meaning in (
        ("parallel_drafting", "parallel drafting"),
        ("constant_draft_positions", "a draft that stays at one position"),
        ("needs_extra_input_slots", "a separate draft model"),
        ("uses_mrope", "M-RoPE"),
    ):
        if getattr(proposer, name, False):
            return f"{meaning} is not covered"
    parallel = proposer.vllm_config.parallel_config
    for name, meaning in (
        ("decode_context_parallel_size", "decode context parallelism"),
        ("prefill_context_parallel_size", "prefill context parallelism"),
    ):
        if getattr(parallel, name, 1) > 1:
            return f"{meaning} is not covered"
    reasons = [reason for keeper, reason in map(keeper_of, proposer.draft_attn_groups) if keeper is None]
    if len(reasons) == len(proposer.draft_attn_groups):
        return "vLLM rebuilds every attention group: " + "; ".join(reasons)
    for reason in reasons:
        logger.info("nsa-plugin: %s: vLLM rebuilds %s", PATH, reason)
    return ""


def forget_step(common_attn_metadata: Any, draft_index: int) -> None:
    """Make vLLM compute again what it remembers of an earlier step of this batch.

    The request map is the same from the first draft step on; the computed tokens change at each.
    """
    if draft_index == 1:
        common_attn_metadata._token_to_req_indices_cache = None
    common_attn_metadata._num_computed_tokens_cache = None
