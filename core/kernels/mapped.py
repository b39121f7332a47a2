"""Functions of the metadata kernel for slots of a second cache (`SlotMap`).

A page's size is a power of two. `slot & -page_size` is thereby the start of its page, for a negative slot too, where a
division would round up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa_plugin.core.kernels.tiles import MAPPED_SLOTS, wide_vector_at

# fmt: off


@triton.jit
def mapped_pages(mapping, slots, live, page_size: tl.constexpr):
    """Pages of the second cache that have the tokens of these slots of the first one."""
    mapped = tl.load(mapping + slots, mask=live, other=0).to(tl.int32)
    return (mapped & -page_size) // page_size


@triton.jit
def write_mapped_slots(mapping, written, row_stride, column_stride, count, step, record, on, BLOCK: tl.constexpr):
    """mapped_slots of one destination, which is the one of that step."""
    mapped_slots, mapped_stride = wide_vector_at(record, MAPPED_SLOTS)
    source = written + step.to(tl.int64) * row_stride
    end = tl.where(on, count, 0)
    start = 0
    while start < count:
        token = start + tl.arange(0, BLOCK)
        there = token < count
        slot = tl.load(source + token * column_stride, mask=there, other=-1).to(tl.int64)
        mapped = tl.load(mapping + slot, mask=slot >= 0, other=-1).to(tl.int64)
        tl.store(mapped_slots + token * mapped_stride, mapped, mask=token < end)
        start += BLOCK
