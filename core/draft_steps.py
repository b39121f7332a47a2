"""Position, KV slot and sequence length of every request at every draft step, filled in one launch.

They follow from positions and lengths before the first step, and from the block table. The definition is
`reference.draft_steps`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from nsa_plugin.core import reference, triton_binding
from nsa_plugin.core.api import Impl, resolve_impl
from nsa_plugin.core.batch import PAD_SLOT, BlockTable
from nsa_plugin.core.checks import INTEGERS, TensorChecks, at_least, function, instance, instances
from nsa_plugin.core.errors import reject


class PastEnd(enum.Enum):
    """What becomes of a request whose next position would be `max_model_len` or more."""

    PAD = "pad"
    """It gets position 0, length 1 and the padding slot, and the next step continues from there (vLLM's runner V1)."""
    CLAMP = "clamp"
    """It stays at the last position and in that position's slot (vLLM's runner V2)."""


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """Limits of the positions of a draft.

    Parameters
    ----------
    max_model_len : int >= 1
        Number of positions that a request can have, and so its longest length in tokens.
    past_end : PastEnd
    padding_slot : int
        Slot of a token that is not written to the KV cache.
    """

    max_model_len: int
    past_end: PastEnd
    padding_slot: int = PAD_SLOT

    @property
    def pads(self) -> bool:
        """Whether a request past the end becomes padding."""
        return self.past_end is PastEnd.PAD


@dataclass(frozen=True, slots=True)
class DraftStep:
    """Destination of one draft step.

    Parameters
    ----------
    positions : int64 tensor [>= batch_size], contiguous
    slots : int64 tensor [>= num_rows], contiguous
        Rows `batch_size` to `num_rows` - 1 (padding of a CUDA graph) get the padding slot.
    seq_lens : int32 tensor [>= batch_size], contiguous
        Tokens that the step's query sees, itself included.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    seq_lens: torch.Tensor


FillDraftSteps = Callable[[torch.Tensor, torch.Tensor, BlockTable, int, int], None]
"""`fill(positions, seq_lens, table, batch_size, num_rows)`, see `bind_draft_steps`."""


BindDraftSteps = Callable[[Sequence[DraftStep], DraftLimits], FillDraftSteps | None]
"""Provides a `fill` bound to these destinations, or None for the built-in one."""


def bind_draft_steps(
    steps: Sequence[DraftStep], limits: DraftLimits, *, impl: Impl = "auto", bind: BindDraftSteps | None = None
) -> FillDraftSteps:
    """Bind the destinations of consecutive draft steps to a function that fills all of them.

    Parameters
    ----------
    steps : sequence of DraftStep
        Destinations, at least one. Step i is one token after step i - 1.
    limits : DraftLimits
    impl : "auto", "reference" or "triton"
        As in `precompute`. With Triton `fill` is one launch.
    bind : BindDraftSteps, optional
        Provides an implementation. `impl` is used without it, or where it returns None.

    Returns
    -------
    fill : callable (positions, seq_lens, table, batch_size, num_rows) -> None
        `positions` and `seq_lens` are those before the first step: int32 or int64 [>= batch_size], any stride.
        `table` is the BlockTable of the batch. `num_rows` is `batch_size` with the padding of a CUDA graph.
        With Triton `fill` allocates nothing and does not sync. It checks nothing: `check_source` does.
        With a single step, the sources may be its destinations (an update in place).

    Raises
    ------
    InvalidTypeError, InvalidValueError
        A destination has another dtype, device or layout than `DraftStep` says, or a limit is out of range.
    UnavailableError
        `impl` can't run here.
    """
    _check(steps, limits)
    function("bind", bind, optional=True)
    if bind is not None and (provided := bind(steps, limits)) is not None:
        return provided
    if resolve_impl(impl, steps[0].positions.device) == "triton":
        return triton_binding.bind_draft_steps(steps, limits)
    return lambda *batch: reference.draft_steps(steps, limits, *batch)


def check_source(positions: torch.Tensor, seq_lens: torch.Tensor, table: BlockTable, batch_size: int) -> None:
    """Raise unless `fill` can read `batch_size` requests from these tensors. Checks shapes and dtypes, no values."""
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
