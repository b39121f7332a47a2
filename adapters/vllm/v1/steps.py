"""Runs at every draft: the steps of one proposer of Model Runner V1, computed in one launch, and their kept metadata."""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.probe import missing
from nsa_plugin.adapters.reporting import PathReport
from nsa_plugin.adapters.vllm.builders import NOT_EXAMINED, row_of
from nsa_plugin.adapters.vllm.describe import describe
from nsa_plugin.adapters.vllm.releases import build_group, maps_blocks
from nsa_plugin.adapters.vllm.v1.kept import DecodeBatch, Keeper, KeptSteps
from nsa_plugin.core.batch import BatchDescriptor, BlockTable
from nsa_plugin.core.draft_steps import DraftLimits, DraftStep, FillDraftSteps, PastEnd, check_source
from nsa_plugin.core.errors import reject

KEPT_BATCHES = 128
"""Batch shapes whose metadata a proposer keeps; the oldest goes first."""
ROUND = 32
"""Rows are allocated in multiples of this, so that every step's lengths start at a multiple of 128 bytes."""


def keeper_of(group: Any) -> tuple[Keeper | None, str]:
    """The keeper of an attention group, or None and why vLLM rebuilds its metadata at each draft step."""
    builder = group.get_metadata_builder()
    name, row = type(builder).__name__, row_of(builder)
    keeper = row.keeper
    if keeper is None:
        return None, f"{name}: {row.left_alone or row.not_kept or NOT_EXAMINED}"
    if problems := missing(keeper.needs):
        return None, f"{name}: {'; '.join(problems)}"
    if maps_blocks(group):
        return None, f"{name}: its block table is mapped to kernel blocks anew for every build"
    problem = row.uncovered(builder)
    return (None, f"{name}: {problem}") if problem else (keeper, "")


@dataclass
class _Bound:
    """One batch shape: where its steps are, and their metadata once vLLM has built the first."""

    fill: FillDraftSteps
    seq_lens: list[torch.Tensor]
    targets: list[torch.Tensor]
    sources: list[list[torch.Tensor]]
    slots: torch.Tensor
    batch: DecodeBatch
    describe: Callable[[Any], BatchDescriptor]
    observe: Callable[[BatchDescriptor], None] | None
    groups: list[KeptSteps | None] | None = None
    rebuilds: bool = True


class DraftSteps:
    """The draft steps of one proposer.

    The first step's positions and slots are computed right into the proposer's buffers, which CUDA graphs read. Those of
    the other steps, and the lengths of all steps, go into rows of this object's own.
    """

    def __init__(self, proposer: Any, host: Host, report: PathReport, strategy: str) -> None:
        self._host, self._report, self._strategy = host, report, strategy
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
        """Move the batch on by one token, as vLLM's method does. `seq_lens` has a place of its own at each step."""
        current = self._current
        if current is None:
            table = BlockTable(batch.block_table_tensor, block_size)
            current = self._bind(num_steps, positions, batch, table, batch_size, num_rows)
            current.fill(positions, batch.seq_lens, table, batch_size, num_rows)
            if current.observe is not None:
                current.observe(current.describe(batch))
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
        """Bring the host's upper bound of the lengths up to date. No kept metadata reads it."""
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
            self._fills[num_steps] = self._host.draft_steps(rows, self._limits)
        own = functools.partial(describe, block_size=table.block_size, draft_steps=num_steps)
        describes = self._report.describe(batch, own)
        observe = self._report.observer(self._strategy, describes(batch))
        fill, slots = self._fills[num_steps], self._slots[:batch_size]
        bound = _Bound(fill, seq_lens, sources[0], sources, slots, parts, describes, observe)
        self._bound[key] = bound
        return bound


def _padding_slot() -> int:
    slot: int = pkgutil.resolve_name("vllm.v1.spec_decode.utils.PADDING_SLOT_ID")
    return slot
