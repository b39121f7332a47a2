"""The two Triton kernels: one writes the metadata of a batch, one copies it to any number of consumers.

Both take their destinations as a table of records (addresses and strides, see the constants below), so that their
number and the batch's size and lengths are data: a kernel is compiled once per mode and set of dtypes, not per shape.

Work on page tables is cut into tiles of live columns. Every program finds its equal share of all tiles from the
lengths on the device, so the host reads nothing and no program looks at a dead column.
"""

from __future__ import annotations

import triton
import triton.language as tl

# One destination's record: int64 words. A vector takes (address, stride), a table (address, row stride, column
# stride), positions and slots (address, stride), a derived plane (address, number of 4-byte words); address 0 means that it is not there.
OFFSET: tl.constexpr = tl.constexpr(0)
CACHE_SEQLENS: tl.constexpr = tl.constexpr(1)
CU_SEQLENS_K: tl.constexpr = tl.constexpr(3)
SEQLENS_EXPANDED: tl.constexpr = tl.constexpr(5)
NSA_CACHE_SEQLENS: tl.constexpr = tl.constexpr(7)
NSA_CU_SEQLENS_K: tl.constexpr = tl.constexpr(9)
PAGE_TABLE_1: tl.constexpr = tl.constexpr(11)
REAL_PAGE_TABLE: tl.constexpr = tl.constexpr(14)
POSITIONS: tl.constexpr = tl.constexpr(17)
SLOT_MAPPING: tl.constexpr = tl.constexpr(19)
DERIVED: tl.constexpr = tl.constexpr(21)

# fmt: off


@triton.jit
def _vector(record, field):
    """Address and stride of a vector."""
    return tl.load(record + field).to(tl.pointer_type(tl.int32)), tl.load(record + field + 1)


@triton.jit
def _table(record, field, ALIGNED: tl.constexpr):
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
    """Tiles and rows of `BLOCK` requests from `first` on, 0 past the batch."""
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
def _share_of_tiles(
    worker, num_workers, lengths, length_stride, extend_lens, extend_stride, batch_size, added, limit, unit,
    rows_per_request, TILE: tl.constexpr, RAGGED: tl.constexpr, BLOCK: tl.constexpr,
):
    """Where this worker's contiguous share of all tiles starts: request, tile, its first row; and how many tiles."""
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
def _tiles_of_request(
    request, tile, remaining, lengths, length_stride, extend_lens, extend_stride, added, table_width, unit,
    rows_per_request, TILE: tl.constexpr, RAGGED: tl.constexpr,
):
    """Live columns and rows of a request, and the tile before which this worker stops in it."""
    length = tl.minimum(tl.load(lengths + request * length_stride).to(tl.int32) + added, table_width)
    rows = rows_per_request
    if RAGGED:
        rows = tl.load(extend_lens + request * extend_stride).to(tl.int32)
    num_tiles = tl.where((rows > 0) & (length > 0), tl.cdiv(tl.cdiv(length, unit), TILE), 0)
    return length, rows, tl.minimum(tile + remaining, num_tiles)


