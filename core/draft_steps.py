"""Where the draft steps of a batch are: position, KV slot and sequence length of every request at every step.

They follow from where the requests are now and from their block table, so that one launch gives those of all steps.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from nsa_plugin.core.api import Impl, resolve_impl
from nsa_plugin.core.batch import BlockTable
from nsa_plugin.core.checks import INTEGERS, TensorChecks, at_least, instance, instances
from nsa_plugin.core.errors import reject

BLOCK = 128
"""Rows that a program of the kernel takes through all steps."""


class PastEnd(enum.Enum):
    """What becomes of a request whose next position would be `max_model_len` or more."""

    PAD = "pad"
    """Position 0, length 1 and the padding slot; the step after goes on from there (vLLM's Model Runner V1)."""
    CLAMP = "clamp"
    """It stays at the last position, with the length and the slot that go with it (vLLM's Model Runner V2)."""


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """How far a draft goes.

    Parameters
    ----------
    max_model_len : int >= 1
        Positions that a request can have; also the longest length.
    past_end : PastEnd
    padding_slot : int
        The slot that means "write nowhere".
    """

    max_model_len: int
    past_end: PastEnd
    padding_slot: int = -1


@dataclass(frozen=True, slots=True)
class DraftStep:
    """Destination of one draft step.

    Parameters
    ----------
    positions : int64 tensor [>= batch_size], contiguous
    slots : int64 tensor [>= num_rows], contiguous
        Rows from `batch_size` to `num_rows` (padding of a CUDA graph) get the padding slot.
    seq_lens : int32 tensor [>= batch_size], contiguous
        Tokens that the step's query sees, itself included.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    seq_lens: torch.Tensor


FillDraftSteps = Callable[[torch.Tensor, torch.Tensor, BlockTable, int, int], None]
"""`fill(positions, seq_lens, table, batch_size, num_rows)`, see `bind_draft_steps`."""


BindDraftSteps = Callable[[Sequence[DraftStep], DraftLimits], FillDraftSteps | None]
"""Provides an implementation bound to these destinations, or None."""


def bind_draft_steps(
    steps: Sequence[DraftStep], limits: DraftLimits, *, impl: Impl = "auto", bind: BindDraftSteps | None = None
) -> FillDraftSteps:
    """Bind the destinations of consecutive draft steps; the result fills all of them, with Triton in one launch.

    The returned `fill(positions, seq_lens, table, batch_size, num_rows)` takes positions (int32 or int64
    [>= batch_size], any stride) and lengths (the same) of the step before the first, and the block table of the batch.
    Step i is step i - 1 moved on by one token. It checks nothing, syncs nothing and allocates nothing with Triton.
    Sources may be destinations of a single step (an update in place). `bind` is asked first for an implementation; where
    it returns None, `impl` is used.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        A destination has another dtype, device or layout than `DraftStep` says, or `limits` make no sense.
    UnavailableError
        `impl` can't run here.
    """
    _check(steps, limits)
    provided = bind(steps, limits) if bind is not None else None
    if provided is not None:
        return provided
    device = steps[0].positions.device
    if resolve_impl(impl, device) == "reference":
        return lambda *batch: fill_reference(steps, limits, *batch)
    from nsa_plugin.core.kernels.draft_steps import draft_steps_kernel

    addresses = [[step.positions.data_ptr(), step.slots.data_ptr(), step.seq_lens.data_ptr()] for step in steps]
    records = torch.tensor(addresses, dtype=torch.int64).to(device)
    pad = limits.past_end is PastEnd.PAD

    def fill(
        positions: torch.Tensor, seq_lens: torch.Tensor, table: BlockTable, batch_size: int, num_rows: int
    ) -> None:
        blocks = table.block_table
        draft_steps_kernel[(-(-num_rows // BLOCK),)](
            positions, seq_lens, blocks, records,
            positions.stride(0), seq_lens.stride(0), *blocks.stride(), len(steps), batch_size, num_rows, blocks.shape[1],
            table.block_size, limits.max_model_len, limits.padding_slot, PAD=pad, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip

    return fill


def fill_reference(
    steps: Sequence[DraftStep],
    limits: DraftLimits,
    positions: torch.Tensor,
    seq_lens: torch.Tensor,
    table: BlockTable,
    batch_size: int,
    num_rows: int,
) -> None:
    """The definition, in plain torch. See `bind_draft_steps`."""
    position, length = positions[:batch_size].long(), seq_lens[:batch_size].long()
    blocks, block_size = table.block_table[:batch_size], table.block_size
    for step in steps:
        position = position + 1
        length = (length + 1).clamp(max=limits.max_model_len)
        past = position >= limits.max_model_len
        pad = past if limits.past_end is PastEnd.PAD else torch.zeros_like(past)
        position = torch.where(pad, 0, position.clamp(max=limits.max_model_len - 1))
        length = torch.where(pad, 1, length)
        column = (position // block_size).clamp(max=blocks.shape[1] - 1)
        block = blocks.gather(1, column[:, None])[:, 0].long()
        slot = torch.where(pad, limits.padding_slot, block * block_size + position % block_size)
        step.positions[:batch_size] = position
        step.slots[:batch_size] = slot
        step.slots[batch_size:num_rows] = limits.padding_slot
        step.seq_lens[:batch_size] = length


def check_source(positions: torch.Tensor, seq_lens: torch.Tensor, table: BlockTable, batch_size: int) -> None:
    """Raise unless `fill` can read a batch of `batch_size` requests from these tensors (shapes and dtypes, no values)."""
    checks = TensorChecks(instance("positions", positions, torch.Tensor).device, "positions")
    at_least("batch_size", batch_size, 0)
    instance("table", table, BlockTable)
    checks.vector("positions", positions, batch_size, INTEGERS)
    checks.vector("seq_lens", seq_lens, batch_size, INTEGERS)
    checks.table("block_table", table.block_table, batch_size, 1, INTEGERS)
    at_least("block_size", table.block_size, 1)


def _check(steps: Sequence[DraftStep], limits: DraftLimits) -> None:
    if not instances("steps", steps, DraftStep):
        reject("steps", "at least one draft step", "none")
    at_least("limits.max_model_len", instance("limits", limits, DraftLimits).max_model_len, 1)
    instance("limits.past_end", limits.past_end, PastEnd)
    instance("limits.padding_slot", limits.padding_slot, int)
    checks = TensorChecks(instance("steps[0].positions", steps[0].positions, torch.Tensor).device, "steps[0].positions")
    for index, step in enumerate(steps):
        for name, dtype in (("positions", torch.int64), ("slots", torch.int64), ("seq_lens", torch.int32)):
            checks.vector(f"steps[{index}].{name}", getattr(step, name), 0, (dtype,), contiguous=True)
