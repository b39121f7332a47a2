"""The kernel of `StepUpdate`: one program per row; in the first step, further programs pad the slots."""

from __future__ import annotations

import triton
import triton.language as tl

# fmt: off


@triton.jit(
    do_not_specialize=[
        "num_rows", "num_groups", "capacity", "slot_stride", "source_stride", "table_stride", "width", "ratio",
        "block_states", "tail_stride", "ring",
    ],
)
def step_update_kernel(
    positions, seq_lens, query_start_loc, table_rows,
    addresses, row_strides, block_sizes, enabled, slot_mapping,
    request_map, lengths, ones, more_ones, indices, source, table, pooled_slots, tail_table, tail_slots,
    num_rows, num_groups, capacity, slot_stride, source_stride, table_stride, width, ratio, block_states, tail_stride, ring,
    FIRST: tl.constexpr, SLOTS: tl.constexpr, MAP: tl.constexpr, INDEXER: tl.constexpr, INDICES: tl.constexpr,
    TABLE: tl.constexpr, POOLED: tl.constexpr, TAIL: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
):
    """One step. `StepUpdate` describes the arguments; `reference.step_update` defines what is written."""
    row = tl.program_id(0)
    actual = tl.load(query_start_loc + num_rows)
    if row >= num_rows:
        chunks = tl.cdiv(capacity, BLOCK)
        padded = (row - num_rows) // chunks
        tail = (row - num_rows - padded * chunks) * BLOCK + tl.arange(0, BLOCK)
        tl.store(
            slot_mapping + padded.to(tl.int64) * slot_stride + tail, PAD, mask=(tail >= actual) & (tail < capacity)
        )
        return
    if SLOTS:
        exists = row < actual
        position = tl.load(positions + row, mask=exists, other=0).to(tl.int64)
        table_row = tl.load(table_rows + row, mask=exists, other=-1).to(tl.int64)
        group = tl.full((), 0, tl.int32)
        while group < num_groups:
            block_size = tl.load(block_sizes + group)
            mapped = (table_row >= 0) & tl.load(enabled + group).to(tl.int1)
            blocks = tl.load(addresses + group).to(tl.pointer_type(tl.int32))
            block = tl.load(
                blocks + table_row * tl.load(row_strides + group) + position // block_size, mask=mapped, other=0
            ).to(tl.int64)
            slot = tl.where(mapped, block * block_size + position % block_size, PAD)
            tl.store(slot_mapping + group.to(tl.int64) * slot_stride + row, slot, mask=exists)
            group += 1
    if MAP and FIRST:
        tl.store(request_map + row, tl.where(row < actual, row, num_rows - 1))
    if TAIL:
        own = tl.load(tail_table + row.to(tl.int64) * tail_stride).to(tl.int64)
        offset = tl.load(positions + row).to(tl.int64) % ring
        tl.store(tail_slots + row, tl.where((row < actual) & (own != 0), own * ring + offset, PAD))
    if INDEXER:
        length = tl.load(seq_lens + row)
        if POOLED:
            completes = (row < actual) & (length > 0) & (length % ratio == 0) & (tl.load(table_rows + row) >= 0)
            state = (length - 1) // ratio
            held = tl.load(
                source + row.to(tl.int64) * source_stride + state // block_states, mask=completes, other=0
            ).to(tl.int64)
            tl.store(pooled_slots + row, tl.where(completes, held * block_states + state % block_states, PAD))
            length = length // ratio
        tl.store(lengths + row, length)
        if FIRST:
            tl.store(ones + row, 1)
            tl.store(more_ones + row, 1)
            if INDICES:
                tl.store(indices + row, row)
            if TABLE:
                origin = source + row.to(tl.int64) * source_stride
                target = table + row.to(tl.int64) * table_stride
                start = 0
                while start < width:
                    column = start + tl.arange(0, BLOCK)
                    tl.store(target + column, tl.load(origin + column, mask=column < width), mask=column < width)
                    start += BLOCK
