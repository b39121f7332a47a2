"""The definition of right, in plain torch, on any device, for every mode.

With L = seq_lens, q = rows of a request, o = a step's length offset:

- cache_seqlens = L + (draft_tokens in TARGET_VERIFY, else 0) + o
- seqlens_expanded of row j of q = max(cache_seqlens - q + j + 1, 0)
- page tables: columns below the longest step's cache_seqlens, the same for every row of a request

Modes differ in q and in what is added to L, in nothing else. Entries that are not live are left as they were.
Nothing here syncs with the host on a GPU; on a CPU, where reading a length is free, columns stop at the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nsa_plugin.core.batch import BatchDescriptor
from nsa_plugin.core.metadata import TABLES, VECTORS, PrecomputedMetadata, StepMetadata, live_rows, same_buffer


def precompute(batch: BatchDescriptor, out: PrecomputedMetadata) -> None:
    """Write the metadata of `batch` into `out`."""
    bs = batch.batch_size
    request, position, count, exists = live_rows(batch)
    longest = batch.seq_lens[:bs].long() + batch.added_tokens
    for offset, step in zip(batch.offsets, out.steps, strict=True):
        cache_seqlens = longest + offset
        expanded = (cache_seqlens[request] - count + position + 1).clamp(min=0)
        clipped = expanded.clamp(max=out.geometry.index_topk)
        _write(step.cache_seqlens, cache_seqlens)
        _write(step.cu_seqlens_k, _with_leading_zero(cache_seqlens.cumsum(0)))
        _write(step.seqlens_expanded, expanded, exists)
        _write(step.nsa_cache_seqlens, clipped, exists)
        always = torch.ones(1, dtype=torch.bool, device=exists.device)
        _write(step.nsa_cu_seqlens_k, _with_leading_zero((clipped * exists).cumsum(0)), torch.cat([always, exists]))
    _write_page_tables(batch, out, longest + max(batch.offsets))


def fast_copy(source: PrecomputedMetadata, destinations: Sequence[StepMetadata]) -> None:
    """Copy the live entries of `source`'s steps to `destinations`, and the derived planes whole."""
    batch, geometry = source.batch, source.geometry
    bs, rows = batch.batch_size, batch.num_rows
    request, _, _, exists = live_rows(batch)
    longest = torch.stack([step.cache_seqlens[:bs] for step in source.steps]).amax(0)
    sizes = dict(zip(VECTORS, (bs, bs + 1, rows, rows, rows + 1), strict=True))
    for index, destination in enumerate(destinations):
        step = source.step(index)
        for name, size in sizes.items():
            _write(getattr(destination, name), getattr(step, name)[:size])
        for name, unit in zip(TABLES, (1, geometry.page_size), strict=True):
            table, target = getattr(step, name), getattr(destination, name)
            if table is not None and target is not None:
                columns = _live_columns(longest, table.shape[1], unit)
                live = (columns[None, :] * unit < longest[request][:, None]) & exists[:, None]
                _write_table(target, table[:rows, : columns.numel()], live)
        for name, plane in destination.derived.items():
            plane.copy_(step.derived[name])


def _write_page_tables(batch: BatchDescriptor, out: PrecomputedMetadata, longest: torch.Tensor) -> None:
    request, _, _, exists = live_rows(batch)
    first = out.steps[0]
    page_size = out.geometry.page_size
    wide = first.page_table_1
    if wide is not None:
        columns = _live_columns(longest, out.geometry.table_width, 1)
        slots = batch.slots.lookup(batch.batch_size, columns)
        live = (columns[None, :] < longest[request][:, None]) & exists[:, None]
        _write_table(wide, slots[request], live)
    if page_size > 1:
        pages = _live_columns(longest, out.geometry.real_width, page_size)
        slots = batch.slots.lookup(batch.batch_size, pages * page_size)
        live = (pages[None, :] * page_size < longest[request][:, None]) & exists[:, None]
        _write_table(first.real_page_table, (slots // page_size)[request], live)


def _live_columns(longest: torch.Tensor, width: int, unit: int) -> torch.Tensor:
    if longest.device.type == "cpu" and longest.numel():
        width = min(width, -(-max(int(longest.max()), 0) // unit))
    return torch.arange(width, device=longest.device)


def _with_leading_zero(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([values.new_zeros(1), values])


def _write(plane: torch.Tensor, values: torch.Tensor, live: torch.Tensor | None = None) -> None:
    target = plane[: values.numel()]
    if same_buffer(target, values):
        return
    values = values.to(torch.int32)
    target.copy_(values if live is None else torch.where(live, values, target))


def _write_table(table: torch.Tensor, values: torch.Tensor, live: torch.Tensor) -> None:
    target = table[: values.shape[0], : values.shape[1]]
    target.copy_(torch.where(live, values, target))
