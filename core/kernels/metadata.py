"""The kernel of `precompute`: writes the metadata of a batch to any number of consumers.

Destinations are a table of records (addresses and strides, see `tiles`). Their number, the batch's size and its lengths
are data: the kernel is compiled once per mode and set of dtypes, not per shape.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa_plugin.core.kernels.mapped import mapped_pages, write_mapped_slots
from nsa_plugin.core.kernels.pools import clip_to_pools, write_pools
from nsa_plugin.core.kernels.tiles import (
    CACHE_SEQLENS,
    CU_SEQLENS_K,
    MAPPED_PAGE_TABLE,
    NSA_CACHE_SEQLENS,
    NSA_CU_SEQLENS_K,
    OFFSET,
    PAGE_TABLE_1,
    POOL_PAGE_TABLE,
    POOL_SEQLENS,
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
)

# fmt: off


@triton.jit
def _slots(source, columns, live, column_stride, block_size, TOKEN_TABLE: tl.constexpr):
    """KV slots of token positions of one request, from its row of the token or block table."""
    if TOKEN_TABLE:
        return tl.load(source + columns * column_stride, mask=live, other=0).to(tl.int32)
    else:
        block = columns // block_size
        first = tl.load(source + block * column_stride, mask=live, other=0).to(tl.int32) * block_size
        return first + columns - block * block_size


@triton.jit
def _write_request_vectors(
    seq_lens, seq_stride, record, batch_size, added, limit, on, SUMS: tl.constexpr, BLOCK: tl.constexpr
):
    """cache_seqlens, and with SUMS cu_seqlens_k, of one destination."""
    cache_seqlens, cache_stride = vector_at(record, CACHE_SEQLENS)
    cu_seqlens, cu_stride = vector_at(record, CU_SEQLENS_K)
    added += tl.load(record + OFFSET).to(tl.int32)
    end = tl.where(on, batch_size, 0)
    running = tl.full((), 0, tl.int32)
    if SUMS:
        tl.store(cu_seqlens, running, mask=on)
    start = 0
    while start < batch_size:
        request = start + tl.arange(0, BLOCK)
        there = request < batch_size
        length = tl.load(seq_lens + request * seq_stride, mask=there, other=0).to(tl.int32) + added
        length = tl.where(there, tl.minimum(length, limit), 0)
        written = request < end
        tl.store(cache_seqlens + request * cache_stride, length, mask=written)
        if SUMS:
            tl.store(cu_seqlens + (request + 1) * cu_stride, running + tl.cumsum(length, 0), mask=written)
            running += tl.sum(length, 0)
        start += BLOCK


@triton.jit
def _write_tokens(
    seq_lens, seq_stride, req_pool_indices, pool_stride, table, row_stride, column_stride, record, batch_size, added, limit,
    block_size, on, TOKEN_TABLE: tl.constexpr, BLOCK: tl.constexpr,
):
    """positions and slot_mapping of one destination, if it has them."""
    batch_size = tl.where(tl.load(record + POSITIONS) == 0, 0, batch_size)
    positions = tl.load(record + POSITIONS).to(tl.pointer_type(tl.int64))
    position_stride = tl.load(record + POSITIONS + 1)
    slot_mapping = tl.load(record + SLOT_MAPPING).to(tl.pointer_type(tl.int64))
    slot_stride = tl.load(record + SLOT_MAPPING + 1)
    added += tl.load(record + OFFSET).to(tl.int32)
    end = tl.where(on, batch_size, 0)
    start = 0
    while start < batch_size:
        request = start + tl.arange(0, BLOCK)
        there = request < batch_size
        length = tl.load(seq_lens + request * seq_stride, mask=there, other=0).to(tl.int32) + added
        length = tl.minimum(length, limit)
        position = tl.maximum(length - 1, 0)
        row = request.to(tl.int64)
        if TOKEN_TABLE:
            row = tl.load(req_pool_indices + request * pool_stride, mask=there, other=0).to(tl.int64)
        slot = _slots(table + row * row_stride, position, there & (length > 0), column_stride, block_size, TOKEN_TABLE)
        written = request < end
        tl.store(positions + request * position_stride, position.to(tl.int64), mask=written)
        tl.store(slot_mapping + request * slot_stride, tl.where(length > 0, slot, -1).to(tl.int64), mask=written)
        start += BLOCK


@triton.jit
def _write_row_vectors(
    seq_lens, seq_stride, extend_lens, extend_stride, record, batch_size, added, limit, index_topk, rows_per_request,
    on, RAGGED: tl.constexpr, KPOOL: tl.constexpr, POOLS: tl.constexpr, BLOCK: tl.constexpr,
):
    """seqlens_expanded, nsa_cache_seqlens, nsa_cu_seqlens_k and the complete pools of rows, of one destination."""
    expanded, expanded_stride = vector_at(record, SEQLENS_EXPANDED)
    clipped, clipped_stride = vector_at(record, NSA_CACHE_SEQLENS)
    cu_clipped, cu_stride = vector_at(record, NSA_CU_SEQLENS_K)
    added += tl.load(record + OFFSET).to(tl.int32)
    end = tl.where(on, batch_size, 0)
    running = tl.full((), 0, tl.int32)
    first_row = tl.full((), 0, tl.int32)
    tl.store(cu_clipped, running, mask=on)
    start = 0
    while start < batch_size * rows_per_request:
        candidate = start + tl.arange(0, BLOCK)
        request = candidate // rows_per_request
        position = candidate - request * rows_per_request
        there = request < batch_size
        if RAGGED:
            rows = tl.load(extend_lens + request * extend_stride, mask=there, other=0).to(tl.int32)
            there = there & (position < rows)
            row = first_row + tl.cumsum(there.to(tl.int32), 0) - 1
            first_row += tl.sum(there.to(tl.int32), 0)
        else:
            rows = rows_per_request
            row = candidate
        length = tl.load(seq_lens + request * seq_stride, mask=there, other=0).to(tl.int32) + added
        visible = tl.maximum(tl.minimum(length, limit) - rows + position + 1, 0)
        if KPOOL > 1:
            kept = tl.where(there, clip_to_pools(visible, index_topk, KPOOL), 0)
        else:
            kept = tl.where(there, tl.minimum(visible, index_topk), 0)
        written = there & (request < end)
        if POOLS:
            pools, pools_stride = vector_at(record, POOL_SEQLENS)
            tl.store(pools + row * pools_stride, visible // KPOOL, mask=written)
        tl.store(expanded + row * expanded_stride, visible, mask=written)
        tl.store(clipped + row * clipped_stride, kept, mask=written)
        tl.store(cu_clipped + (row + 1) * cu_stride, running + tl.cumsum(kept, 0), mask=written)
        running += tl.sum(kept, 0)
        start += BLOCK


@triton.jit(
    do_not_specialize=[
        "seq_stride", "extend_stride", "pool_stride", "table_row_stride", "table_column_stride", "num_destinations",
        "num_tables", "record_words", "batch_size", "added", "longest_added", "limit", "table_width", "index_topk",
        "rows_per_request", "block_size", "accepted_stride",
        "written_row_stride", "written_column_stride", "num_written",
    ],
    do_not_specialize_on_alignment=[
        "seq_lens", "extend_lens", "req_pool_indices", "destinations", "enabled", "accepted", "mapping", "written",
    ],
)
def metadata_kernel(
    seq_lens, extend_lens, accepted, req_pool_indices, table, destinations, enabled, mapping, written,
    seq_stride, extend_stride, accepted_stride, pool_stride, table_row_stride, table_column_stride, num_destinations, num_tables,
    record_words, batch_size, added, longest_added, limit, table_width, index_topk, rows_per_request, block_size,
    written_row_stride, written_column_stride, num_written,
    page_size: tl.constexpr, TOKEN_TABLE: tl.constexpr, RAGGED: tl.constexpr, WIDE: tl.constexpr, REAL: tl.constexpr,
    SUMS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, KPOOL: tl.constexpr, POOLS: tl.constexpr,
    POOLED: tl.constexpr, ACCEPTED: tl.constexpr, MAPPED: tl.constexpr, SWITCHED: tl.constexpr,
    ALIGNED: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Metadata of one batch.

    Programs 2 * d and 2 * d + 1 write the vectors of destination d: those of requests, then those of rows. All further
    programs share the page tables of the first `num_tables` destinations. They read each tile once and write it to all.
    SUMS and ROWS say whether destinations have cu_seqlens_k and the vectors of sparse attention. POOLS and POOLED say
    whether they have vectors and page tables of pooled index keys; without KPOOL above 1 they have none. MAPPED says
    whether they have slots and pages of a second cache.

    With SWITCHED nothing is written where the int32 at `enabled` is 0. The flag is loaded first and used last, so that
    no load of lengths waits for it.
    """
    flag = tl.full((), 1, tl.int32)
    if SWITCHED:
        flag = tl.load(enabled)
    on = flag != 0
    seq_stride, extend_stride, pool_stride = seq_stride.to(tl.int64), extend_stride.to(tl.int64), pool_stride.to(tl.int64)
    column_stride = table_column_stride.to(tl.int64)
    program = tl.program_id(0)
    if program < 2 * num_destinations:
        record = destinations + (program // 2) * record_words
        if program % 2 == 0:
            _write_request_vectors(seq_lens, seq_stride, record, batch_size, added, limit, on, SUMS, BLOCK)
            if TOKENS:
                _write_tokens(
                    seq_lens, seq_stride, req_pool_indices, pool_stride, table, table_row_stride, column_stride,
                    record, batch_size, added, limit, block_size, on, TOKEN_TABLE, BLOCK,
                )
            if POOLS:
                write_pools(
                    seq_lens, seq_stride, extend_lens, extend_stride, accepted, accepted_stride.to(tl.int64),
                    req_pool_indices, pool_stride, table, table_row_stride, column_stride, record, batch_size, added, limit,
                    table_width, rows_per_request, on, RAGGED, ACCEPTED, KPOOL, BLOCK,
                )
        else:
            if ROWS:
                _write_row_vectors(
                    seq_lens, seq_stride, extend_lens, extend_stride, record, batch_size, added, limit, index_topk,
                    rows_per_request, on, RAGGED, KPOOL, POOLS, BLOCK,
                )
            if MAPPED:
                write_mapped_slots(
                    mapping, written, written_row_stride.to(tl.int64), written_column_stride.to(tl.int64), num_written,
                    program // 2, record, on, BLOCK,
                )
        return
    # Without the wide page table only the first column of each page is read.
    unit: tl.constexpr = 1 if WIDE else page_size
    pooled_page: tl.constexpr = page_size * KPOOL
    worker = program - 2 * num_destinations
    num_workers = tl.num_programs(0) - 2 * num_destinations
    request, tile, first_row, remaining = share_of_tiles(
        worker, num_workers, seq_lens, seq_stride, extend_lens, extend_stride, batch_size, longest_added, table_width, unit,
        rows_per_request, TILE, RAGGED, BLOCK,
    )
    remaining = tl.where(on, remaining, 0)
    if ALIGNED:
        column_stride = 1
    wide, wide_row, wide_column = table_at(destinations, PAGE_TABLE_1, ALIGNED)
    real, real_row, real_column = table_at(destinations, REAL_PAGE_TABLE, False)
    if POOLED:
        pooled, pooled_row, pooled_column = table_at(destinations, POOL_PAGE_TABLE, False)
    if MAPPED:  # one set of tables, as nothing is copied
        mapped, mapped_row, mapped_column = table_at(destinations, MAPPED_PAGE_TABLE, False)
    while remaining > 0:
        length, rows, stop = tiles_of_request(
            request, tile, remaining, seq_lens, seq_stride, extend_lens, extend_stride, longest_added, table_width, unit,
            rows_per_request, TILE, RAGGED,
        )
        remaining -= stop - tile
        table_row = request.to(tl.int64)
        if TOKEN_TABLE:
            table_row = tl.load(req_pool_indices + request * pool_stride).to(tl.int64)
        source = table + table_row * table_row_stride
        if ALIGNED:
            source = table + tl.multiple_of(table_row * table_row_stride, 4)
        while tile < stop:
            if WIDE:
                columns, live = columns_of_tile(tile, length, TILE, ALIGNED)
                slots = _slots(source, columns, live, column_stride, block_size, TOKEN_TABLE)
            if REAL:
                pages = pages_of_tile(tile, TILE, page_size // unit)
                exist = pages * page_size < tl.minimum(length, (tile + 1).to(tl.int32) * TILE * unit)
                numbers = _slots(source, pages * page_size, exist, column_stride, block_size, TOKEN_TABLE) // page_size
            if POOLED:
                spans = pages_of_tile(tile, TILE, pooled_page // unit)
                start_here = spans * pooled_page < tl.minimum(length, (tile + 1).to(tl.int32) * TILE * unit)
                firsts = _slots(source, spans * pooled_page, start_here, column_stride, block_size, TOKEN_TABLE)
            if MAPPED:
                places = pages_of_tile(tile, TILE, page_size // unit)
                begin = places * page_size < tl.minimum(length, (tile + 1).to(tl.int32) * TILE * unit)
                origins = _slots(source, places * page_size, begin, column_stride, block_size, TOKEN_TABLE)
                elsewhere = mapped_pages(mapping, origins, begin, page_size)
            t = 0
            while t < num_tables:
                k = 0
                while k < rows:
                    row = (first_row + k).to(tl.int64)
                    if WIDE:
                        start = wide + row * wide_row
                        if ALIGNED:
                            start = tl.multiple_of(start, 16)
                        tl.store(start + columns * wide_column, slots, mask=live)
                    if REAL:
                        tl.store(real + row * real_row + pages * real_column, numbers, mask=exist)
                    if POOLED:
                        tl.store(pooled + row * pooled_row + spans * pooled_column, firsts // pooled_page, mask=start_here)
                    if MAPPED:
                        tl.store(mapped + row * mapped_row + places * mapped_column, elsewhere, mask=begin)
                    k += 1
                t += 1
                if num_tables > 1:  # the next destination; after the last one the first
                    record = destinations + (t % num_tables) * record_words
                    wide, wide_row, wide_column = table_at(record, PAGE_TABLE_1, ALIGNED)
                    real, real_row, real_column = table_at(record, REAL_PAGE_TABLE, False)
                    if POOLED:
                        pooled, pooled_row, pooled_column = table_at(record, POOL_PAGE_TABLE, False)
            tile += 1
        first_row += rows
        request += 1
        tile = tl.full((), 0, tl.int64)
