"""Runs at every draft: Model Runner V1's positions, slots and lengths of all steps in one launch, its metadata kept.

Why vLLM's two methods are replaced, and until when, is in `nsa_plugin.adapters.vllm.ledger`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from nsa_plugin.adapters.attached import Attached
from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.vllm import releases
from nsa_plugin.adapters.vllm.builder_rows import refusal
from nsa_plugin.adapters.vllm.builders import PARALLELISM
from nsa_plugin.adapters.vllm.reports import logger, report
from nsa_plugin.adapters.vllm.v1.steps import DraftSteps, keeper_of
from nsa_plugin.adapters.vllm.v1.verified import watch as v1_watch

PATH = "draft decode (Model Runner V1)"
STRATEGY = "copy"
UPDATE = "_update_positions_dependent_metadata"
BUILD = "build_per_group_and_layer_attn_metadata"


def hooks(host: Host, owner: type, live: Callable[[], bool]) -> Mapping[str, Callable[..., Any]]:
    """Replacements of the two methods of `owner`, the proposer, by name.

    Once they are not `live`, all drafts are vLLM's, the rest of one that has begun, too.
    """
    stock = {name: vars(owner)[name] for name in (UPDATE, BUILD)}
    patch = Patch(host, owner, stock[UPDATE], stock[BUILD], live)
    ours = zip(stock.items(), v1_watch.watched(host, patch, STRATEGY), strict=True)
    return MappingProxyType({name: functools.wraps(original)(made) for (name, original), made in ours})


@dataclass
class Served:
    """A proposer with these attention groups: its draft steps, or None if it is left to vLLM."""

    groups: list[Any]
    draft: DraftSteps | None


class Patch:
    """The two methods, and the drafts of the proposers that they were called for."""

    def __init__(
        self,
        host: Host,
        base: type,
        update: Callable[..., Any],
        build: Callable[..., Any],
        live: Callable[[], bool],
    ) -> None:
        self._host, self._base, self._live, self.report = host, base, live, report(host, PATH)
        self.stock_update, self.stock_build = update, build
        self._drafts: Attached[Served] = Attached("v1_draft")
        self._on_for_this_draft = True

    def serving(self, proposer: Any) -> Served | None:
        """What serves the draft that is under way; None if it is left to vLLM."""
        served = self._drafts.get(proposer)
        on = self._on_for_this_draft and self._live()
        return served if served is not None and served.draft is not None and on else None

    def hand_back(self, served: Served, batch: Any) -> None:
        """Let vLLM do the rest of the draft that is under way, from the step on that the batch is at."""
        if served.draft is not None:
            served.draft.settle(batch)
        forget_step(batch, 1)
        self._on_for_this_draft = False

    def build(self) -> Callable[..., Any]:
        """In place of `build_per_group_and_layer_attn_metadata`."""

        def build(proposer: Any, common_attn_metadata: Any, draft_index: int = 0, *args: Any, **kwargs: Any) -> Any:
            if draft_index == 0:
                self._begin(proposer)
                return self.stock_build(proposer, common_attn_metadata, draft_index, *args, **kwargs)
            if self._live():
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
        if served is None or served.draft is None or (self._on_for_this_draft and self._live()):
            return served
        served.draft.settle(batch)
        return None

    def _begin(self, proposer: Any) -> None:
        """A draft begins: decide about a proposer that is new, forget the batch of the last draft."""
        self._on_for_this_draft = self._host.on and self._live()
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
        if getattr(proposer, name):
            return f"{meaning} is not covered"
    if problem := refusal(PARALLELISM, proposer.vllm_config.parallel_config):
        return problem
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
