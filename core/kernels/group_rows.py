"""The Triton kernel of `GroupRows`: a program per row, group and chunk of the row's pages.

Groups come as a table of records, so that their number and what they keep are data.
"""

from __future__ import annotations

import triton
import triton.language as tl

# One group's record: int64 words. Address 0 means that the plane is not there.
REQUEST_MAP: tl.constexpr = tl.constexpr(0)
LENGTHS: tl.constexpr = tl.constexpr(1)
ONES: tl.constexpr = tl.constexpr(2)
QUERY_LENS: tl.constexpr = tl.constexpr(3)
MORE_QUERY_LENS: tl.constexpr = tl.constexpr(4)
ROW_PAGES: tl.constexpr = tl.constexpr(5)  # address, row stride, columns
REQUEST_PAGES: tl.constexpr = tl.constexpr(8)  # the same
BLOCKS: tl.constexpr = tl.constexpr(11)  # address, row stride, column stride, columns
PAGES_PER_BLOCK: tl.constexpr = tl.constexpr(15)
PAGE_STRIDE: tl.constexpr = tl.constexpr(16)
PAGE_SIZE: tl.constexpr = tl.constexpr(17)

# fmt: off


@triton.jit
def _put(record, field, index, value, wanted):
    """One entry of a vector that may not be there."""
    address = tl.load(record + field)
    tl.store(address.to(tl.pointer_type(tl.int32)) + index, value, mask=wanted & (address != 0))


@triton.jit
def _put_pages(record, field, row, column, pages, stop):
    """Pages below `stop` of one row of a table that may not be there."""
    address = tl.load(record + field)
    start = address.to(tl.pointer_type(tl.int32)) + row.to(tl.int64) * tl.load(record + field + 1)
    stop = tl.minimum(stop, tl.where(address == 0, 0, tl.load(record + field + 2)).to(tl.int32))
    tl.store(start + column, pages, mask=column < stop)


@triton.jit(
    do_not_specialize=["seq_stride", "batch_size", "width", "record_words"],
    do_not_specialize_on_alignment=["seq_lens", "query_start_loc", "records", "enabled"],
)
def group_rows_kernel(
    seq_lens, query_start_loc, records, enabled, seq_stride, batch_size, width, record_words,
    SWITCHED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):
    """See `GroupRows` for what is written; nothing where the int32 at `enabled` is 0, with SWITCHED."""
    on = tl.full((), 1, tl.int32)
    if SWITCHED:
        on = tl.load(enabled)
    if on == 0:
        return
    row = tl.program_id(0)
    chunk = tl.program_id(2)
    record = records + tl.program_id(1) * record_words
    request = row // width
    place = row - request * width
    exists = row < tl.load(query_start_loc + batch_size).to(tl.int32)
    length = tl.load(seq_lens + request.to(tl.int64) * seq_stride).to(tl.int32)
    first = chunk == 0
    _put(record, REQUEST_MAP, row, tl.where(exists, request, 0), first)
    _put(record, LENGTHS, row, tl.maximum(length - width + place + 1, 0), first)
    _put(record, ONES, row, 1, first)
    leads = place == 0
    count = tl.load(query_start_loc + request + 1).to(tl.int32) - tl.load(query_start_loc + request).to(tl.int32)
    _put(record, QUERY_LENS, request, count, first & leads)
    _put(record, MORE_QUERY_LENS, request, count, first & leads)

    address = tl.load(record + BLOCKS)
    per_block = tl.load(record + PAGES_PER_BLOCK).to(tl.int32)
    page_stride = tl.load(record + PAGE_STRIDE).to(tl.int32)
    column_stride = tl.load(record + BLOCKS + 2)
    blocks = address.to(tl.pointer_type(tl.int32)) + request.to(tl.int64) * tl.load(record + BLOCKS + 1)
    num_blocks = tl.load(record + BLOCKS + 3).to(tl.int32)
    live = tl.maximum(tl.cdiv(length, tl.load(record + PAGE_SIZE).to(tl.int32)), 1)
    live = tl.where(address == 0, 0, live)
    start = chunk * CHUNK
    stop = tl.minimum(live, start + CHUNK)
    known = tl.where(exists, tl.minimum(stop, num_blocks * per_block), 0)
    while start < stop:
        column = start + tl.arange(0, BLOCK)
        block = column // per_block
        number = tl.load(blocks + block * column_stride, mask=column < known, other=0)
        pages = tl.where(exists, number * page_stride + column - block * per_block, 0)
        _put_pages(record, ROW_PAGES, row, column, pages, stop)
        _put_pages(record, REQUEST_PAGES, request, column, pages, tl.where(leads, stop, 0))
        start += BLOCK
