"""Runs at capture: vLLM's batches in this package's words. Copies no tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nsa_plugin.core.batch import BatchDescriptor, BlockTable, ForwardMode, Geometry, multiprocessors


def describe(batch: Any, *, block_size: int, draft_steps: int = 0) -> BatchDescriptor:
    """Describe a `CommonAttentionMetadata`, which both of vLLM's model runners make.

    Parameters
    ----------
    batch : has num_reqs, max_query_len, query_start_loc and query_start_loc_cpu [num_reqs + 1], seq_lens [>= num_reqs] and
        block_table_tensor [>= num_reqs, blocks]; lengths include the batch's own query tokens
    block_size : int
        Tokens per entry of the block table.
    draft_steps : int
        0 for the batch itself: DECODE with one query token per request, else DRAFT_EXTEND, which is what a verification is
        in vLLM, whose lengths have the draft tokens already. With K - 1 the draft steps after the batch, one token longer each.

    Raises
    ------
    ValueError
        Requests of several query tokens each, of different numbers: their number is not a tensor of vLLM's.
    """
    width = batch.max_query_len
    slots = BlockTable(batch.block_table_tensor, block_size)
    if draft_steps:
        offsets = tuple(range(1, draft_steps + 1))
        return BatchDescriptor(ForwardMode.DECODE, batch.num_reqs, batch.seq_lens, slots, draft_steps, offsets)
    if width == 1:
        return BatchDescriptor(ForwardMode.DECODE, batch.num_reqs, batch.seq_lens, slots)
    if int(batch.query_start_loc_cpu[batch.num_reqs]) != width * batch.num_reqs:
        raise ValueError(
            f"query tokens: expected {width} of each request, got {batch.query_start_loc_cpu[: batch.num_reqs + 1].diff().tolist()}"
        )
    return BatchDescriptor(ForwardMode.DRAFT_EXTEND, batch.num_reqs, batch.seq_lens, slots, draft_tokens=width)


@dataclass(frozen=True)
class DraftBatch:
    """The draft steps that follow what Model Runner V2 has left in its buffers. vLLM has no object for them.

    Attributes
    ----------
    input_buffers : InputBuffers
        Of the speculator, as `prepare_decode_inputs` leaves them: `seq_lens` are those of the first draft step.
    block_tables : BlockTables
        `gather_block_tables` has put the batch's rows into its `input_block_tables`.
    num_reqs : int
        Requests: with padding while the draft is captured, without it afterwards.
    draft_steps : int
        K - 1: the first token was drafted by the prefill.
    group : int
        KV-cache group whose slots count.
    """

    input_buffers: Any
    block_tables: Any
    num_reqs: int
    draft_steps: int
    group: int = 0


def describe_draft(batch: Any) -> BatchDescriptor:
    """Describe a `DraftBatch`, or what has its attributes."""
    tables, group = batch.block_tables, batch.group
    slots = BlockTable(tables.input_block_tables[group], tables.block_sizes[group])
    lengths, offsets = batch.input_buffers.seq_lens, tuple(range(batch.draft_steps))
    return BatchDescriptor(ForwardMode.DECODE, batch.num_reqs, lengths, slots, batch.draft_steps, offsets)


def geometry(builder: Any, batch: BatchDescriptor) -> Geometry:
    """Constants of a sparse MLA builder's model: positions up to the model's length, pages of the cache's block size."""
    longest: int = builder.model_config.max_model_len
    return positions_geometry(batch, longest, builder.kv_cache_spec.block_size, builder.topk_tokens)


def positions_geometry(batch: BatchDescriptor, longest: int, block_size: int, topk: int | None = None) -> Geometry:
    """The same by its numbers: positions up to `longest`, pages of `block_size` tokens; all of them count without `topk`."""
    return Geometry(
        index_topk=longest if topk is None else topk,
        page_size=block_size,
        table_width=longest,
        num_sms=multiprocessors(batch.seq_lens.device),
        wide_page_table=False,
    )


@dataclass(frozen=True)
class TargetBatch:
    """A uniform batch of tokens to verify, padded to a captured size: what `prepare_attn` of a model's state is given.

    Attributes
    ----------
    input_batch : InputBatch
        Its lengths have the tokens to verify already.
    block_tables : tuple of int32 tensors [requests, blocks]
        One per KV-cache group.
    block_size : int
        Tokens per entry of the first one.
    """

    input_batch: Any
    block_tables: Any
    block_size: int


def describe_target(batch: Any) -> BatchDescriptor:
    """Describe a `TargetBatch`, or what has its attributes. Padding is what its `query_start_loc` leaves out."""
    given = batch.input_batch
    requests = given.num_reqs_after_padding
    slots = BlockTable(batch.block_tables[0], batch.block_size)
    width = given.num_tokens_after_padding // requests
    return BatchDescriptor(
        ForwardMode.DRAFT_EXTEND, requests, given.seq_lens, slots, draft_tokens=width,
        query_start_loc=given.query_start_loc,
    )  # fmt: skip
