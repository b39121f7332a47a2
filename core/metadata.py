"""The result: `StepMetadata` (one consumer's buffers) and `PrecomputedMetadata` (the planes of all steps)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch

from nsa_plugin.core.batch import BatchDescriptor, Geometry, TokenTable
from nsa_plugin.core.checks import boolean
from nsa_plugin.core.pools import (
    POOL_PLANES,
    POOL_TABLE,
    PREFIX,
    PoolMetadata,
    allocate_pools,
    completed_pools,
    pool_shapes,
)

Lackable: TypeAlias = torch.Tensor | Any
"""A tensor or None. The type checker lets those use it who know that their consumer has it, as sparse ones do."""


@dataclass(frozen=True, slots=True)
class StepMetadata:
    """One consumer's metadata, as views of its buffers. All are int32 with any strides, unless said otherwise.

    Shapes are in bs = batch_size and R = bs * rows_per_request. Only live entries are defined: in a row of a page table
    the columns below the request's cache length, in a ragged batch the rows that exist. Other entries may be stale.
    A consumer may lack what its kernels do not read: those planes are None, and nothing is computed for them.

    Attributes
    ----------
    cache_seqlens : [>= bs]
        Tokens that each request's last row sees.
    cu_seqlens_k : [>= bs + 1] or None
        0, then the running sum of `cache_seqlens`.
    seqlens_expanded : [>= R] or None
        Tokens that each row sees, at least 0. In DECODE it may be `cache_seqlens` itself. This and the next two are those
        of sparse attention: a consumer has all three or none.
    nsa_cache_seqlens : [>= R] or None
        min(seqlens_expanded, index_topk). With pooled index keys the tokens of whole pools are clipped, and those of the
        incomplete pool added.
    nsa_cu_seqlens_k : [>= R + 1] or None
        0, then the running sum of `nsa_cache_seqlens`.
    page_table_1 : [>= R, >= table_width] or None
        KV slot of each token.
    real_page_table : [>= R, >= ceil(table_width / page_size)]
        KV page of each page of tokens. With page size 1 it is `page_table_1` itself.
    derived : mapping of name to contiguous tensor of 4-byte elements
        Planes that an engine's own functions compute from the others (schedules, plans). A copy takes them whole.
    positions : int64 [>= bs] or None
        DECODE only: position of each request's newest token, `cache_seqlens` - 1 and at least 0.
    slot_mapping : int64 [>= bs] or None
        DECODE only: KV slot of that token; -1 for a request without tokens.
    pools : PoolMetadata or None
        What pooled index keys need besides (`Geometry.index_kpool` above 1, and a `TokenTable`).
    """

    cache_seqlens: torch.Tensor
    cu_seqlens_k: Lackable
    seqlens_expanded: Lackable
    nsa_cache_seqlens: Lackable
    nsa_cu_seqlens_k: Lackable
    page_table_1: torch.Tensor | None
    real_page_table: torch.Tensor
    derived: Mapping[str, torch.Tensor] = field(default_factory=dict)
    positions: torch.Tensor | None = None
    slot_mapping: torch.Tensor | None = None
    pools: PoolMetadata | None = None


VECTORS = ("cache_seqlens", "cu_seqlens_k", "seqlens_expanded", "nsa_cache_seqlens", "nsa_cu_seqlens_k")
"""The one-dimensional fields of `StepMetadata`. All but the first are optional."""
ROW_VECTORS = VECTORS[2:]
"""The vectors of sparse attention, which have an entry per query row. A consumer has all of them or none."""
TOKENS = ("positions", "slot_mapping")
"""The optional fields of `StepMetadata` that say where each request's newest token is."""
TABLES = ("page_table_1", "real_page_table")
"""The page tables of `StepMetadata`, without that of pooled index keys."""
PAGE_TABLES = (*TABLES, POOL_TABLE)
"""All page tables; `plane` finds them by these names."""
PLANES = (*VECTORS, *TOKENS, *TABLES, *POOL_PLANES, POOL_TABLE)
"""Names of all planes but the derived ones."""


def plane(step: StepMetadata, name: str) -> torch.Tensor | None:
    """The plane of `step` that has a name of `PLANES`; None if `step` lacks it."""
    if not name.startswith(PREFIX):
        value: torch.Tensor | None = getattr(step, name)
        return value
    return None if step.pools is None else getattr(step.pools, name.removeprefix(PREFIX))


