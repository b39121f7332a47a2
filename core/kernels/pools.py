"""Functions of the metadata and copy kernels for pooled index keys (`PoolMetadata`).

A pool's size is a power of two. `position & -KPOOL` is thereby the start of its pool, for a negative position too, where
a division would round up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa_plugin.core.kernels.tiles import (
    OFFSET,
    POOL_ACCEPTED,
    POOL_REQUESTS,
    POOL_TAIL_START,
    POOL_WRITE_LOC,
    POOL_WRITE_START,
    vector_at,
    wide_vector_at,
)

# fmt: off


@triton.jit
def clip_to_pools(visible, index_topk, KPOOL: tl.constexpr):
    """nsa_cache_seqlens: whole pools up to `index_topk` tokens, and the tokens of the incomplete one."""
    whole = visible & -KPOOL
    return tl.minimum(whole, index_topk) + visible - whole


@triton.jit
def write_pools(
    seq_lens, seq_stride, extend_lens, extend_stride, accepted, accepted_stride, req_pool_indices, pool_stride, table,
    row_stride, column_stride, record, batch_size, added, limit, table_width, rows_per_request, on,
    RAGGED: tl.constexpr, ACCEPTED: tl.constexpr, KPOOL: tl.constexpr, BLOCK: tl.constexpr,
):
    """The planes of pooled index keys that have an entry per request, of one destination."""
    write_start, start_stride = vector_at(record, POOL_WRITE_START)
    tail_start, tail_stride = vector_at(record, POOL_TAIL_START)
    requests, requests_stride = wide_vector_at(record, POOL_REQUESTS)
    write_loc, loc_row = wide_vector_at(record, POOL_WRITE_LOC)
    loc_column = tl.load(record + POOL_WRITE_LOC + 2)
    added += tl.load(record + OFFSET).to(tl.int32)
    candidates = tl.cdiv(rows_per_request, KPOOL)
    end = tl.where(on, batch_size, 0)
    start = 0
    while start < batch_size:
        request = start + tl.arange(0, BLOCK)
        there, written = request < batch_size, request < end
        length = tl.load(seq_lens + request * seq_stride, mask=there, other=0).to(tl.int32) + added
        length = tl.minimum(length, limit)
        rows = rows_per_request
        if RAGGED:
            rows = tl.load(extend_lens + request * extend_stride, mask=there, other=0).to(tl.int32)
        first = length - rows
        tail = first & -KPOOL
        row = tl.load(req_pool_indices + request * pool_stride, mask=there, other=0).to(tl.int64)
        tl.store(write_start + request * start_stride, first, mask=written)
        tl.store(tail_start + request * tail_stride, tail, mask=written)
        tl.store(requests + request * requests_stride, row, mask=written)
        if ACCEPTED:
            copy, copy_stride = vector_at(record, POOL_ACCEPTED)
            count = tl.load(accepted + request * accepted_stride, mask=there, other=0).to(tl.int32)
            tl.store(copy + request * copy_stride, count, mask=written)
        source = table + row * row_stride
        candidate = 0
        while candidate < candidates:
            token = tail + candidate * KPOOL
            exists = there & (token >= 0) & (token < tl.minimum(length, table_width))
            slot = tl.load(source + token * column_stride, mask=exists, other=0).to(tl.int64)
            tl.store(write_loc + request * loc_row + candidate * loc_column, slot // KPOOL, mask=written)
            candidate += 1
        start += BLOCK
