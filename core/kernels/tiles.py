"""Functions of the metadata and copy kernels: destination records, and page tables cut into tiles of live columns.

Every program finds its equal share of all tiles from the lengths on the device. So the host reads nothing, and no
program reads a column that is not live.

Strides are int64 where they are multiplied. Records store them as int64; arguments are cast once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa_plugin.core.records import FIRST_DERIVED, WORD

# Words of a destination's record, as `core.records` lays it out.
OFFSET: tl.constexpr = tl.constexpr(0)
CACHE_SEQLENS: tl.constexpr = tl.constexpr(WORD["cache_seqlens"])
CU_SEQLENS_K: tl.constexpr = tl.constexpr(WORD["cu_seqlens_k"])
SEQLENS_EXPANDED: tl.constexpr = tl.constexpr(WORD["seqlens_expanded"])
NSA_CACHE_SEQLENS: tl.constexpr = tl.constexpr(WORD["nsa_cache_seqlens"])
NSA_CU_SEQLENS_K: tl.constexpr = tl.constexpr(WORD["nsa_cu_seqlens_k"])
PAGE_TABLE_1: tl.constexpr = tl.constexpr(WORD["page_table_1"])
REAL_PAGE_TABLE: tl.constexpr = tl.constexpr(WORD["real_page_table"])
POSITIONS: tl.constexpr = tl.constexpr(WORD["positions"])
SLOT_MAPPING: tl.constexpr = tl.constexpr(WORD["slot_mapping"])
POOL_SEQLENS: tl.constexpr = tl.constexpr(WORD["pools.seqlens"])
POOL_WRITE_START: tl.constexpr = tl.constexpr(WORD["pools.write_start"])
POOL_TAIL_START: tl.constexpr = tl.constexpr(WORD["pools.tail_start"])
POOL_REQUESTS: tl.constexpr = tl.constexpr(WORD["pools.requests"])
POOL_WRITE_LOC: tl.constexpr = tl.constexpr(WORD["pools.write_loc"])
POOL_ACCEPTED: tl.constexpr = tl.constexpr(WORD["pools.accepted"])
POOL_PAGE_TABLE: tl.constexpr = tl.constexpr(WORD["pools.page_table"])
MAPPED_PAGE_TABLE: tl.constexpr = tl.constexpr(WORD["mapped_page_table"])
MAPPED_SLOTS: tl.constexpr = tl.constexpr(WORD["mapped_slots"])
DERIVED: tl.constexpr = tl.constexpr(FIRST_DERIVED)

# fmt: off


@triton.jit
def vector_at(record, field):
    """Address and stride of a vector."""
    return tl.load(record + field).to(tl.pointer_type(tl.int32)), tl.load(record + field + 1)


@triton.jit
def wide_vector_at(record, field):
    """Address and stride of an int64 vector."""
    return tl.load(record + field).to(tl.pointer_type(tl.int64)), tl.load(record + field + 1)


@triton.jit
def table_at(record, field, ALIGNED: tl.constexpr):
    """Address, row stride and column stride of a page table."""
    address = tl.load(record + field).to(tl.pointer_type(tl.int32))
    row_stride = tl.load(record + field + 1)
    if ALIGNED:
        return tl.multiple_of(address, 16), tl.multiple_of(row_stride, 4), tl.full((), 1, tl.int64)
    else:
        return address, row_stride, tl.load(record + field + 2)


@triton.jit
def _requests_at(
    first, lengths, length_stride, extend_lens, extend_stride, batch_size, added, limit, unit,
    TILE: tl.constexpr, RAGGED: tl.constexpr, BLOCK: tl.constexpr,
):
    """Tiles and rows of each of `BLOCK` requests from `first` on; 0 past the batch. Rows only if RAGGED, else 0."""
    request = first + tl.arange(0, BLOCK)
    there = request < batch_size
    length = tl.load(lengths + request * length_stride, mask=there, other=0).to(tl.int32) + added
    columns = tl.cdiv(tl.minimum(length, limit), unit)
    tiles = tl.where(there & (columns > 0), tl.cdiv(columns, TILE), 0)
    rows = tl.zeros((BLOCK,), tl.int32)
    if RAGGED:
        rows = tl.load(extend_lens + request * extend_stride, mask=there, other=0).to(tl.int32)
        tiles = tl.where(rows > 0, tiles, 0)
    return tiles, rows


@triton.jit
def share_of_tiles(
    worker, num_workers, lengths, length_stride, extend_lens, extend_stride, batch_size, added, limit, unit,
    rows_per_request, TILE: tl.constexpr, RAGGED: tl.constexpr, BLOCK: tl.constexpr,
):
    """This worker's contiguous share of all tiles: its first request, tile and row, and its number of tiles."""
    total = tl.full((), 0, tl.int64)
    start = 0
    while start < batch_size:
        tiles, rows = _requests_at(
            start, lengths, length_stride, extend_lens, extend_stride, batch_size, added, limit, unit, TILE, RAGGED, BLOCK
        )
        total += tl.sum(tiles, 0)
        start += BLOCK
    first = worker * total // num_workers
    count = (worker + 1) * total // num_workers - first
    request = tl.full((), 0, tl.int32)
    first_row = tl.full((), 0, tl.int32)
    passed = tl.full((), 0, tl.int64)
    seen = tl.full((), 0, tl.int64)
    start = 0
    while start < batch_size:
        tiles, rows = _requests_at(
            start, lengths, length_stride, extend_lens, extend_stride, batch_size, added, limit, unit, TILE, RAGGED, BLOCK
        )
        before = (seen + tl.cumsum(tiles, 0) <= first) & (start + tl.arange(0, BLOCK) < batch_size)
        request += tl.sum(before.to(tl.int32), 0)
        passed += tl.sum(tl.where(before, tiles, 0), 0)
        if RAGGED:
            first_row += tl.sum(tl.where(before, rows, 0), 0)
        seen += tl.sum(tiles, 0)
        start += BLOCK
    if not RAGGED:
        first_row = request * rows_per_request
    return request, first - passed, first_row, count


