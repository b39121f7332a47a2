"""What attention groups keep of query rows, each in buffers of its own: one launch writes it for all groups.

vLLM's target has a group for sparse attention and one for its indexer, or two of each. A captured graph reads their
planes at fixed addresses: which request a row belongs to, how much it sees, how many rows a request has, and pages by
row or by request. `GroupRows` are a plan's consumers in place of `StepMetadata` where an engine keeps these planes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nsa_plugin.core.batch import BatchDescriptor, BlockTable, ForwardMode, Geometry
from nsa_plugin.core.checks import INT32, TensorChecks, at_least, instance, instances, overlap
from nsa_plugin.core.errors import InvalidTypeError, reject


@dataclass(frozen=True, slots=True)
class GroupRows:
    """The planes of one attention group (int32, None or () where it keeps no such thing).

    Of R requests with W = draft_tokens rows each, row t is row j = t % W of request t // W. A row exists below the last
    entry of `BatchDescriptor.query_start_loc`; the others are padding. Every entry is defined, of page tables the first
    column, and of existing rows those below the request's length.

    Attributes
    ----------
    request_map : contiguous [>= R * W]
        Request of each row; 0 for padding.
    lengths : contiguous [>= R * W]
        Tokens that each row sees: max(seq_lens - W + j + 1, 0).
    query_lens : one or two contiguous tensors [>= R]
        Rows of each request.
    ones : contiguous [>= R * W]
        1.
    row_pages, request_pages : [>= R * W, pages] and [>= R, pages], rows of stride 1
        Page of each page of tokens, by row and by request; 0 for padding.
    slots : BlockTable
        Where the pages come from, if it is not the batch's own table.
    page_stride : int
        Page i of block b is b * page_stride + i; 0 for blocks without gaps.
    """

    request_map: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    query_lens: tuple[torch.Tensor, ...] = ()
    ones: torch.Tensor | None = None
    row_pages: torch.Tensor | None = None
    request_pages: torch.Tensor | None = None
    slots: BlockTable | None = None
    page_stride: int = 0

    def vectors(self, batch: BatchDescriptor) -> dict[str, tuple[torch.Tensor, int]]:
        """The vectors that are there, by name, each with the entries that are written."""
        per_row = {"request_map": self.request_map, "lengths": self.lengths, "ones": self.ones}
        found = {name: (plane, batch.num_rows) for name, plane in per_row.items() if plane is not None}
        return found | {f"query_lens[{i}]": (plane, batch.batch_size) for i, plane in enumerate(self.query_lens)}

    def tables(self, batch: BatchDescriptor) -> dict[str, tuple[torch.Tensor, int]]:
        """The page tables that are there, by name, each with the rows that are written."""
        sizes = {"row_pages": (self.row_pages, batch.num_rows), "request_pages": (self.request_pages, batch.batch_size)}
        return {name: (plane, rows) for name, (plane, rows) in sizes.items() if plane is not None}


@dataclass(frozen=True, slots=True)
class GroupMetadata:
    """The planes of all groups, written from one batch.

    Attributes
    ----------
    groups : sequence of GroupRows
    batch : BatchDescriptor
        DRAFT_EXTEND, over a block table, with `query_start_loc`.
    geometry : Geometry
    """

    groups: Sequence[GroupRows]
    batch: BatchDescriptor
    geometry: Geometry

    def block_table(self, group: GroupRows) -> BlockTable:
        """Where the pages of a group come from, for every batch."""
        slots = group.slots or self.batch.slots
        assert isinstance(slots, BlockTable)
        return slots


def live_pages(batch: BatchDescriptor, geometry: Geometry, columns: int, *, by_row: bool) -> torch.Tensor:
    """Which entries of a page table are defined: bool [requests, columns], or with `by_row` [rows, columns]."""
    lengths = batch.seq_lens[: batch.batch_size]
    if by_row:
        lengths = lengths.repeat_interleave(batch.draft_tokens)
    column = torch.arange(columns, device=lengths.device)
    return (column == 0) | (column * geometry.page_size < lengths[:, None])


def check_groups(out: GroupMetadata, batch: BatchDescriptor) -> None:
    """Raise unless `out` can hold what is kept of `batch`, which is well formed."""
    instance("out", out, GroupMetadata)
    if not instances("groups", out.groups, GroupRows):
        reject("groups", "at least one", "none")
    if batch.mode is not ForwardMode.DRAFT_EXTEND or batch.extend_lens is not None:
        came = batch.mode.name + (" with extend_lens" if batch.extend_lens is not None else "")
        reject("batch", "DRAFT_EXTEND with draft_tokens rows of each request", came)
    if batch.query_start_loc is None:
        reject("query_start_loc", "a tensor", None, fix="it says which rows are padding", error=InvalidTypeError)
    written: list[tuple[str, torch.Tensor, tuple[int, ...]]] = []
    for index, group in enumerate(out.groups):
        written += _check_group(f"groups[{index}]", group, out, batch)
    for (name, plane, shape), (other, against, extent) in itertools.combinations(written, 2):
        if overlap(plane, shape, against, extent):
            reject(other, f"a buffer apart from {name}", "one that overlaps it")


def _check_group(
    name: str, group: GroupRows, out: GroupMetadata, batch: BatchDescriptor
) -> list[tuple[str, torch.Tensor, tuple[int, ...]]]:
    checks = TensorChecks(batch.seq_lens.device, "seq_lens")
    if len(instances(f"{name}.query_lens", group.query_lens, torch.Tensor)) > 2:
        reject(f"{name}.query_lens", "at most two tensors", len(group.query_lens))
    at_least(f"{name}.page_stride", group.page_stride, 0)
    if group.slots is not None:
        _check_slots(f"{name}.slots", instance(f"{name}.slots", group.slots, BlockTable), batch, checks)
    found: list[tuple[str, torch.Tensor, tuple[int, ...]]] = []
    for field, (plane, size) in group.vectors(batch).items():
        checks.vector(f"{name}.{field}", plane, size, contiguous=True)
        found.append((f"{name}.{field}", plane, (size,)))
    for field, (table, rows) in group.tables(batch).items():
        checks.table(f"{name}.{field}", table, rows, 1, contiguous_rows=True)
        found.append((f"{name}.{field}", table, (rows, table.shape[1])))
    if group.tables(batch):
        slots = group.slots or batch.slots
        if not isinstance(slots, BlockTable):
            reject(f"{name}.slots", "a BlockTable, or one as the batch's own", type(slots).__name__)
        checks.tensor(f"{name}: block_table", slots.block_table, 2, INT32)
        if slots.block_size % out.geometry.page_size:
            reject(f"{name}: block_size", f"a multiple of the page size, {out.geometry.page_size}", slots.block_size)
    if not found:
        reject(name, "at least one plane", "none")
    return found


def _check_slots(name: str, slots: BlockTable, batch: BatchDescriptor, checks: TensorChecks) -> None:
    checks.tensor(f"{name}.block_table", slots.block_table, 2, INT32)
    at_least(f"{name}.block_size", slots.block_size, 1)
    if slots.block_table.shape[0] < batch.batch_size or not slots.block_table.shape[1]:
        reject(f"{name}.block_table", f"{batch.batch_size} rows or more, of blocks", tuple(slots.block_table.shape))
