"""Runs only where drafts of Model Runner V1 are verified or measured: times each, and compares it with vLLM's own.

A verification follows a draft step by step. vLLM's own update moves a copy of the batch on, in spare buffers, and vLLM's
own builders, which write into spare buffers too, rebuild its metadata from nothing: a rebuild as it would be without the
stale request map. On a difference the engine goes on with vLLM's values, and vLLM's own code does the rest of the draft
and all later ones. A draft issues the same forwards, and so the same collectives, either way.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nsa_plugin.adapters.attached import Attached
from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.verification import Described, SpareBuffers, Verification, shadow
from nsa_plugin.adapters.vllm.deep_gemm import scheduler
from nsa_plugin.adapters.vllm.describe import describe, positions_geometry
from nsa_plugin.adapters.vllm.rebuilds import defined, spare_group
from nsa_plugin.adapters.vllm.releases import build_group
from nsa_plugin.core.draft_steps import DraftLimits

if TYPE_CHECKING:
    from nsa_plugin.adapters.vllm.v1.proposer import Patch, Served

Method = Callable[..., Any]


def watched(host: Host, patch: Patch, strategy: str) -> tuple[Method, Method]:
    """The update and the build of a patch, measured and verified if the settings say so; the very ones if not."""
    update, build = patch.update(), patch.build()
    if patch.report.durations(strategy, 1) is not None:
        update, build = timed(patch, strategy, update, build)
    update, build = (patch.report.ranged(call, strategy) for call in (update, build))
    if host.verify:
        check = VerifiedDrafts(host, patch, strategy)
        update, build = check.update(update), check.build(build)
    return update, build


@dataclass
class _Following:
    """A draft that is being verified: a copy of its batch, moved on by vLLM's own code.

    Attributes
    ----------
    proposer : a shadow, with spare buffers for positions and slots
    groups : spare attention groups, None for those that vLLM rebuilds anyway
    positions, batch : of the step that the draft is at
    source : what the batch was before its first step, described when something differs
    """

    proposer: Any
    groups: list[Any]
    limits: DraftLimits
    turn: Verification
    positions: torch.Tensor | None = None
    batch: Any = None
    source: Any = None
    block_size: int = 0


class VerifiedDrafts:
    """Compares every n-th draft of each proposer, the first to begin with, with vLLM's own rebuild."""

    def __init__(self, host: Host, patch: Patch, strategy: str) -> None:
        self._host, self._patch, self._strategy = host, patch, strategy
        self._turns: Attached[Verification] = Attached("v1_verification")
        self._spares: Attached[tuple[Any, _Following]] = Attached("v1_spares")
        self._now: _Following | None = None

    def build(self, build: Method) -> Method:
        """Around `build_per_group_and_layer_attn_metadata`."""

        def verified(proposer: Any, common_attn_metadata: Any, draft_index: int = 0, *args: Any, **kwargs: Any) -> Any:
            if draft_index == 0:
                self._now = None
            built = build(proposer, common_attn_metadata, draft_index, *args, **kwargs)
            served = self._patch.serving(proposer)
            if served is None:
                return built
            try:
                if draft_index == 0:
                    self._begin(proposer, served)
                    return built
                if self._same_metadata(built[0], draft_index):
                    return built
                self._patch.hand_back(served, common_attn_metadata)
            except Exception as error:
                self._patch.step_down(served, common_attn_metadata, error)
            self._now = None
            return self._patch.stock_build(proposer, common_attn_metadata, draft_index, *args, **kwargs)

        return verified

    def update(self, update: Method) -> Method:
        """Around `_update_positions_dependent_metadata`."""

        def verified(
            proposer: Any, positions: torch.Tensor, common_attn_metadata: Any, batch_size: int, input_batch_size: int,
            block_size: int, *args: Any, **kwargs: Any,
        ) -> Any:  # fmt: skip
            batch, rows = common_attn_metadata, input_batch_size
            step = functools.partial(update, proposer, positions, batch, batch_size, rows, block_size, *args, **kwargs)
            now, served = self._now, self._patch.serving(proposer)
            if now is None or served is None:
                return step()
            stock = functools.partial(self._patch.stock_update, now.proposer)
            try:
                _follow(now, stock, positions, batch, (batch_size, rows, block_size, *args), kwargs)
            except Exception as error:
                self._now = None
                self._patch.step_down(served, batch, error)
                return step()
            moved = step()
            if self._patch.serving(proposer) is None:  # it failed
                self._now = None
            elif not self._same_places(now, served, proposer, moved, batch, batch_size, rows):
                self._now = None
                self._patch.hand_back(served, batch)
            return moved

        return verified

    def _begin(self, proposer: Any, served: Served) -> None:
        """A draft begins: follow it if it is its turn."""
        turn = self._turns.get(proposer)
        if turn is None:
            turn = self._turns.set(proposer, Verification(self._patch.report, self._strategy, self._host.verify))
        if not turn.is_due():
            return
        kept = self._spares.get(proposer)
        if kept is None or kept[0] is not served.draft:
            kept = self._spares.set(proposer, (served.draft, _spare(proposer, served, turn)))
        self._now = kept[1]
        self._now.batch = self._now.positions = None

    def _same_places(
        self,
        now: _Following,
        served: Served,
        proposer: Any,
        moved: torch.Tensor,
        batch: Any,
        batch_size: int,
        rows: int,
    ) -> bool:
        """Whether positions, slots and lengths are vLLM's own; where they are not, they are replaced by these."""
        assert now.positions is not None and served.draft is not None
        spare, slots = now.proposer._slot_mapping_buffer, proposer._slot_mapping_buffer
        pairs = {
            "positions": (now.positions[:batch_size], moved[:batch_size]),
            "slot_mapping": (spare[:batch_size], slots[:batch_size]),
            "slot_mapping.padding": (spare[batch_size:rows], slots[batch_size:rows]),
            "seq_lens": (now.batch.seq_lens[:batch_size], batch.seq_lens[:batch_size]),
        }
        expected, got = ({name: pair[side].clone() for name, pair in pairs.items()} for side in (0, 1))

        def repair() -> None:
            for want, have in pairs.values():
                have.copy_(want)

        step = (served.draft.step - 1, expected, got)
        return now.turn.settle([step], repair, lambda: _described(now))

    def _same_metadata(self, built: list[Any], draft_index: int) -> bool:
        """Whether every group that keeps its metadata has what a rebuild gives."""
        now = self._now
        if now is None or now.batch is None:
            return True
        lengths = now.batch.seq_lens[: now.batch.num_reqs]
        expected: dict[str, torch.Tensor] = {}
        got: dict[str, torch.Tensor] = {}
        for number, (group, metadata) in enumerate(zip(now.groups, built, strict=True)):
            if group is None:
                continue
            rebuilt = build_group(group, now.batch, draft_index)
            for side, one in ((expected, rebuilt), (got, metadata)):
                values = _defined(group, one, lengths)
                side.update({name if name not in side else f"{number}.{name}": value for name, value in values.items()})
        step = (draft_index - 1, expected, got)
        return now.turn.settle([step], _rebuilt_by_vllm, lambda: _described(now))