@triton.jit
def _columns(tile, length, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """Columns of a tile of the wide table, and which of them may be written.

    Aligned rows are whole 16-byte words, so the tail of the last live word may be written too.
    """
    if ALIGNED:
        length = tl.multiple_of(tl.cdiv(length, 4) * 4, 4)
    columns = tl.multiple_of((tile * TILE).to(tl.int32), TILE) + tl.arange(0, TILE)
    return columns, columns < length


@triton.jit
def _pages(tile, TILE: tl.constexpr, page_size: tl.constexpr, WIDE: tl.constexpr):
    """Columns of the real page table that belong to a tile; a tile is one of them where there is no wide table."""
    if WIDE and page_size <= TILE:
        return (tile * (TILE // page_size)).to(tl.int32) + tl.arange(0, TILE // page_size)
    elif WIDE:  # the pages that start in the tile: one or none
        return tl.cdiv(tile * TILE, page_size).to(tl.int32) + tl.arange(0, 1)
    else:
        return (tile * TILE).to(tl.int32) + tl.arange(0, TILE)


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
def _write_request_vectors(seq_lens, seq_stride, record, batch_size, added, limit, BLOCK: tl.constexpr):
    """cache_seqlens and cu_seqlens_k of one destination."""
    cache_seqlens, cache_stride = _vector(record, CACHE_SEQLENS)
    cu_seqlens, cu_stride = _vector(record, CU_SEQLENS_K)
    added += tl.load(record + OFFSET).to(tl.int32)
    running = tl.full((), 0, tl.int32)
    tl.store(cu_seqlens, running)
    start = 0
    while start < batch_size:
        request = start + tl.arange(0, BLOCK)
        there = request < batch_size
        length = tl.load(seq_lens + request * seq_stride, mask=there, other=0).to(tl.int32) + added
        length = tl.where(there, tl.minimum(length, limit), 0)
        tl.store(cache_seqlens + request * cache_stride, length, mask=there)
        tl.store(cu_seqlens + (request + 1) * cu_stride, running + tl.cumsum(length, 0), mask=there)
        running += tl.sum(length, 0)
        start += BLOCK


@triton.jit
def _write_tokens(
    seq_lens, seq_stride, req_pool_indices, pool_stride, table, row_stride, column_stride, record, batch_size, added, limit,
    block_size, TOKEN_TABLE: tl.constexpr, BLOCK: tl.constexpr,
):
    """positions and slot_mapping of one destination, if it has them."""
    batch_size = tl.where(tl.load(record + POSITIONS) == 0, 0, batch_size)
    positions = tl.load(record + POSITIONS).to(tl.pointer_type(tl.int64))
    position_stride = tl.load(record + POSITIONS + 1)
    slot_mapping = tl.load(record + SLOT_MAPPING).to(tl.pointer_type(tl.int64))
    slot_stride = tl.load(record + SLOT_MAPPING + 1)
    added += tl.load(record + OFFSET).to(tl.int32)
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
        tl.store(positions + request * position_stride, position.to(tl.int64), mask=there)
        tl.store(slot_mapping + request * slot_stride, tl.where(length > 0, slot, -1).to(tl.int64), mask=there)
        start += BLOCK


@triton.jit
def _write_row_vectors(
    seq_lens, seq_stride, extend_lens, extend_stride, record, batch_size, added, limit, index_topk, rows_per_request,
    RAGGED: tl.constexpr, BLOCK: tl.constexpr,
):
    """seqlens_expanded, nsa_cache_seqlens and nsa_cu_seqlens_k of one destination."""
    expanded, expanded_stride = _vector(record, SEQLENS_EXPANDED)
    clipped, clipped_stride = _vector(record, NSA_CACHE_SEQLENS)
    cu_clipped, cu_stride = _vector(record, NSA_CU_SEQLENS_K)
    added += tl.load(record + OFFSET).to(tl.int32)
    running = tl.full((), 0, tl.int32)
    first_row = tl.full((), 0, tl.int32)
    tl.store(cu_clipped, running)
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
        kept = tl.where(there, tl.minimum(visible, index_topk), 0)
        tl.store(expanded + row * expanded_stride, visible, mask=there)
        tl.store(clipped + row * clipped_stride, kept, mask=there)
        tl.store(cu_clipped + (row + 1) * cu_stride, running + tl.cumsum(kept, 0), mask=there)
        running += tl.sum(kept, 0)
        start += BLOCK


@triton.jit(
    do_not_specialize=[
        "seq_stride", "extend_stride", "pool_stride", "table_row_stride", "table_column_stride", "num_destinations",
        "num_tables", "record_words", "batch_size", "added", "longest_added", "limit", "table_width", "index_topk",
        "rows_per_request", "block_size",
    ],
    do_not_specialize_on_alignment=["seq_lens", "extend_lens", "req_pool_indices", "destinations"],
)
def metadata_kernel(
    seq_lens, extend_lens, req_pool_indices, table, destinations,
    seq_stride, extend_stride, pool_stride, table_row_stride, table_column_stride, num_destinations, num_tables,
    record_words, batch_size, added, longest_added, limit, table_width, index_topk, rows_per_request, block_size,
    page_size: tl.constexpr, TOKEN_TABLE: tl.constexpr, RAGGED: tl.constexpr, WIDE: tl.constexpr, REAL: tl.constexpr,
    TOKENS: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Metadata of one batch.

    Programs 0 … 2 * num_destinations - 1 write the vectors of a destination each (requests, then rows); the others
    share the page tables of the first `num_tables` destinations: each tile is read once and written to all of them.
    """
    program = tl.program_id(0)
    if program < 2 * num_destinations:
        record = destinations + (program // 2) * record_words
        if program % 2 == 0:
            _write_request_vectors(seq_lens, seq_stride, record, batch_size, added, limit, BLOCK)
            if TOKENS:
                _write_tokens(
                    seq_lens, seq_stride, req_pool_indices, pool_stride, table, table_row_stride, table_column_stride,
                    record, batch_size, added, limit, block_size, TOKEN_TABLE, BLOCK,
                )
        else:
            _write_row_vectors(
                seq_lens, seq_stride, extend_lens, extend_stride, record, batch_size, added, limit, index_topk,
                rows_per_request, RAGGED, BLOCK,
            )
        return
    # Without the wide table only the first column of each page is looked at.
    unit: tl.constexpr = 1 if WIDE else page_size
    worker = program - 2 * num_destinations
    num_workers = tl.num_programs(0) - 2 * num_destinations
    request, tile, first_row, remaining = _share_of_tiles(
        worker, num_workers, seq_lens, seq_stride, extend_lens, extend_stride, batch_size, longest_added, table_width, unit,
        rows_per_request, TILE, RAGGED, BLOCK,
    )
    column_stride = table_column_stride.to(tl.int64)
    if ALIGNED:
        column_stride = 1
    wide, wide_row, wide_column = _table(destinations, PAGE_TABLE_1, ALIGNED)
    real, real_row, real_column = _table(destinations, REAL_PAGE_TABLE, False)
    while remaining > 0:
        length, rows, stop = _tiles_of_request(
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
                columns, live = _columns(tile, length, TILE, ALIGNED)
                slots = _slots(source, columns, live, column_stride, block_size, TOKEN_TABLE)
            if REAL:
                pages = _pages(tile, TILE, page_size, WIDE)
                exist = pages * page_size < tl.minimum(length, (tile + 1).to(tl.int32) * TILE * unit)
                numbers = _slots(source, pages * page_size, exist, column_stride, block_size, TOKEN_TABLE) // page_size
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
                    k += 1
                t += 1
                if num_tables > 1:  # on to the next, at last to the first again
                    record = destinations + (t % num_tables) * record_words
                    wide, wide_row, wide_column = _table(record, PAGE_TABLE_1, ALIGNED)
                    real, real_row, real_column = _table(record, REAL_PAGE_TABLE, False)
            tile += 1
        first_row += rows
        request += 1
        tile = tl.full((), 0, tl.int64)


@triton.jit
def _copy_vector(source, destination, field, size, BLOCK: tl.constexpr):
    origin, origin_stride = _vector(source, field)
    target, target_stride = _vector(destination, field)
    start = 0
    while start < size:
        index = start + tl.arange(0, BLOCK)
        values = tl.load(origin + index * origin_stride, mask=index < size)
        tl.store(target + index * target_stride, values, mask=index < size)
        start += BLOCK


@triton.jit
def _copy_tokens(source, destination, field, size, BLOCK: tl.constexpr):
    """Copy positions or slots to a destination that has them."""
    size = tl.where(tl.load(destination + field) == 0, 0, size)
    origin, origin_stride = tl.load(source + field).to(tl.pointer_type(tl.int64)), tl.load(source + field + 1)
    target, target_stride = tl.load(destination + field).to(tl.pointer_type(tl.int64)), tl.load(destination + field + 1)
    start = 0
    while start < size:
        index = start + tl.arange(0, BLOCK)
        values = tl.load(origin + index * origin_stride, mask=index < size)
        tl.store(target + index * target_stride, values, mask=index < size)
        start += BLOCK


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
    origin, row_stride, column_stride = _table(sources, field, ALIGNED)
    values = tl.load(origin + row * row_stride + columns * column_stride, mask=live)
    record = destinations
    d = 0
    while d < num_destinations:
        if tl.load(record + field) != 0:
            target, row_stride, column_stride = _table(record, field, ALIGNED)
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
    page_size: tl.constexpr, RAGGED: tl.constexpr, WIDE: tl.constexpr, REAL: tl.constexpr, TOKENS: tl.constexpr,
    ALIGNED: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Copy every field of the sources to the destinations.

    Program d < num_destinations copies vectors and derived planes to destination d; the others share the page tables,
    each tile of which is read once and written to every destination. `live_lengths` says where requests end.
    """
    program = tl.program_id(0)
    if program < num_destinations:
        source = sources + tl.where(num_sources > 1, program, 0) * record_words
        destination = destinations + program * record_words
        _copy_vector(source, destination, CACHE_SEQLENS, batch_size, BLOCK)
        _copy_vector(source, destination, CU_SEQLENS_K, batch_size + 1, BLOCK)
        _copy_vector(source, destination, SEQLENS_EXPANDED, num_rows, BLOCK)
        _copy_vector(source, destination, NSA_CACHE_SEQLENS, num_rows, BLOCK)
        _copy_vector(source, destination, NSA_CU_SEQLENS_K, num_rows + 1, BLOCK)
        if TOKENS:
            _copy_tokens(source, destination, POSITIONS, batch_size, BLOCK)
            _copy_tokens(source, destination, SLOT_MAPPING, batch_size, BLOCK)
        _copy_derived(source, destination, num_derived, BLOCK)
        return
    unit: tl.constexpr = 1 if WIDE else page_size
    worker = program - num_destinations
    num_workers = tl.num_programs(0) - num_destinations
    request, tile, first_row, remaining = _share_of_tiles(
        worker, num_workers, live_lengths, live_stride, extend_lens, extend_stride, batch_size, 0, table_width, unit,
        rows_per_request, TILE, RAGGED, BLOCK,
    )
    while remaining > 0:
        length, rows, stop = _tiles_of_request(
            request, tile, remaining, live_lengths, live_stride, extend_lens, extend_stride, 0, table_width, unit,
            rows_per_request, TILE, RAGGED,
        )
        remaining -= stop - tile
        while tile < stop:
            if WIDE:
                columns, live = _columns(tile, length, TILE, ALIGNED)
            if REAL:
                pages = _pages(tile, TILE, page_size, WIDE)
                exist = pages * page_size < tl.minimum(length, (tile + 1).to(tl.int32) * TILE * unit)
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
                k += 1
            tile += 1
        first_row += rows
        request += 1
        tile = tl.full((), 0, tl.int64)
