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
import logging
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from nsa_plugin.adapters.base import Fallback, Host
from nsa_plugin.adapters.probe import missing, warn_of_untested
from nsa_plugin.adapters.vllm import capabilities, v1_watch
from nsa_plugin.adapters.vllm.lazy import WhenImported
from nsa_plugin.adapters.vllm.patches import Patches
from nsa_plugin.adapters.vllm.v1_metadata import DecodeBatch, KeptSteps, build_group, keeper_of
from nsa_plugin.core.batch import BlockTable
from nsa_plugin.core.draft_steps import DraftLimits, DraftStep, FillDraftSteps, PastEnd, bind_draft_steps, check_source
from nsa_plugin.core.errors import reject

logger = logging.getLogger("vllm.plugins.nsa_plugin")
ENGINE = "vllm"
PATH = "draft decode (Model Runner V1)"
STRATEGY = "copy"
UPDATE = "_update_positions_dependent_metadata"
BUILD = "build_per_group_and_layer_attn_metadata"
KEPT_BATCHES = 128
"""Batch shapes whose metadata a proposer keeps; the oldest goes first."""
ROUND = 32
"""Rows are allocated in multiples of this, so that every step's lengths start at a multiple of 128 bytes."""


class V1Draft:
    """Installs and undoes the patch."""

    def __init__(self) -> None:
        self._watch: WhenImported | None = None
        self._patches = Patches()
        self._patch_made: Patch | None = None

    def probe(self) -> list[str]:
        """What the installed vLLM lacks; empty if it fits."""
        return missing(capabilities.V1_NEEDS)

    def install(self, host: Host) -> None:
        """Patch the proposer as soon as vLLM imports it, completely or not at all; what is missing is logged."""
        if self._watch is None:
            self._watch = WhenImported(capabilities.V1_MODULE, lambda: self._patch(host))

    def undo(self) -> None:
        """Put the methods back, by identity; what somebody has wrapped since leaves all drafts to vLLM."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._patch_made is not None:
            self._patch_made.retire()
        self._patches.undo()
        self._patches, self._patch_made = Patches(), None

    def switch(self, on: bool) -> None:
        """Leave all drafts to vLLM from the next one on (with its stale caches cleared), or serve them again."""
        if self._patch_made is not None:
            self._patch_made.on = on

    def _patch(self, host: Host) -> None:
        try:
            if problems := self.probe():
                logger.warning("nsa-plugin: Model Runner V1 is left as it is: %s", "; ".join(problems))
                return
            warn_of_untested(logger, capabilities.V1_NEEDS)
            base = pkgutil.resolve_name(capabilities.V1_PROPOSER)
            update, build = (vars(base)[name] for name in (UPDATE, BUILD))
            patch = self._patch_made = Patch(host, base, update, build)
            ours = v1_watch.watched(host, (ENGINE, PATH, STRATEGY), patch)
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
        self._host, self._base = host, base
        self.stock_update, self.stock_build = update, build
        self._drafts: WeakKeyDictionary[Any, Served] = WeakKeyDictionary()
        self.on = self._on_for_this_draft = True

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
        self.on = self._on_for_this_draft = False

    def build(self) -> Callable[..., Any]:
        """In place of `build_per_group_and_layer_attn_metadata`."""

        def build(proposer: Any, common_attn_metadata: Any, draft_index: int = 0) -> Any:
            if draft_index == 0:
                self._begin(proposer)
                return self.stock_build(proposer, common_attn_metadata, draft_index)
            forget_step(common_attn_metadata, draft_index)
            served = self._drafts.get(proposer)
            if self._on_for_this_draft and served is not None and served.draft is not None and served.draft.under_way:
                try:
                    return served.draft.metadata(served.groups, common_attn_metadata, draft_index)
                except Exception as error:
                    self.step_down(served, common_attn_metadata, error)
            return self.stock_build(proposer, common_attn_metadata, draft_index)

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
        ) -> torch.Tensor:
            batch = (positions, common_attn_metadata, batch_size, input_batch_size, block_size)
            served = self._drafts.get(proposer)
            if self._on_for_this_draft and served is not None and served.draft is not None:
                try:
                    return served.draft.advance(proposer.num_speculative_tokens - 1, *batch)
                except Exception as error:
                    self.step_down(served, common_attn_metadata, error)
            moved: torch.Tensor = self.stock_update(proposer, *batch)
            return moved

        return update

    def _begin(self, proposer: Any) -> None:
        """A draft begins: decide about a proposer that is new, forget the batch of the last draft."""
        self._on_for_this_draft = self.on
        served = self._drafts.get(proposer)
        if served is None or served.groups is not proposer.draft_attn_groups:
            self._drafts[proposer] = served = Served(proposer.draft_attn_groups, None)
            try:
                if problem := self._unsupported(proposer):
                    self._host.using(logger, ENGINE, PATH, f"off ({problem})")
                else:
                    served.draft = DraftSteps(proposer)
                    self._host.using(logger, ENGINE, PATH, STRATEGY)
            except Exception as error:
                self._host.fell_back(logger, Fallback(ENGINE, PATH, "capture", STRATEGY, error))
        if served.draft is not None:
            served.draft.begin()

    def step_down(self, served: Served, batch: Any, error: Exception) -> None:
        """Hand the rest of this draft, and all later ones of this proposer, back to vLLM."""
        if served.draft is not None:
            served.draft.settle(batch)
        served.draft = None
        forget_step(batch, 1)
        self._host.fell_back(logger, Fallback(ENGINE, PATH, "replay", STRATEGY, error))

    def _unsupported(self, proposer: Any) -> str:
        """Empty, or what about the proposer is not covered."""
        kind = type(proposer)
        for name in (UPDATE, BUILD):
            if getattr(kind, name) is not getattr(self._base, name):
                return f"{kind.__name__} has its own {name}"
        theirs = capabilities.not_vllms(self.stock_update) or capabilities.not_vllms(self.stock_build)
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


@dataclass
class _Bound:
    """One batch shape: where its steps are, and their metadata once vLLM has built the first."""

    fill: FillDraftSteps
    seq_lens: list[torch.Tensor]
    targets: list[torch.Tensor]
    sources: list[list[torch.Tensor]]
    slots: torch.Tensor
    batch: DecodeBatch
    groups: list[KeptSteps | None] | None = None
    rebuilds: bool = True


class DraftSteps:
    """The draft steps of one proposer.

    The first step's positions and slots are computed right into the proposer's buffers, which CUDA graphs read; those
    of the others, and the lengths of all, into rows of this object's own.
    """

    def __init__(self, proposer: Any) -> None:
        self._limits = DraftLimits(proposer.max_model_len, PastEnd.PAD, _padding_slot())
        self._most_steps = max(1, proposer.speculative_config.num_speculative_tokens - 1)
        self._positions, self._slots = proposer.positions, proposer._slot_mapping_buffer
        self._request_map = proposer.arange
        self._keepers = [keeper_of(group)[0] for group in proposer.draft_attn_groups]
        self._fills: dict[int, FillDraftSteps] = {}
        self._bound: dict[tuple[Any, ...], _Bound] = {}
        self._current: _Bound | None = None
        self._step = 0
        self._owed = 0
        self._allocate(proposer.max_batch_size)

    @property
    def limits(self) -> DraftLimits:
        """How far its drafts go."""
        return self._limits

    @property
    def keeps(self) -> list[bool]:
        """Whether the metadata of each attention group is kept."""
        return [keeper is not None for keeper in self._keepers]

    @property
    def step(self) -> int:
        """The draft step that `advance` has moved the batch to, from 1 on."""
        return self._step

    @property
    def under_way(self) -> bool:
        """Whether `advance` has moved the batch of this draft on."""
        return self._current is not None

    def begin(self) -> None:
        """A draft begins."""
        self._current, self._step, self._owed = None, 0, 0

    def advance(
        self, num_steps: int, positions: torch.Tensor, batch: Any, batch_size: int, num_rows: int, block_size: int
    ) -> torch.Tensor:
        """Move the batch on by one token: what vLLM's method does, with `seq_lens` in a place of its own at each step."""
        current = self._current
        if current is None:
            table = BlockTable(batch.block_table_tensor, block_size)
            current = self._bind(num_steps, positions, batch, table, batch_size, num_rows)
            current.fill(positions, batch.seq_lens, table, batch_size, num_rows)
            self._current = current
        else:
            torch._foreach_copy_(current.targets, current.sources[self._step])
        batch.seq_lens = current.seq_lens[self._step]
        batch.slot_mapping = current.slots
        batch.max_seq_len = min(batch.max_seq_len + 1, self._limits.max_model_len)
        self._step += 1
        self._owed += 1
        if current.rebuilds or self._step == len(current.seq_lens):
            self.settle(batch)
        return current.targets[0]

    def settle(self, batch: Any) -> None:
        """Bring the host's bound of the lengths up to date, which no kept metadata reads."""
        if self._owed and batch.seq_lens_cpu_upper_bound is not None:
            batch.seq_lens_cpu_upper_bound += self._owed
        self._owed = 0

    def metadata(self, groups: list[Any], batch: Any, draft_index: int) -> tuple[list[Any], dict[str, Any]]:
        """Per group and per layer, as vLLM's method returns them."""
        current = self._current
        if current is None or draft_index != self._step:
            raise RuntimeError(f"expected draft step {self._step}, got {draft_index}")
        built: list[Any] = [None] * len(groups)
        if current.groups is None:
            built = [build_group(group, batch, draft_index) for group in groups]
            current.groups = [
                None if keeper is None else keeper.keep(group.get_metadata_builder(), made, current.batch)
                for keeper, group, made in zip(self._keepers, groups, built, strict=True)
            ]
            current.rebuilds = None in current.groups
        per_group, per_layer = [], {}
        for group, kept, made in zip(groups, current.groups, built, strict=True):
            if kept is not None:
                made = kept.at(self._step - 1, batch.max_seq_len)
            elif made is None:
                made = build_group(group, batch, draft_index)
            per_group.append(made)
            per_layer.update(dict.fromkeys(group.layer_names, made))
        return per_group, per_layer

    def _allocate(self, num_rows: int) -> None:
        """Rows for every step, and what kept metadata refers to beside them."""
        self._bound.clear()
        self._fills.clear()
        self._capacity = -(-num_rows // ROUND) * ROUND
        with torch.inference_mode(False):  # they are written in and outside of it
            self._rows = [
                DraftStep(*map(self._zeros, (torch.int64, torch.int64, torch.int32))) for _ in range(self._most_steps)
            ]
            self._ones = self._zeros(torch.int32) + 1
        self._rows[0] = DraftStep(self._positions, self._slots, self._rows[0].seq_lens)

    def _zeros(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(self._capacity, dtype=dtype, device=self._positions.device)

    def _bind(
        self, num_steps: int, positions: torch.Tensor, batch: Any, table: BlockTable, batch_size: int, num_rows: int
    ) -> _Bound:
        """The steps of a batch shape, bound when it is new."""
        blocks = table.block_table
        key = (
            num_steps, batch_size, num_rows, table.block_size, blocks.data_ptr(), blocks.shape, blocks.stride(),
            batch.num_reqs, batch.num_actual_tokens, batch.max_logits_per_req,
        )  # fmt: skip
        if (bound := self._bound.get(key)) is not None:
            return bound
        check_source(positions, batch.seq_lens, table, batch_size)
        if batch.num_reqs != batch_size or batch.num_actual_tokens != batch_size:
            got = f"{batch.num_reqs} and {batch.num_actual_tokens}"
            reject("batch", f"{batch_size} requests of one token each", got)
        if num_steps > self._most_steps:
            reject("num_speculative_tokens", f"at most {self._most_steps + 1}", num_steps + 1)
        if num_rows > self._capacity:
            self._allocate(num_rows)
        if len(self._bound) >= KEPT_BATCHES:
            del self._bound[next(iter(self._bound))]
        rows = self._rows[:num_steps]
        seq_lens = [step.seq_lens[:batch_size] for step in rows]
        sources = [[step.positions[:batch_size], step.slots[:num_rows]] for step in rows]
        parts = DecodeBatch(
            batch_size, seq_lens, blocks[:batch_size], self._request_map[:batch_size], self._ones[:batch_size]
        )
        if num_steps not in self._fills:
            self._fills[num_steps] = bind_draft_steps(rows, self._limits)
        bound = _Bound(self._fills[num_steps], seq_lens, sources[0], sources, self._slots[:batch_size], parts)
        self._bound[key] = bound
        return bound


def _padding_slot() -> int:
    slot: int = pkgutil.resolve_name("vllm.v1.spec_decode.utils.PADDING_SLOT_ID")
    return slot