@dataclass(frozen=True, slots=True)
class PrecomputedMetadata:
    """The metadata of one batch for all of its steps.

    Attributes
    ----------
    steps : tuple of StepMetadata
        One per step; a single one where all steps see the same lengths. All share the same page tables.
    batch : BatchDescriptor
        The batch that the buffers were laid out for. Its mode and sizes say which entries are live.
    geometry : Geometry
    """

    steps: tuple[StepMetadata, ...]
    batch: BatchDescriptor
    geometry: Geometry

    @classmethod
    def allocate(cls, batch: BatchDescriptor, geometry: Geometry, *, tokens: bool = False) -> PrecomputedMetadata:
        """Make fresh buffers of zeros on the batch's device; with `tokens` also `positions` and `slot_mapping`.

        They have `pools` where index keys are pooled and the slots are a `TokenTable`.

        Raises
        ------
        InvalidTypeError, InvalidValueError
            `batch` or `geometry` is not well formed, or they do not fit each other.
        """
        from nsa_plugin.core.validation import check_batch  # here, because validation imports this module

        check_batch(batch, geometry)
        boolean("tokens", tokens)

        def new(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=batch.seq_lens.device)

        bs, rows = batch.batch_size, batch.num_rows
        wide = new(rows, geometry.table_width) if geometry.wide_page_table or geometry.page_size == 1 else None
        real = wide if wide is not None and geometry.page_size == 1 else new(rows, geometry.real_width)
        pooled = geometry.index_kpool > 1 and isinstance(batch.slots, TokenTable)
        steps: list[StepMetadata] = []
        for _ in batch.offsets:
            pools = allocate_pools(batch, geometry) if pooled else None
            if pools is not None and steps and steps[0].pools is not None:
                pools = replace(pools, page_table=steps[0].pools.page_table)
            cache_seqlens = new(bs)
            expanded = cache_seqlens if batch.rows_per_request == 1 and batch.extend_lens is None else new(rows)
            steps.append(
                StepMetadata(
                    cache_seqlens=cache_seqlens,
                    cu_seqlens_k=new(bs + 1),
                    seqlens_expanded=expanded,
                    nsa_cache_seqlens=new(rows),
                    nsa_cu_seqlens_k=new(rows + 1),
                    page_table_1=wide,
                    real_page_table=real,
                    positions=new(bs, dtype=torch.int64) if tokens else None,
                    slot_mapping=new(bs, dtype=torch.int64) if tokens else None,
                    pools=pools,
                )
            )
        return cls(tuple(steps), batch, geometry)

    def step(self, index: int) -> StepMetadata:
        """Metadata of draft step `index`."""
        return self.steps[index if len(self.steps) > 1 else 0]

    def __getattr__(self, name: str) -> torch.Tensor | None:
        """The fields of step 0 under their own names."""
        if name in VECTORS or name in TOKENS or name in TABLES:
            value: torch.Tensor | None = getattr(self.steps[0], name)
            return value
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")


def planes_of(step: StepMetadata) -> Iterator[torch.Tensor]:
    """All planes that `step` has, the derived ones too."""
    yield from (value for name in PLANES if (value := plane(step, name)) is not None)
    yield from step.derived.values()


def vector_sizes(batch: BatchDescriptor) -> dict[str, int]:
    """Entries that each vector of a step needs."""
    bs, rows = batch.batch_size, batch.num_rows
    return dict(zip(VECTORS, (bs, bs + 1, rows, rows, rows + 1), strict=True))


