"""Runs at every draft: what Model Runner V1 builds for the first draft step of a batch shape is kept for all later ones.

A draft step has one query token per request, whatever came before. For the rows of `builders` that have a `Keeper`, all
that then changes from step to step are the sequence lengths, and the indexer's DeepGEMM schedule that follows from them;
all that changes from draft to draft are values in buffers that keep their addresses. So vLLM's own builder is asked once
per batch size, and its answer is kept, with every buffer that it writes for other batches too replaced by one that only
draft steps use.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nsa_plugin.adapters.probe import Need
from nsa_plugin.adapters.vllm.deep_gemm import scheduler
from nsa_plugin.adapters.vllm.releases import ones_of


@dataclass(frozen=True)
class DecodeBatch:
    """A batch of one query token per request, as kept metadata refers to it.

    Attributes
    ----------
    size : int
        Requests.
    seq_lens : sequence of int32 tensor [size]
        Lengths at each draft step, each in a place of its own.
    block_table : int32 tensor [size, blocks]
    request_map, ones : int32 tensors [size]
        0, 1, 2, …: the request of each token; and the query length of each request.
    """

    size: int
    seq_lens: Sequence[torch.Tensor]
    block_table: torch.Tensor
    request_map: torch.Tensor
    ones: torch.Tensor


@dataclass(frozen=True)
class KeptSteps:
    """The metadata of every draft step of one attention group."""

    steps: Sequence[Any]
    refresh: Callable[[Any], None] | None

    def at(self, step: int, max_seq_len: int) -> Any:
        """The metadata of a draft step, right for the lengths that are there now."""
        metadata = self.steps[step]
        metadata.max_seq_len = max_seq_len
        if self.refresh is not None:
            self.refresh(metadata)
        return metadata


@dataclass(frozen=True)
class Keeper:
    """How the metadata of a row of `builders` is kept.

    Attributes
    ----------
    needs : tuple of Need
        What it takes for granted.
    keep : callable
        `keep(builder, built, batch)`: the steps, from what vLLM built for the first one; None if they can't be kept.
    """

    needs: tuple[Need, ...]
    keep: Callable[[Any, Any, DecodeBatch], KeptSteps | None]


def keep_sparse(builder: Any, built: Any, batch: DecodeBatch) -> KeptSteps | None:
    """Kept: counts, views of the proposer's buffers, the block table, constants, and FlashMLA's scheduler object.

    FlashMLA lets that object be reused while shapes, `cache_seqlens` and `topk_length` stay the same: vLLM passes a
    constant for the one and nothing for the other.
    """
    if built.num_prefills or built.num_decode_tokens != batch.size or built.prefill is not None:
        return None
    steps = []
    for seq_lens in batch.seq_lens:
        step = copy.copy(built)
        step.seq_lens = seq_lens
        step.req_id_per_token = batch.request_map
        decode = getattr(getattr(built, "fp8_extra_metadata", None), "decode", None)
        if decode is not None:  # FlashMLA with separate prefill and decode
            step.fp8_extra_metadata = copy.copy(built.fp8_extra_metadata)
            step.fp8_extra_metadata.decode = dataclasses.replace(decode, seq_lens=seq_lens)
        steps.append(step)
    return KeptSteps(steps, None)


def keep_indexer(builder: Any, built: Any, batch: DecodeBatch) -> KeptSteps | None:
    """Kept: all but lengths and schedule. The block table is the batch's, of which flattening makes a copy."""
    decode = built.decode
    if built.prefill is not None or decode is None or built.num_decode_tokens != batch.size:
        return None
    if decode.global_seq_lens is not None or decode.block_table.shape != batch.block_table.shape:
        return None
    steps = []
    for seq_lens in batch.seq_lens:
        step = copy.copy(built)
        step.seq_lens = seq_lens
        step.decode = dataclasses.replace(
            decode,
            seq_lens=seq_lens.unsqueeze(-1),
            block_table=batch.block_table,
            **dict.fromkeys(ones_of(decode), batch.ones),
            indices=None if decode.indices is None else batch.request_map,
        )
        steps.append(step)
    return KeptSteps(steps, _schedule(builder))


def _schedule(builder: Any) -> Callable[[Any], None] | None:
    """Recomputes DeepGEMM's schedule where the builder has one."""
    schedule = scheduler(builder)
    if schedule is None:
        return None

    def refresh(metadata: Any) -> None:
        metadata.decode.schedule_metadata = schedule(metadata.decode)

    return refresh
