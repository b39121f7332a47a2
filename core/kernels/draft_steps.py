"""The kernel of `bind_draft_steps`: all draft steps of a batch in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

# One draft step's record: addresses of its positions (int64), slots (int64) and sequence lengths (int32).
POSITIONS: tl.constexpr = tl.constexpr(0)
SLOTS: tl.constexpr = tl.constexpr(1)
SEQ_LENS: tl.constexpr = tl.constexpr(2)
RECORD: tl.constexpr = tl.constexpr(3)

# fmt: off


@triton.jit(do_not_specialize=["position_stride", "length_stride", "num_steps", "batch_size", "num_rows", "num_blocks"])
def draft_steps_kernel(
    positions, seq_lens, block_table, records,
    position_stride, length_stride, row_stride, column_stride, num_steps, batch_size, num_rows, num_blocks,
    block_size, max_model_len, padding_slot, PAD: tl.constexpr, BLOCK: tl.constexpr,
):
    """Each program takes `BLOCK` rows through all steps. Rows from `batch_size` on are padding and get slots only."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < batch_size
    there = row < num_rows
    position = tl.load(positions + row * position_stride, mask=live, other=0).to(tl.int64)
    length = tl.load(seq_lens + row * length_stride, mask=live, other=0).to(tl.int64)
    blocks = block_table + row * row_stride
    step = 0
    while step < num_steps:
        record = records + step * RECORD
        position += 1
        past = position >= max_model_len
        length = tl.minimum(length + 1, max_model_len)
        if PAD:
            position = tl.where(past, 0, position)
            length = tl.where(past, 1, length)
        else:
            position = tl.minimum(position, max_model_len - 1)
        column = tl.minimum(position // block_size, num_blocks - 1)
        block = tl.load(blocks + column * column_stride, mask=live, other=0).to(tl.int64)
        slot = block * block_size + position % block_size
        if PAD:
            slot = tl.where(past, padding_slot, slot)
        slot = tl.where(live, slot, padding_slot)
        tl.store(tl.load(record + POSITIONS).to(tl.pointer_type(tl.int64)) + row, position, mask=live)
        tl.store(tl.load(record + SLOTS).to(tl.pointer_type(tl.int64)) + row, slot, mask=there)
        tl.store(tl.load(record + SEQ_LENS).to(tl.pointer_type(tl.int32)) + row, length.to(tl.int32), mask=live)
        step += 1
