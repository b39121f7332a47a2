"""The kernel of `fast_copy`: copies metadata to any number of consumers and reads each tile of a page table once.

Sources and destinations are tables of records (see `tiles`). The kernel is compiled once per set of planes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa_plugin.core.kernels.tiles import (
    CACHE_SEQLENS,
    CU_SEQLENS_K,
    DERIVED,
    NSA_CACHE_SEQLENS,
    NSA_CU_SEQLENS_K,
    PAGE_TABLE_1,
    POOL_ACCEPTED,
    POOL_PAGE_TABLE,
    POOL_REQUESTS,
    POOL_SEQLENS,
    POOL_TAIL_START,
    POOL_WRITE_LOC,
    POOL_WRITE_START,
    POSITIONS,
    REAL_PAGE_TABLE,
    SEQLENS_EXPANDED,
    SLOT_MAPPING,
    columns_of_tile,
    pages_of_tile,
    share_of_tiles,
    table_at,
    tiles_of_request,
    vector_at,
    wide_vector_at,
)

# fmt: off


@triton.jit
def _copy_strided(origin, origin_stride, target, target_stride, size, BLOCK: tl.constexpr):
    start = 0
    while start < size:
        index = start + tl.arange(0, BLOCK)
        values = tl.load(origin + index * origin_stride, mask=index < size)
        tl.store(target + index * target_stride, values, mask=index < size)
        start += BLOCK


@triton.jit
def _copy_optional(source, destination, field, size, LACKING: tl.constexpr, BLOCK: tl.constexpr):
    """Copy a vector; with LACKING only to a destination that has it."""
    if LACKING:
        size = tl.where(tl.load(destination + field) == 0, 0, size)
    _copy_vector(source, destination, field, size, BLOCK)


@triton.jit
def _copy_vector(source, destination, field, size, BLOCK: tl.constexpr):
    origin, origin_stride = vector_at(source, field)
    target, target_stride = vector_at(destination, field)
    _copy_strided(origin, origin_stride, target, target_stride, size, BLOCK)


@triton.jit
def _copy_wide_vector(source, destination, field, size, BLOCK: tl.constexpr):
    """Copy int64 values to a destination that has the vector."""
    size = tl.where(tl.load(destination + field) == 0, 0, size)
    origin, origin_stride = wide_vector_at(source, field)
    target, target_stride = wide_vector_at(destination, field)
    _copy_strided(origin, origin_stride, target, target_stride, size, BLOCK)


@triton.jit
def _copy_pools(source, destination, batch_size, num_rows, candidates, BLOCK: tl.constexpr):
    """Copy the vectors of pooled index keys to a destination that has them."""
    there = tl.load(destination + POOL_SEQLENS) != 0
    rows, requests = tl.where(there, num_rows, 0), tl.where(there, batch_size, 0)
    _copy_vector(source, destination, POOL_SEQLENS, rows, BLOCK)
    _copy_vector(source, destination, POOL_WRITE_START, requests, BLOCK)
    _copy_vector(source, destination, POOL_TAIL_START, requests, BLOCK)
    _copy_vector(
        source, destination, POOL_ACCEPTED, tl.where(tl.load(destination + POOL_ACCEPTED) == 0, 0, batch_size), BLOCK
    )
    _copy_wide_vector(source, destination, POOL_REQUESTS, requests, BLOCK)
    origin, origin_row = wide_vector_at(source, POOL_WRITE_LOC)
    target, target_row = wide_vector_at(destination, POOL_WRITE_LOC)
    candidate = 0
    while candidate < candidates:
        _copy_strided(
            origin + candidate * tl.load(source + POOL_WRITE_LOC + 2), origin_row,
            target + candidate * tl.load(destination + POOL_WRITE_LOC + 2), target_row, requests, BLOCK,
        )
        candidate += 1


@triton.jit
def _copy_derived(source, destination, num_derived, BLOCK: tl.constexpr):
    plane = 0
    while plane < num_derived:
        field = DERIVED + 2 * plane
        origin = tl.load(source + field).to(tl.pointer_type(tl.int32))
        target = tl.load(destination + field).to(tl.pointer_type(tl.int32))
        size = tl.load(destination + field + 1)
        start = tl.full((), 0, tl.int64)
        while start < size:
            index = start + tl.arange(0, BLOCK)
            tl.store(target + index, tl.load(origin + index, mask=index < size), mask=index < size)
            start += BLOCK
        plane += 1


@triton.jit
def _copy_tile(
    sources, destinations, num_destinations, record_words, field, row, columns, live, ALIGNED: tl.constexpr
):
    """Read part of a row of a page table once and write it to every destination that has the table."""
    origin, row_stride, column_stride = table_at(sources, field, ALIGNED)
    values = tl.load(origin + row * row_stride + columns * column_stride, mask=live)
    record = destinations
    d = 0
    while d < num_destinations:
        if tl.load(record + field) != 0:
            target, row_stride, column_stride = table_at(record, field, ALIGNED)
            tl.store(target + row * row_stride + columns * column_stride, values, mask=live)
        record += record_words
        d += 1


@triton.jit(
    do_not_specialize=[
        "live_stride", "extend_stride", "num_sources", "num_destinations", "record_words", "num_derived", "batch_size",
        "num_rows", "table_width", "rows_per_request",
    ],
    do_not_specialize_on_alignment=["live_lengths", "extend_lens", "sources", "destinations"],
)
def copy_kernel(
    live_lengths, extend_lens, sources, destinations,
    live_stride, extend_stride, num_sources, num_destinations, record_words, num_derived, batch_size, num_rows,
    table_width, rows_per_request,
    page_size: tl.constexpr, RAGGED: tl.constexpr, WIDE: tl.constexpr, REAL: tl.constexpr, LACKING: tl.constexpr,
    TOKENS: tl.constexpr, KPOOL: tl.constexpr, POOLED: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy every field of the sources to the destinations.

    Program d < num_destinations copies vectors and derived planes to destination d; the others share the page tables,
    each tile of which is read once and written to every destination. `live_lengths` says where requests end. With
    LACKING some destinations lack vectors. With KPOOL above 1 destinations may have the vectors of pooled index keys, and
    with POOLED their page table.
    """
    live_stride, extend_stride = live_stride.to(tl.int64), extend_stride.to(tl.int64)
    program = tl.program_id(0)
    if program < num_destinations:
        source = sources + tl.where(num_sources > 1, program, 0) * record_words
        destination = destinations + program * record_words
        _copy_vector(source, destination, CACHE_SEQLENS, batch_size, BLOCK)
        _copy_optional(source, destination, CU_SEQLENS_K, batch_size + 1, LACKING, BLOCK)
        _copy_optional(source, destination, SEQLENS_EXPANDED, num_rows, LACKING, BLOCK)
        _copy_optional(source, destination, NSA_CACHE_SEQLENS, num_rows, LACKING, BLOCK)
        _copy_optional(source, destination, NSA_CU_SEQLENS_K, num_rows + 1, LACKING, BLOCK)
        if TOKENS:
            _copy_wide_vector(source, destination, POSITIONS, batch_size, BLOCK)
            _copy_wide_vector(source, destination, SLOT_MAPPING, batch_size, BLOCK)
        if KPOOL > 1:
            _copy_pools(source, destination, batch_size, num_rows, tl.cdiv(rows_per_request, KPOOL), BLOCK)
        _copy_derived(source, destination, num_derived, BLOCK)
        return
    unit: tl.constexpr = 1 if WIDE else page_size
    pooled_page: tl.constexpr = page_size * KPOOL
    worker = program - num_destinations
    num_workers = tl.num_programs(0) - num_destinations
    request, tile, first_row, remaining = share_of_tiles(
        worker, num_workers, live_lengths, live_stride, extend_lens, extend_stride, batch_size, 0, table_width, unit,
        rows_per_request, TILE, RAGGED, BLOCK,
    )
    while remaining > 0:
        length, rows, stop = tiles_of_request(
            request, tile, remaining, live_lengths, live_stride, extend_lens, extend_stride, 0, table_width, unit,
            rows_per_request, TILE, RAGGED,
        )
        remaining -= stop - tile
        while tile < stop:
            if WIDE:
                columns, live = columns_of_tile(tile, length, TILE, ALIGNED)
            if REAL:
                pages = pages_of_tile(tile, TILE, page_size // unit)
                exist = pages * page_size < tl.minimum(length, (tile + 1).to(tl.int32) * TILE * unit)
            if POOLED:
                spans = pages_of_tile(tile, TILE, pooled_page // unit)
                start_here = spans * pooled_page < tl.minimum(length, (tile + 1).to(tl.int32) * TILE * unit)
            k = 0
            while k < rows:
                row = (first_row + k).to(tl.int64)
                if WIDE:
                    _copy_tile(
                        sources, destinations, num_destinations, record_words, PAGE_TABLE_1, row, columns, live, ALIGNED
                    )
                if REAL:
                    _copy_tile(
                        sources, destinations, num_destinations, record_words, REAL_PAGE_TABLE, row, pages, exist, False
                    )
                if POOLED:
                    _copy_tile(
                        sources, destinations, num_destinations, record_words, POOL_PAGE_TABLE, row, spans, start_here, False
                    )
                k += 1
            tile += 1
        first_row += rows
        request += 1
        tile = tl.full((), 0, tl.int64)