def _rebuilt_by_vllm() -> None:
    """Metadata that differs needs no repair: vLLM's own code builds that step again."""


def _described(now: _Following) -> Described:
    steps = max(now.proposer.num_speculative_tokens - 1, 1)
    batch = describe(now.source, block_size=now.block_size, draft_steps=steps)
    return batch, positions_geometry(batch, now.limits.max_model_len, now.block_size), now.limits


def _spare(proposer: Any, served: Served, turn: Verification) -> _Following:
    """A shadow of the proposer, and of those of its groups whose metadata is kept."""
    assert served.draft is not None
    spares = SpareBuffers()
    buffers = {name: spares.own(getattr(proposer, name)) for name in ("positions", "_slot_mapping_buffer")}
    groups = [
        spare_group(group, proposer.max_batch_size, spares) if kept else None
        for group, kept in zip(served.groups, served.draft.keeps, strict=True)
    ]
    return _Following(shadow(proposer, **buffers), groups, served.draft.limits, turn)


def _follow(
    now: _Following, update: Method, positions: torch.Tensor, batch: Any, sizes: tuple[Any, ...], others: dict[str, Any]
) -> None:
    """Move the copy of the batch on by one step, by vLLM's own `update`; take the copy, if that is the first.

    `sizes` begin with batch size, rows and block size; `others` are what else `update` takes.
    """
    if now.batch is None or now.positions is None:
        bound = batch.seq_lens_cpu_upper_bound
        now.batch = copy.copy(batch)
        now.batch.seq_lens = batch.seq_lens.clone()
        now.batch.seq_lens_cpu_upper_bound = None if bound is None else bound.clone()
        now.source = copy.copy(now.batch)
        now.source.seq_lens = now.batch.seq_lens.clone()
        now.block_size = sizes[2]
        now.positions = positions.clone()
    now.batch._token_to_req_indices_cache = now.batch._num_computed_tokens_cache = None
    now.positions = update(now.positions, now.batch, *sizes, **others)


def _defined(group: Any, metadata: Any, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
    builder = group.get_metadata_builder()
    planned = hasattr(builder, "scheduler_metadata_buffer") and scheduler(builder) is not None
    return defined(metadata, lengths.numel(), lengths, builder.kv_cache_spec.block_size, planned)


def timed(patch: Patch, strategy: str, update: Method, build: Method) -> tuple[Method, Method]:
    """The two with their host time, from the update of each step to its metadata, as one figure per draft.

    Closures, not methods: a draft of 8 tokens passes here 14 times.
    """
    records: dict[tuple[bool, int], Callable[[float], None] | None] = {}
    clock, started, spent = time.perf_counter, 0.0, 0.0

    def record(ours: bool, steps: int) -> None:
        if (ours, steps) not in records:
            records[ours, steps] = patch.report.durations(strategy if ours else "off", steps)
        if (take := records[ours, steps]) is not None:
            take(spent)

    def timed_update(proposer: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal started
        started = clock()
        return update(proposer, *args, **kwargs)

    def timed_build(proposer: Any, common_attn_metadata: Any, draft_index: int = 0, *args: Any, **kwargs: Any) -> Any:
        nonlocal spent
        built = build(proposer, common_attn_metadata, draft_index, *args, **kwargs)
        if not draft_index:
            spent = 0.0
            return built
        spent += clock() - started
        if draft_index + 1 == proposer.num_speculative_tokens:
            record(patch.serving(proposer) is not None, draft_index)
        return built

    return timed_update, timed_build
