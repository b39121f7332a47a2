"""The definition of right, in plain torch, on any device: what each Triton kernel must equal, entry by entry.

`precompute` defines the metadata of a batch in every mode. With L = seq_lens, q = query rows of the request,
o = length offset of the step:

- cache_seqlens = min(L + (draft_tokens in TARGET_VERIFY, else 0) + o, limit), with the limit of `Geometry.length_limit`.
- seqlens_expanded of row j of q = max(cache_seqlens - q + j + 1, 0)
- positions = cache_seqlens - 1; slot_mapping = the slot of that token. Only buffers that have these planes get them.
- With pooled index keys, k = index_kpool: nsa_cache_seqlens = min(whole, index_topk) + seqlens_expanded - whole, where
  whole = seqlens_expanded // k * k; `PoolMetadata` says what its planes are. Divisions round down.
- Page tables: the columns below the longest step's cache_seqlens, the same for every row of a request.

Only live entries are defined. Other entries may be written, with any value. On a GPU nothing here syncs with the host,
so whole rows of page tables are written. On a CPU, columns stop at the longest request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from nsa_plugin.core.batch import PAD_SLOT, BatchDescriptor, BlockTable, Geometry, TokenTable
from nsa_plugin.core.group_rows import GroupMetadata, GroupRows, live_pages
from nsa_plugin.core.metadata import (
    TOKENS,
    PrecomputedMetadata,
    StepMetadata,
    live_rows,
    plane,
    same_buffer,
    table_sizes,
    vector_sizes,
)
from nsa_plugin.core.pools import POOL_PLANES, POOL_TABLE, PoolMetadata, pool_shapes, rows_of_requests

if TYPE_CHECKING:
    from nsa_plugin.core.draft_steps import DraftLimits, DraftStep
    from nsa_plugin.core.step_update import DraftRows, IndexerRows, SlotGroups, TailRows


def precompute(batch: BatchDescriptor, out: PrecomputedMetadata, enabled: torch.Tensor | None = None) -> None:
    """Write the metadata of `batch` into `out`; where `enabled` (int32 [1]) is 0, `out` stays as it is."""
    bs = batch.batch_size
    on = None if enabled is None else enabled != 0
    request, position, count, exists = live_rows(batch)
    lengths = batch.seq_lens[:bs].long() + batch.added_tokens
    for offset, step in zip(batch.offsets, out.steps, strict=True):
        cache_seqlens = (lengths + offset).clamp(max=out.geometry.length_limit(batch))
        expanded = (cache_seqlens[request] - count + position + 1).clamp(min=0)
        whole = expanded // out.geometry.index_kpool * out.geometry.index_kpool
        clipped = whole.clamp(max=out.geometry.index_topk) + expanded - whole
        _write(step.cache_seqlens, cache_seqlens, on)
        _write(step.cu_seqlens_k, _with_leading_zero(cache_seqlens.cumsum(0)), on)
        _write(step.seqlens_expanded, expanded, on)
        _write(step.nsa_cache_seqlens, clipped, on)
        _write(step.nsa_cu_seqlens_k, _with_leading_zero((clipped * exists).cumsum(0)), on)
        if step.positions is not None and step.slot_mapping is not None:
            positions = (cache_seqlens - 1).clamp(min=0)
            _write(step.positions, positions, on)
            slot_mapping = torch.where(cache_seqlens > 0, batch.slots.at(positions).long(), PAD_SLOT)
            _write(step.slot_mapping, slot_mapping, on)
        if step.pools is not None:
            _write_pools(step.pools, batch, out.geometry, cache_seqlens, expanded, on)

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
    pooled = plane(table, POOL_TABLE)
    if pooled is not None:
        size = geometry.page_size * geometry.index_kpool
        _write_rows(pooled, _expand(batch.slots.lookup(bs, width, size) // size, batch, request), on)


def fast_copy(source: PrecomputedMetadata, destinations: Sequence[StepMetadata]) -> None:
    """Copy the live entries of `source`'s steps, and its whole derived planes, to `destinations`."""
    batch, geometry = source.batch, source.geometry
    bs, rows = batch.batch_size, batch.num_rows
    longest = source.steps[batch.offsets.index(max(batch.offsets))].cache_seqlens[:bs]
    width = _live_width(longest, geometry.table_width)
    columns = {name: -(-width // unit) for name, (_, unit) in table_sizes(geometry).items()}
    shapes = pool_shapes(batch, geometry)
    for index, destination in enumerate(destinations):
        step = source.step(index)
        for name, size in vector_sizes(batch).items():
            if getattr(destination, name) is not None:
                _write(getattr(destination, name), getattr(step, name)[:size])
        for name in TOKENS:
            origin, target = getattr(step, name), getattr(destination, name)
            if target is not None:
                _write(target, origin[:bs])
        for name in POOL_PLANES:
            origin, target = plane(step, name), plane(destination, name)
            if origin is not None and target is not None:
                live = tuple(slice(size) for size in shapes[name])
                target[live].copy_(origin[live])
        for name, width in columns.items():
            origin, target = plane(step, name), plane(destination, name)
            if origin is not None and target is not None:
                _write_rows(target, origin[:rows, :width])
        for name, derived in destination.derived.items():
            derived.copy_(step.derived[name])


def draft_steps(
    steps: Sequence[DraftStep],
    limits: DraftLimits,
    positions: torch.Tensor,
    seq_lens: torch.Tensor,
    table: BlockTable,
    batch_size: int,
    num_rows: int,
) -> None:
    """Write positions, slots and lengths of all `steps`; the arguments are those of `bind_draft_steps`."""
    position, length = positions[:batch_size].long(), seq_lens[:batch_size].long()
    blocks, block_size = table.block_table[:batch_size], table.block_size
    for step in steps:
        position = position + 1
        length = (length + 1).clamp(max=limits.max_model_len)
        past = position >= limits.max_model_len
        pad = past if limits.pads else torch.zeros_like(past)
        position = torch.where(pad, 0, position.clamp(max=limits.max_model_len - 1))
        length = torch.where(pad, 1, length)
        column = (position // block_size).clamp(max=blocks.shape[1] - 1)
        block = blocks.gather(1, column[:, None])[:, 0].long()
        slot = torch.where(pad, limits.padding_slot, block * block_size + position % block_size)
        step.positions[:batch_size] = position
        step.slots[:batch_size] = slot
        step.slots[batch_size:num_rows] = limits.padding_slot
        step.seq_lens[:batch_size] = length


def step_update(
    rows: DraftRows,
    slots: SlotGroups,
    request_maps: Sequence[torch.Tensor],
    indexers: Sequence[IndexerRows],
    first: bool,
    tails: Sequence[TailRows] = (),
) -> None:
    """Write what one draft step needs; the arguments are those of `StepUpdate` and `StepUpdate.run`."""
    n = rows.num_rows
    row = torch.arange(n, device=rows.seq_lens.device, dtype=torch.int32)
    exists = row < rows.query_start_loc[n]
    table_rows, positions = rows.table_rows[:n].long(), rows.positions[:n].long()
    for group, table in enumerate(slots.tables):
        block_size = slots.block_sizes[group].long()
        mapped = exists & (table_rows >= 0) & slots.enabled[group]
        blocks = torch.where(mapped, positions // block_size, 0)
        slot = table[table_rows.clamp(min=0), blocks].long() * block_size + positions % block_size
        slots.slot_mapping[group, :n] = torch.where(mapped, slot, PAD_SLOT)
        if first:
            slots.slot_mapping[group, n:] = PAD_SLOT
    for indexer in indexers:
        lengths, pooled = rows.seq_lens[:n], indexer.pooled
        if pooled is None:
            indexer.lengths.copy_(lengths)
            continue
        indexer.lengths.copy_(lengths // pooled.ratio)
        completes = exists & (table_rows >= 0) & (lengths > 0) & (lengths % pooled.ratio == 0)
        state = torch.where(completes, (lengths.long() - 1) // pooled.ratio, 0)
        block = indexer.source[:n].gather(1, (state // pooled.block_states)[:, None])[:, 0].long()
        pooled.slots[:n] = torch.where(completes, block * pooled.block_states + state % pooled.block_states, PAD_SLOT)
    for tail in tails:
        block = tail.table[:n, 0].long()
        tail.slots[:n] = torch.where(exists & (block != 0), block * tail.ring + positions % tail.ring, PAD_SLOT)
    if not first:
        return
    for request_map in request_maps:
        request_map[:n] = torch.where(exists, row, n - 1)
    for indexer in indexers:
        for ones in indexer.ones:
            ones.fill_(1)
        if indexer.indices is not None:
            indexer.indices.copy_(row)
        if not same_buffer(indexer.source, indexer.table):
            indexer.table.copy_(indexer.source[:n])


def group_rows(batch: BatchDescriptor, out: GroupMetadata, enabled: torch.Tensor | None = None) -> None:
    """The planes of attention groups (`GroupRows`), for a batch with `query_start_loc`; nothing where `enabled` is 0."""
    on = None if enabled is None else enabled != 0
    bs, rows, width = batch.batch_size, batch.num_rows, batch.draft_tokens
    assert batch.query_start_loc is not None
    starts, seq_lens = batch.query_start_loc[: bs + 1].long(), batch.seq_lens[:bs].long()
    row = torch.arange(rows, device=seq_lens.device)
    request = row // width
    exists = row < starts[bs]
    values = {
        "request_map": torch.where(exists, request, 0),
        "lengths": (seq_lens[request] - width + 1 + row % width).clamp(min=0),
        "ones": torch.ones_like(row),
    }
    counts = starts[1:] - starts[:-1]
    for group in out.groups:
        for name, (vector, size) in group.vectors(batch).items():
            _overwrite(vector[:size], values.get(name, counts), on)
        for name, (table, size) in group.tables(batch).items():
            pages = _group_pages(out, group, table.shape[1])
            real, live = exists[::width], live_pages(batch, out.geometry, table.shape[1], by_row=name == "row_pages")
            if name == "row_pages":
                pages, real = pages[request], exists
            there = table[:size]
            _overwrite(there, torch.where(live, torch.where(real[:, None], pages, 0), there), on)


def _write_pools(
    pools: PoolMetadata,
    batch: BatchDescriptor,
    geometry: Geometry,
    cache_seqlens: torch.Tensor,
    expanded: torch.Tensor,
    on: torch.Tensor | None,
) -> None:
    assert isinstance(batch.slots, TokenTable)
    k, bs = geometry.index_kpool, batch.batch_size
    start = cache_seqlens - rows_of_requests(batch)
    tail = start.div(k, rounding_mode="floor") * k
    candidates = pool_shapes(batch, geometry)["pools.write_loc"][1]
    _write(pools.seqlens, expanded // k, on)
    _write(pools.write_start, start, on)
    _write(pools.tail_start, tail, on)
    _write(pools.requests, batch.slots.req_pool_indices[:bs].long(), on)
    for candidate in range(candidates):
        first = tail + candidate * k
        there = (first >= 0) & (first < cache_seqlens.clamp(max=geometry.table_width))
        slot = batch.slots.at(torch.where(there, first, 0)).long()
        _write(pools.write_loc[:, candidate], torch.where(there, slot // k, 0), on)
    if pools.accepted is not None and batch.accepted is not None:
        _write(pools.accepted, batch.accepted[:bs], on)


def _live_width(lengths: torch.Tensor, width: int) -> int:
    if lengths.device.type == "cpu" and lengths.numel():
        return min(width, max(int(lengths.max()), 0))
    return width


def _expand(values: torch.Tensor, batch: BatchDescriptor, request: torch.Tensor) -> torch.Tensor:
    return values if batch.rows_per_request == 1 and batch.extend_lens is None else values[request]


def _with_leading_zero(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([values.new_zeros(1), values])


def _write(vector: torch.Tensor | None, values: torch.Tensor, on: torch.Tensor | None = None) -> None:
    if vector is not None and not same_buffer(vector, values):
        _overwrite(vector[: values.shape[0]], values, on)


def _write_rows(table: torch.Tensor, values: torch.Tensor, on: torch.Tensor | None = None) -> None:
    _overwrite(table[: values.shape[0], : values.shape[1]], values, on)


def _overwrite(there: torch.Tensor, values: torch.Tensor, on: torch.Tensor | None) -> None:
    there.copy_(values if on is None else torch.where(on, values, there))


def _group_pages(out: GroupMetadata, group: GroupRows, width: int) -> torch.Tensor:
    """Pages [batch_size, width] of each request; columns past its block table hold those of block 0."""
    slots = out.block_table(group)
    per_block = slots.block_size // out.geometry.page_size
    columns = torch.arange(width, device=slots.block_table.device)
    blocks, last = columns // per_block, slots.block_table.shape[1] - 1
    numbers = slots.block_table[: out.batch.batch_size, blocks.clamp(max=last)].long() * (blocks <= last)
    return numbers * (group.page_stride or per_block) + columns % per_block
