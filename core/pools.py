"""Pooled index keys: what an indexer that keeps one key for `Geometry.index_kpool` tokens needs of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nsa_plugin.core.batch import BatchDescriptor, Geometry


@dataclass(frozen=True, slots=True)
class PoolMetadata:
    """One consumer's planes of pooled index keys, as views of its buffers. All are int32 with any strides, unless said.

    A pool is `index_kpool` = k tokens from a multiple of k on; it has one key once all of them are written. Shapes are in
    bs = batch_size, R = bs * rows_per_request and C = ceil(rows_per_request / k). Divisions round down, those of negative
    numbers too.

    Attributes
    ----------
    seqlens : [>= R]
        Complete pools that each row sees: `seqlens_expanded` // k.
    write_start : [>= bs]
        Position of the first token that the forward pass writes: `cache_seqlens` less the request's rows.
    tail_start : [>= bs]
        Position at which the pool of `write_start` starts.
    requests : int64 [>= bs]
        Row of the token table of each request.
    write_loc : int64 [>= bs, >= C]
        Where the keys go of the pools that the pass completes: slot of the pool's first token // k. Candidate p is pool
        `tail_start` // k + p. It is live if the pass completes it (`completed_pools`).
    page_table : [>= R, >= pooled_width] or None
        Page of each k * page_size tokens.
    accepted : [>= bs] or None
        DRAFT_EXTEND only: `BatchDescriptor.accepted`. It is left as it is where the batch has none.
    """

    seqlens: torch.Tensor
    write_start: torch.Tensor
    tail_start: torch.Tensor
    requests: torch.Tensor
    write_loc: torch.Tensor
    page_table: torch.Tensor | None = None
    accepted: torch.Tensor | None = None


PREFIX = "pools."
"""What the fields of `PoolMetadata` are called where they stand beside those of `StepMetadata`."""
POOL_TABLE = "pools.page_table"
POOL_PLANES = tuple(f"{PREFIX}{name}" for name in PoolMetadata.__dataclass_fields__ if name != "page_table")
"""The fields of `PoolMetadata` but the page table, under the names that they have beside those of `StepMetadata`."""
INT64_POOL_PLANES = ("pools.requests", "pools.write_loc")


def pool_shapes(batch: BatchDescriptor, geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Entries that each plane of pooled index keys needs, the page table's last."""
    bs, rows = batch.batch_size, batch.num_rows
    candidates = -(-batch.rows_per_request // geometry.index_kpool)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(POOL_PLANES, (bs,))
    return shapes | {
        "pools.seqlens": (rows,),
        "pools.write_loc": (bs, candidates),
        POOL_TABLE: (rows, geometry.pooled_width),
    }


def rows_of_requests(batch: BatchDescriptor) -> torch.Tensor | int:
    """Query rows of each request: int64 [batch_size], or one number for all."""
    return batch.rows_per_request if batch.extend_lens is None else batch.extend_lens[: batch.batch_size].long()


def completed_pools(batch: BatchDescriptor, geometry: Geometry, cache_seqlens: torch.Tensor) -> torch.Tensor:
    """Which entries of `write_loc` are live: those of pools that the forward pass completes. Bool [batch_size, C].

    Tokens of rows past `accepted` count as not written, and before the first token there is no pool. `cache_seqlens` are
    those of the step that is asked about.
    """
    k, rows = geometry.index_kpool, rows_of_requests(batch)
    start = cache_seqlens[: batch.batch_size].long() - rows
    written = rows if batch.accepted is None else batch.accepted[: batch.batch_size].long()
    candidate = torch.arange(pool_shapes(batch, geometry)["pools.write_loc"][1], device=start.device)
    pool = start.div(k, rounding_mode="floor")[:, None] + candidate
    return (pool >= 0) & (pool < (start + written).div(k, rounding_mode="floor")[:, None])


def allocate_pools(batch: BatchDescriptor, geometry: Geometry) -> PoolMetadata:
    """Buffers of zeros; those of `accepted` if the batch has it."""
    device = batch.seq_lens.device
    planes = {
        name.removeprefix(PREFIX): torch.zeros(
            shape, dtype=torch.int64 if name in INT64_POOL_PLANES else torch.int32, device=device
        )
        for name, shape in pool_shapes(batch, geometry).items()
        if name != "pools.accepted" or batch.accepted is not None
    }
    return PoolMetadata(**planes)
