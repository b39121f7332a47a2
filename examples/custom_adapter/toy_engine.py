"""A toy inference engine: the part that prepares attention metadata for a multi-step draft and for its verification.

Before a captured graph runs again, `Forward.prepare` writes the metadata of every step into the buffers from which the
graph's kernels read, one step after another, each from scratch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__version__ = "1.4"
PAGE_SIZE = 16
TOP_K = 64


@dataclass
class Batch:
    """`size` requests: rows of the slot table, and tokens that each has; columns of the scheduler's table."""

    size: int
    requests: torch.Tensor
    lengths: torch.Tensor


@dataclass
class StepBuffers:
    """What the attention kernels of one step read, int32. A request has `width` query rows."""

    lengths: torch.Tensor
    starts: torch.Tensor
    row_lengths: torch.Tensor
    kept: torch.Tensor
    kept_starts: torch.Tensor
    pages: torch.Tensor


class Forward:
    """A draft of several steps, where step i sees i + 1 more tokens, or the verification of `draft_tokens` tokens.

    `slots` [requests, tokens] says where the KV cache of each token is.
    """

    def __init__(self, slots: torch.Tensor, num_steps: int = 1, draft_tokens: int = 0) -> None:
        self.slots = slots
        self.num_steps = num_steps
        self.draft_tokens = draft_tokens
        self.width = draft_tokens or 1
        self.captured: dict[int, list[StepBuffers]] = {}

    def capture(self, batch: Batch) -> None:
        """Make the buffers for a batch size; graphs are captured with them afterwards."""
        self.captured[batch.size] = [self._allocate(batch.size) for _ in range(self.num_steps)]
        self.prepare(batch)

    def prepare(self, batch: Any) -> None:
        """Write the metadata of every step. `batch` has the attributes of `Batch`; at replay it is a namespace."""
        for step, out in enumerate(self.captured[batch.size]):
            lengths = batch.lengths[: batch.size] + (self.draft_tokens or step + 1)
            requests = batch.requests[: batch.size].long()
            rows = torch.arange(self.width, device=lengths.device)
            out.lengths.copy_(lengths)
            out.row_lengths.copy_((lengths[:, None] - self.width + rows + 1).flatten())
            out.kept.copy_(out.row_lengths.clamp(max=TOP_K))
            out.starts[1:].copy_(out.lengths.cumsum(0))
            out.kept_starts[1:].copy_(out.kept.cumsum(0))
            out.pages.copy_((self.slots[requests, ::PAGE_SIZE] // PAGE_SIZE).repeat_interleave(self.width, 0))

    def _allocate(self, size: int) -> StepBuffers:
        rows, pages = size * self.width, -(-self.slots.shape[1] // PAGE_SIZE)
        shapes = ((size,), (size + 1,), (rows,), (rows,), (rows + 1,), (rows, pages))
        return StepBuffers(*(torch.zeros(shape, dtype=torch.int32, device=self.slots.device) for shape in shapes))