@triton.jit
def tiles_of_request(
    request, tile, remaining, lengths, length_stride, extend_lens, extend_stride, added, table_width, unit,
    rows_per_request, TILE: tl.constexpr, RAGGED: tl.constexpr,
):
    """Live columns and rows of a request, and the tile of the request before which this worker stops."""
    length = tl.minimum(tl.load(lengths + request * length_stride).to(tl.int32) + added, table_width)
    rows = rows_per_request
    if RAGGED:
        rows = tl.load(extend_lens + request * extend_stride).to(tl.int32)
    num_tiles = tl.where((rows > 0) & (length > 0), tl.cdiv(tl.cdiv(length, unit), TILE), 0)
    return length, rows, tl.minimum(tile + remaining, num_tiles)


@triton.jit
def columns_of_tile(tile, length, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """Columns of a tile of the wide page table, and which of them may be written.

    Aligned rows are written in 16-byte words: of the last live word the columns that are not live are written too.
    """
    if ALIGNED:
        length = tl.multiple_of(tl.cdiv(length, 4) * 4, 4)
    columns = tl.multiple_of((tile * TILE).to(tl.int32), TILE) + tl.arange(0, TILE)
    return columns, columns < length


@triton.jit
def pages_of_tile(tile, TILE: tl.constexpr, columns_per_page: tl.constexpr):
    """Pages that start in a tile, for a page table with `columns_per_page` of the columns that tiles are cut from."""
    if columns_per_page <= TILE:
        return (tile * (TILE // columns_per_page)).to(tl.int32) + tl.arange(0, TILE // columns_per_page)
    else:  # at most one
        return tl.cdiv(tile * TILE, columns_per_page).to(tl.int32) + tl.arange(0, 1)
