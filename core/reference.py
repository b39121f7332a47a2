"""The definition of right, in plain torch, on any device, for every mode.

With L = seq_lens, q = rows of a request, o = a step's length offset:

- cache_seqlens = L + (draft_tokens in TARGET_VERIFY, else 0) + o, where steps differ in o at most the table's width
- seqlens_expanded of row j of q = max(cache_seqlens - q + j + 1, 0)
- positions = cache_seqlens - 1, slot_mapping = the slot of that token (where they are asked for)
- page tables: columns below the longest step's cache_seqlens, the same for every row of a request

Modes differ in q and in what is added to L, in nothing else. Only live entries are defined; what is written elsewhere
means nothing. On a GPU nothing here syncs with the host, so whole rows are written; on a CPU, where reading a length is
free, columns stop at the longest request.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nsa_plugin.core.batch import BatchDescriptor
from nsa_plugin.core.metadata import (
    TABLES,
    TOKENS,
    PrecomputedMetadata,
    StepMetadata,
    live_rows,
    same_buffer,
    vector_sizes,
)


def precompute(batch: BatchDescriptor, out: PrecomputedMetadata, enabled: torch.Tensor | None = None) -> None:
    """Write the metadata of `batch` into `out`, which stays as it is where `enabled` (int32 [1]) is 0."""
    bs = batch.batch_size
    on = None if enabled is None else enabled != 0
    request, position, count, exists = live_rows(batch)
    lengths = batch.seq_lens[:bs].long() + batch.added_tokens
    for offset, step in zip(batch.offsets, out.steps, strict=True):
        cache_seqlens = lengths + offset
        if batch.step_offsets:
            cache_seqlens = cache_seqlens.clamp(max=out.geometry.table_width)
        expanded = (cache_seqlens[request] - count + position + 1).clamp(min=0)
        clipped = expanded.clamp(max=out.geometry.index_topk)
        _write(step.cache_seqlens, cache_seqlens, on)
        _write(step.cu_seqlens_k, _with_leading_zero(cache_seqlens.cumsum(0)), on)
        _write(step.seqlens_expanded, expanded, on)
        _write(step.nsa_cache_seqlens, clipped, on)
        _write(step.nsa_cu_seqlens_k, _with_leading_zero((clipped * exists).cumsum(0)), on)
        if step.positions is not None and step.slot_mapping is not None:
            positions = (cache_seqlens - 1).clamp(min=0)
            _write(step.positions, positions, on)
            slot_mapping = torch.where(cache_seqlens > 0, batch.slots.at(positions).long(), -1)
            _write(step.slot_mapping, slot_mapping, on)

    table, geometry = out.steps[0], out.geometry
    width = _live_width(lengths + max(batch.offsets), geometry.table_width)
    if table.page_table_1 is not None:
        slots = batch.slots.lookup(bs, width)
        pages = slots[:, :: geometry.page_size]
        _write_rows(table.page_table_1, _expand(slots, batch, request), on)
    else:
        pages = batch.slots.lookup(bs, width, geometry.page_size)
    if geometry.page_size > 1:
        _write_rows(table.real_page_table, _expand(pages // geometry.page_size, batch, request), on)


def fast_copy(source: PrecomputedMetadata, destinations: Sequence[StepMetadata]) -> None:
    """Copy the live entries of `source`'s steps to `destinations`, and the derived planes whole."""
    batch, geometry = source.batch, source.geometry
    bs, rows = batch.batch_size, batch.num_rows
    longest = source.steps[batch.offsets.index(max(batch.offsets))].cache_seqlens[:bs]
    width = _live_width(longest, geometry.table_width)
    columns = dict(zip(TABLES, (width, -(-width // geometry.page_size)), strict=True))
    for index, destination in enumerate(destinations):
        step = source.step(index)
        for name, size in vector_sizes(batch).items():
            _write(getattr(destination, name), getattr(step, name)[:size])
        for name in TOKENS:
            origin, target = getattr(step, name), getattr(destination, name)
            if target is not None:
                _write(target, origin[:bs])
        for name, width in columns.items():
            origin, target = getattr(step, name), getattr(destination, name)
            if origin is not None and target is not None:
                _write_rows(target, origin[:rows, :width])
        for name, plane in destination.derived.items():
            plane.copy_(step.derived[name])


def _live_width(lengths: torch.Tensor, width: int) -> int:
    if lengths.device.type == "cpu" and lengths.numel():
        return min(width, max(int(lengths.max()), 0))
    return width


def _expand(values: torch.Tensor, batch: BatchDescriptor, request: torch.Tensor) -> torch.Tensor:
    return values if batch.rows_per_request == 1 and batch.extend_lens is None else values[request]


def _with_leading_zero(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([values.new_zeros(1), values])


def _write(vector: torch.Tensor, values: torch.Tensor, on: torch.Tensor | None = None) -> None:
    if not same_buffer(vector, values):
        _overwrite(vector[: values.shape[0]], values, on)


def _write_rows(table: torch.Tensor, values: torch.Tensor, on: torch.Tensor | None = None) -> None:
    _overwrite(table[: values.shape[0], : values.shape[1]], values, on)


def _overwrite(there: torch.Tensor, values: torch.Tensor, on: torch.Tensor | None) -> None:
    there.copy_(values if on is None else torch.where(on, values, there))