def same_buffer(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are views that start at the same element."""
    return a is b or (a.device == b.device and a.data_ptr() == b.data_ptr() and a.numel() > 0)


def live_rows(batch: BatchDescriptor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which request each query row belongs to. Does not sync with the host.

    Returns
    -------
    request, position, count, exists : tensors [batch.num_rows] on the batch's device
        The request of each row (int64), the row's index within the request (int64), the number of rows of that request
        (int64), and whether the row exists (bool).
    """
    device = batch.seq_lens.device
    row = torch.arange(batch.num_rows, device=device)
    if batch.extend_lens is None:
        width = batch.rows_per_request
        return row // width, row % width, torch.full_like(row, width), torch.ones_like(row, dtype=torch.bool)
    counts = batch.extend_lens[: batch.batch_size].long()
    ends = counts.cumsum(0)
    request = torch.searchsorted(ends, row, right=True).clamp_(max=max(batch.batch_size - 1, 0))
    count = counts[request]
    return request, row - (ends[request] - count), count, row < counts.sum()


def live_entries(
    precomputed: PrecomputedMetadata, step: StepMetadata, index: int = 0, fields: Collection[str] = PLANES
) -> dict[str, torch.Tensor]:
    """Copies of the `fields` of `step`, by name, with every entry that is not live set to -1.

    `precomputed.step(index)` says which entries are live. Two steps are equal if these tensors are. To compare without
    a copy of page tables use `differing_fields`.
    """
    batch, geometry = precomputed.batch, precomputed.geometry
    request, _, _, exists = live_rows(batch)
    lengths = precomputed.step(index).cache_seqlens[: batch.batch_size]
    live: dict[str, torch.Tensor] = {}
    for name, shape in _vector_shapes(batch, geometry).items():
        value = plane(step, name)
        if value is None or name not in fields or (name == "pools.accepted" and batch.accepted is None):
            continue
        values = live[name] = value[tuple(slice(size) for size in shape)].clone()
        if name in ("seqlens_expanded", "nsa_cache_seqlens", "pools.seqlens"):
            values[~exists] = -1
        elif name == "nsa_cu_seqlens_k":
            values[1:][~exists] = -1
        elif name == "pools.write_loc":
            values.masked_fill_(~completed_pools(batch, geometry, lengths), -1)
    ends = lengths[request] * exists
    for name, (width, unit) in table_sizes(geometry).items():
        table = plane(step, name)
        if table is not None and name in fields:
            columns = torch.arange(width, device=table.device) * unit
            live[name] = table[: batch.num_rows, :width].masked_fill(columns >= ends[:, None], -1)
    return live


def differing_fields(expected: PrecomputedMetadata, step: StepMetadata, index: int = 0) -> list[str]:
    """Fields of `step` that differ from step `index` of `expected` in a live entry.

    A page table that `step` lacks does not differ. Page tables are compared in pieces, which takes at most
    `COMPARISON_BYTES` of memory, and 100 bytes a row.
    """
    other = expected.step(index)
    vectors = [name for name in PLANES if name not in PAGE_TABLES]
    want, have = (live_entries(expected, side, index, vectors) for side in (other, step))
    wrong = [name for name, values in have.items() if name not in want or not torch.equal(values, want[name])]
    request, _, _, exists = live_rows(expected.batch)
    ends = other.cache_seqlens[: expected.batch.batch_size][request] * exists
    for name, (width, unit) in table_sizes(expected.geometry).items():
        table, right = plane(step, name), plane(other, name)
        if table is None or table is right:
            continue
        if right is None or not _tables_are_equal(table, right, ends, width, unit):
            wrong.append(name)
    return wrong


COMPARISON_BYTES = 64 << 20
"""Largest memory of a comparison, in bytes and for tensors of any size, besides what each row takes."""
_PIECE = COMPARISON_BYTES // 16
"""Entries compared at a time. Masks, a copy of either side and column numbers take at most 16 bytes an entry."""


def equal_in_pieces(left: torch.Tensor, right: torch.Tensor) -> bool:
    """`torch.equal`, in pieces: it takes at most `COMPARISON_BYTES` of memory if no row is longer than a piece."""
    if left.shape != right.shape or left.dtype != right.dtype or left.dim() == 0:
        return torch.equal(left, right)
    rows = max(_PIECE // max(left[:1].numel(), 1), 1)
    starts = range(0, left.shape[0], rows)
    return all(torch.equal(left[row : row + rows], right[row : row + rows]) for row in starts)


def _tables_are_equal(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor, width: int, unit: int) -> bool:
    """Whether two page tables are equal in the live columns of each row: those whose first token is below its end."""
    differs = torch.zeros((), dtype=torch.bool, device=left.device)
    columns = min(width, _PIECE)
    rows = _PIECE // columns
    for row in range(0, ends.shape[0], rows):
        end = ends[row : row + rows, None]
        for column in range(0, width, columns):
            piece = (slice(row, row + end.shape[0]), slice(column, min(column + columns, width)))
            first = torch.arange(piece[1].start, piece[1].stop, dtype=torch.int32, device=left.device) * unit
            differs |= ((left[piece] != right[piece]) & (first < end)).any()
    return not differs


def table_sizes(geometry: Geometry) -> dict[str, tuple[int, int]]:
    """Columns of each page table, and tokens per column."""
    page, pooled = geometry.page_size, geometry.page_size * geometry.index_kpool
    widths = ((geometry.table_width, 1), (geometry.real_width, page), (geometry.pooled_width, pooled))
    return dict(zip(PAGE_TABLES, widths, strict=True))


def _vector_shapes(batch: BatchDescriptor, geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Live part of each plane that is no page table."""
    vectors: dict[str, tuple[int, ...]] = {name: (size,) for name, size in vector_sizes(batch).items()}
    pools = {name: shape for name, shape in pool_shapes(batch, geometry).items() if name != POOL_TABLE}
    return vectors | dict.fromkeys(TOKENS, (batch.batch_size,)) | pools
