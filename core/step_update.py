"""What changes between the steps of a draft whose metadata stays in place: written by one kernel per step.

An engine that records its whole draft in one CUDA graph keeps positions, lengths and block tables in buffers of its
own, advances them after each step, and lets the attention groups read metadata at fixed addresses. Each step then needs
the KV slot of its one token per request, and each group whatever it derives from the lengths; the request map, the rows
of ones and the block-table copy are the same in all steps, so that only the first one writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from nsa_plugin.core.api import Impl, resolve_impl
from nsa_plugin.core.checks import INT32, INTEGERS, TensorChecks, at_least, boolean, instance, instances
from nsa_plugin.core.errors import reject
from nsa_plugin.core.metadata import same_buffer

BoundStepUpdate = Callable[[bool], None]
"""Writes what a draft step needs into the buffers that it was bound to; told whether the step is the first of its draft."""
PAD_SLOT = -1
"""Slot of a token that is not to be written to the KV cache."""
BLOCK = 1024
"""Columns of a table, or slots, that a program handles at a time."""


@dataclass(frozen=True, slots=True)
class DraftRows:
    """The rows of a draft step, one query token per request, as views of the engine's buffers.

    Parameters
    ----------
    num_rows : int >= 1
        Requests, padding included.
    positions : int32 or int64 tensor [>= num_rows]
        Position of each row's token.
    seq_lens : int32 tensor [>= num_rows]
        Tokens that each row sees, its own included.
    query_start_loc : int32 tensor [>= num_rows + 1]
        Its entry `num_rows` says how many rows exist; the others are padding.
    table_rows : int32 or int64 tensor [>= num_rows]
        Row of the block tables of each request; negative for a request without blocks.
    """

    num_rows: int
    positions: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    table_rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class SlotGroups:
    """The block tables of all KV-cache groups, and where the slots of their tokens go.

    Parameters
    ----------
    tables : sequence of G contiguous int32 tensors [requests, blocks of that group]
    addresses : uint64 or int64 tensor [G]
        Their addresses, on the device.
    row_strides : int64 tensor [G]
        Their strides in elements.
    block_sizes : int32 tensor [G]
        Tokens per block.
    enabled : bool tensor [G]
        A group without has padding only.
    slot_mapping : int64 tensor [G, capacity >= num_rows], rows of stride 1
        Slot of each row's token; padding from the first row that does not exist to the end.
    """

    tables: Sequence[torch.Tensor]
    addresses: torch.Tensor
    row_strides: torch.Tensor
    block_sizes: torch.Tensor
    enabled: torch.Tensor
    slot_mapping: torch.Tensor


@dataclass(frozen=True, slots=True)
class IndexerRows:
    """What an indexer keeps for rows of one token each (int32, contiguous; None where there is nothing to write).

    Parameters
    ----------
    lengths : [num_rows]
        Takes `DraftRows.seq_lens`.
    ones : one or two tensors [num_rows]
        Query tokens of each row.
    indices : [num_rows] or None
        Takes 0, 1, 2 …
    source, table : [>= num_rows, width] and [num_rows, width], rows of stride 1
        Block table of the requests, and of the rows: its copy, or the same buffer, which is then left alone.
    """

    lengths: torch.Tensor
    ones: tuple[torch.Tensor, ...]
    indices: torch.Tensor | None
    source: torch.Tensor
    table: torch.Tensor


BindStepUpdate = Callable[
    [DraftRows, SlotGroups, Sequence[torch.Tensor], Sequence[IndexerRows]], BoundStepUpdate | None
]
"""Provides an implementation bound to these buffers, or None."""


class StepUpdate:
    """Bound to the buffers of one captured size; `run` is called at the start of each draft step.

    Parameters
    ----------
    rows : DraftRows
    slots : SlotGroups
    request_maps : sequence of contiguous int32 tensors [>= num_rows]
        Take the request of each row; rows that do not exist belong to the last one.
    indexers : sequence of IndexerRows
    impl : "auto", "reference" or "triton"
        As in `precompute`.
    bind : callable, optional
        Asked first for an implementation; where it returns None, `impl` is used.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        A buffer has a wrong dtype, shape or stride.
    UnavailableError
        `impl` can't run here.

    Notes
    -----
    With Triton a step is one launch, and one more for each further request map and indexer after the first of each.
    `run` allocates nothing (the reference aside), does not sync with the host, and may be recorded in a CUDA graph.
    """

    def __init__(
        self,
        rows: DraftRows,
        slots: SlotGroups,
        request_maps: Sequence[torch.Tensor] = (),
        indexers: Sequence[IndexerRows] = (),
        *,
        impl: Impl = "auto",
        bind: BindStepUpdate | None = None,
    ) -> None:
        _check(rows, slots, request_maps, indexers)
        provided = bind(rows, slots, request_maps, indexers) if bind is not None else None
        if provided is not None:
            self._launches = [provided]
        elif resolve_impl(impl, rows.seq_lens.device) == "triton":
            self._launches = _bind(rows, slots, request_maps, indexers)
        else:
            self._launches = [lambda first: _reference(rows, slots, request_maps, indexers, first)]

    def run(self, *, first: bool) -> None:
        """Write what the step that begins now needs; `first` also what stays the same in all steps of a draft."""
        boolean("first", first)
        for launch in self._launches:
            launch(first)


def _bind(
    rows: DraftRows, slots: SlotGroups, request_maps: Sequence[torch.Tensor], indexers: Sequence[IndexerRows]
) -> list[Callable[[bool], None]]:
    from nsa_plugin.core.kernels.step_update import step_update_kernel

    groups, capacity = slots.slot_mapping.shape
    padding_programs = groups * -(-capacity // BLOCK)
    unused = rows.seq_lens

    def bound(number: int) -> Callable[[bool], None]:
        request_map = request_maps[number] if number < len(request_maps) else None
        indexer = indexers[number] if number < len(indexers) else None
        ones = (*indexer.ones, *indexer.ones)[:2] if indexer else (unused, unused)
        source, table = (indexer.source, indexer.table) if indexer else (unused[None], unused[None])
        indices = indexer.indices if indexer else None
        tensors = (
            rows.positions, rows.seq_lens, rows.query_start_loc, rows.table_rows,
            slots.addresses, slots.row_strides, slots.block_sizes, slots.enabled, slots.slot_mapping,
            unused if request_map is None else request_map, indexer.lengths if indexer else unused, *ones,
            unused if indices is None else indices, source, table,
        )  # fmt: skip
        sizes = (
            rows.num_rows, groups, capacity, slots.slot_mapping.stride(0), source.stride(0), table.stride(0), table.shape[1]
        )  # fmt: skip
        fixed = {
            "SLOTS": number == 0, "MAP": request_map is not None, "INDEXER": indexer is not None,
            "INDICES": indices is not None, "TABLE": indexer is not None and not same_buffer(source, table),
            "PAD": PAD_SLOT, "BLOCK": BLOCK, "num_warps": 4,
        }  # fmt: skip

        def launch(first: bool) -> None:
            if not first and number > 0 and indexer is None:
                return
            extra = padding_programs if first and number == 0 else 0
            step_update_kernel[(rows.num_rows + extra,)](*tensors, *sizes, FIRST=first, **fixed)

        return launch

    return [bound(number) for number in range(max(1, len(request_maps), len(indexers)))]


def _reference(
    rows: DraftRows,
    slots: SlotGroups,
    request_maps: Sequence[torch.Tensor],
    indexers: Sequence[IndexerRows],
    first: bool,
) -> None:
    """The definition of right, in plain torch, without a host sync."""
    n = rows.num_rows
    row = torch.arange(n, device=rows.seq_lens.device, dtype=torch.int32)
    exists = row < rows.query_start_loc[n]
    table_rows, positions = rows.table_rows[:n].long(), rows.positions[:n].long()
    for group, table in enumerate(slots.tables):
        block_size = slots.block_sizes[group].long()
        there = exists & (table_rows >= 0) & slots.enabled[group]
        blocks = torch.where(there, positions // block_size, 0)
        slot = table[table_rows.clamp(min=0), blocks].long() * block_size + positions % block_size
        slots.slot_mapping[group, :n] = torch.where(there, slot, PAD_SLOT)
        if first:
            slots.slot_mapping[group, n:] = PAD_SLOT
    for indexer in indexers:
        indexer.lengths.copy_(rows.seq_lens[:n])
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


def _check(
    rows: DraftRows, slots: SlotGroups, request_maps: Sequence[torch.Tensor], indexers: Sequence[IndexerRows]
) -> None:
    instance("rows", rows, DraftRows)
    instance("slots", slots, SlotGroups)
    n, groups = rows.num_rows, len(instances("slots.tables", slots.tables, torch.Tensor))
    at_least("num_rows", n, 1)
    checks = TensorChecks(instance("seq_lens", rows.seq_lens, torch.Tensor).device, "seq_lens")
    instances("request_maps", request_maps, torch.Tensor)
    instances("indexers", indexers, IndexerRows)
    vector, table = partial(checks.vector, contiguous=True), partial(checks.table, contiguous_rows=True)
    vector("positions", rows.positions, n, INTEGERS)
    vector("seq_lens", rows.seq_lens, n)
    vector("query_start_loc", rows.query_start_loc, n + 1)
    vector("table_rows", rows.table_rows, n, INTEGERS)
    for name, dtypes in (
        ("addresses", (torch.uint64, torch.int64)), ("row_strides", (torch.int64,)), ("block_sizes", (torch.int32,)),
        ("enabled", (torch.bool,)),
    ):  # fmt: skip
        vector(name, getattr(slots, name), groups, dtypes)
    table("slot_mapping", slots.slot_mapping, groups, n, (torch.int64,))
    for index, blocks in enumerate(slots.tables):
        table(f"tables[{index}]", blocks, 1, 1)
    for index, request_map in enumerate(request_maps):
        vector(f"request_maps[{index}]", request_map, n)
    for index, indexer in enumerate(indexers):
        name = f"indexers[{index}]"
        if not 1 <= len(instances(f"{name}.ones", indexer.ones, torch.Tensor)) <= 2:
            reject(f"{name}.ones", "one or two tensors", len(indexer.ones))
        vectors = [("lengths", indexer.lengths), *((f"ones[{i}]", ones) for i, ones in enumerate(indexer.ones))]
        for field, value in vectors if indexer.indices is None else (*vectors, ("indices", indexer.indices)):
            vector(f"{name}.{field}", value, n)
        width = checks.tensor(f"{name}.table", indexer.table, 2, INT32).shape[1]
        table(f"{name}.table", indexer.table, n, width)
        table(f"{name}.source", indexer.source, n, 0)
        if indexer.source.shape[1] != width:
            reject(f"{name}.source", f"{width} columns, as the table has", indexer.source.shape[1])
