"""Binds the Triton kernels to buffers: a binding writes addresses down once, a launch only passes the batch's tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from nsa_plugin.core.batch import PAD_SLOT, BatchDescriptor, BlockTable, Geometry, TokenTable
from nsa_plugin.core.errors import UnavailableError
from nsa_plugin.core.metadata import VECTORS, PrecomputedMetadata, StepMetadata, plane, same_buffer
from nsa_plugin.core.pools import POOL_TABLE
from nsa_plugin.core.records import records

if TYPE_CHECKING:
    from nsa_plugin.core.draft_steps import DraftLimits, DraftStep, FillDraftSteps
    from nsa_plugin.core.group_rows import GroupMetadata, GroupRows
    from nsa_plugin.core.step_update import BoundStepUpdate, DraftRows, IndexerRows, SlotGroups, TailRows

TILE, TILE_OF_SEVERAL_ROWS = 2048, 512
"""Columns of a page table that a program of the metadata and copy kernels handles at a time. The second holds where a
request has several rows: smaller tiles keep many multiprocessors busy with short tables too."""
BLOCK = 256
"""Requests or rows that a program of the metadata and copy kernels scans at a time."""
DRAFT_STEPS_BLOCK = 128
"""Rows that a program of the draft-steps kernel takes through all steps."""
STEP_UPDATE_BLOCK = 1024
"""Columns of a table, or slots, that a program of the step-update kernel handles at a time."""
GROUP_ROWS_BLOCK = 1024
"""Pages that a program of the group-rows kernel copies at a time."""
GROUP_ROWS_CHUNK = 4096
"""Pages of a row that one such program takes on: longer rows are shared."""
PROGRAMS_PER_SM = 4
"""Programs per multiprocessor that share the page tables."""
NUM_WARPS = 4


def unavailable_because(device: torch.device) -> str:
    """Why the kernels can't run on tensors of `device`; empty if they can."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "the package triton is not installed"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return f"Triton needs a CUDA device, not {device} (TRITON_INTERPRET=1, set before the first import, interprets on a CPU)"


def require(device: torch.device) -> None:
    """Raise `UnavailableError` unless the kernels can run on tensors of `device`."""
    if reason := unavailable_because(device):
        raise UnavailableError(f"impl='triton': {reason}; use impl='reference' or 'auto'")


def bind_precompute(
    batch: BatchDescriptor,
    out: PrecomputedMetadata,
    copies: Sequence[StepMetadata] = (),
    enabled: torch.Tensor | None = None,
) -> Callable[[BatchDescriptor], None]:
    """Bind the metadata kernel to the buffers of `out` and of `copies`, further consumers of step 0.

    The returned function takes any batch of the same mode, batch size and kind of slots. With `copies`, all steps see
    equal lengths, and each copy has the vectors, page tables and planes of pools that `out` has. Where `enabled`
    (int32 [1]) is 0, a launch writes nothing.
    """
    from nsa_plugin.core.kernels import metadata

    geometry = out.geometry
    destinations = (*out.steps, *copies)
    written = records(destinations, (*batch.offsets, *[batch.offsets[0]] * len(copies)), ())
    wide, real, aligned = _layout(destinations, geometry)
    token_table = isinstance(batch.slots, TokenTable)
    ragged = batch.extend_lens is not None
    tile = TILE if batch.rows_per_request == 1 else TILE_OF_SEVERAL_ROWS
    grid = (2 * len(destinations) + geometry.num_sms * PROGRAMS_PER_SM,)
    fixed = {
        "page_size": geometry.page_size, "TOKEN_TABLE": token_table, "RAGGED": ragged, "WIDE": wide, "REAL": real,
        "SUMS": out.steps[0].cu_seqlens_k is not None, "ROWS": out.steps[0].seqlens_expanded is not None,
        "TOKENS": any(step.positions is not None for step in destinations), "KPOOL": geometry.index_kpool,
        "POOLS": out.steps[0].pools is not None, "POOLED": plane(out.steps[0], POOL_TABLE) is not None,
        "ACCEPTED": batch.accepted is not None and plane(out.steps[0], "pools.accepted") is not None,
        "MAPPED": out.steps[0].mapped_slots is not None, "SWITCHED": enabled is not None, "TILE": tile,
        "BLOCK": BLOCK, "num_warps": NUM_WARPS,
    }  # fmt: skip
    batch_size, added, longest = batch.batch_size, batch.added_tokens, batch.added_tokens + max(batch.offsets)
    rows_per_request, num_tables = batch.rows_per_request, 1 + len(copies)
    limit = geometry.length_limit(batch)

    def launch(batch: BatchDescriptor) -> None:
        slots, seq_lens = batch.slots, batch.seq_lens
        extend_lens = seq_lens if batch.extend_lens is None else batch.extend_lens
        accepted = seq_lens if batch.accepted is None else batch.accepted
        if isinstance(slots, TokenTable):
            table, pool, block_size = slots.req_to_token, slots.req_pool_indices, 1
        else:
            table, pool, block_size = slots.block_table, seq_lens, slots.block_size
        mapping, written_slots, sizes = seq_lens, seq_lens, (0, 0, 0)
        if batch.slot_map is not None:
            mapping, written_slots = batch.slot_map.mapping, batch.slot_map.written
            sizes = (written_slots.stride(0), written_slots.stride(1), written_slots.shape[1])
        row_stride, column_stride = table.stride()
        words = row_stride % 4 == 0 and column_stride == 1 and table.data_ptr() % 16 == 0
        metadata.metadata_kernel[grid](
            seq_lens, extend_lens, accepted, pool, table, written, seq_lens if enabled is None else enabled, mapping, written_slots,
            seq_lens.stride(0), extend_lens.stride(0), accepted.stride(0), pool.stride(0), row_stride, column_stride,
            len(destinations), num_tables, written.shape[1], batch_size, added, longest, limit, geometry.table_width, geometry.index_topk,
            rows_per_request, block_size, *sizes, ALIGNED=aligned and words, **fixed,
        )  # fmt: skip

    return launch


def bind_copy(source: PrecomputedMetadata, destinations: Sequence[StepMetadata]) -> Callable[[], None]:
    """Bind the copy kernel to the buffers of `source` and of its destinations."""
    from nsa_plugin.core.kernels import fast_copy

    batch, geometry = source.batch, source.geometry
    planes = tuple(destinations[0].derived) if destinations else ()
    sources = records(source.steps, batch.offsets, planes)
    targets = records(destinations, (0,) * len(destinations), planes)
    wide, real, aligned = _layout((*source.steps, *destinations), geometry)
    longest = source.steps[batch.offsets.index(max(batch.offsets))].cache_seqlens
    extend_lens = longest if batch.extend_lens is None else batch.extend_lens
    tokens = any(step.positions is not None for step in destinations)
    pooled = any(plane(step, POOL_TABLE) is not None for step in destinations)
    lacking = any(plane(step, name) is None for step in destinations for name in VECTORS)
    grid = (len(destinations) + geometry.num_sms * PROGRAMS_PER_SM,)

    def launch() -> None:
        fast_copy.copy_kernel[grid](
            longest, extend_lens, sources, targets,
            longest.stride(0), extend_lens.stride(0), len(source.steps), len(destinations), targets.shape[1], len(planes),
            batch.batch_size, batch.num_rows, geometry.table_width, batch.rows_per_request,
            page_size=geometry.page_size, RAGGED=batch.extend_lens is not None, WIDE=wide, REAL=real, LACKING=lacking, TOKENS=tokens,
            KPOOL=geometry.index_kpool, POOLED=pooled, ALIGNED=aligned, TILE=TILE, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip

    return launch


def bind_draft_steps(steps: Sequence[DraftStep], limits: DraftLimits) -> FillDraftSteps:
    """Bind the draft-steps kernel to the destinations `steps`; one launch fills all of them."""
    from nsa_plugin.core.kernels.draft_steps import draft_steps_kernel

    addresses = [[step.positions.data_ptr(), step.slots.data_ptr(), step.seq_lens.data_ptr()] for step in steps]
    records = torch.tensor(addresses, dtype=torch.int64).to(steps[0].positions.device)
    pad = limits.pads

    def fill(
        positions: torch.Tensor, seq_lens: torch.Tensor, table: BlockTable, batch_size: int, num_rows: int
    ) -> None:
        blocks = table.block_table
        draft_steps_kernel[(-(-num_rows // DRAFT_STEPS_BLOCK),)](
            positions, seq_lens, blocks, records,
            positions.stride(0), seq_lens.stride(0), *blocks.stride(), len(steps), batch_size, num_rows, blocks.shape[1],
            table.block_size, limits.max_model_len, limits.padding_slot, PAD=pad, BLOCK=DRAFT_STEPS_BLOCK,
            num_warps=NUM_WARPS,
        )  # fmt: skip

    return fill


def bind_step_update(
    rows: DraftRows,
    slots: SlotGroups,
    request_maps: Sequence[torch.Tensor],
    indexers: Sequence[IndexerRows],
    tails: Sequence[TailRows],
) -> list[BoundStepUpdate]:
    """Bind the step-update kernel; returns the launches of a step, each to be called with `first`.

    Launch i serves request map i, indexer i and tail i; launch 0 writes the slots too.
    """
    from nsa_plugin.core.kernels.step_update import step_update_kernel

    groups, capacity = slots.slot_mapping.shape
    padding_programs = groups * -(-capacity // STEP_UPDATE_BLOCK)
    unused = rows.seq_lens

    def bound(number: int) -> BoundStepUpdate:
        request_map = request_maps[number] if number < len(request_maps) else None
        indexer = indexers[number] if number < len(indexers) else None
        ones = (*indexer.ones, *indexer.ones)[:2] if indexer else (unused, unused)
        source, table = (indexer.source, indexer.table) if indexer else (unused[None], unused[None])
        indices = indexer.indices if indexer else None
        pooled = indexer.pooled if indexer else None
        tail = tails[number] if number < len(tails) else None
        tail_table = unused[None] if tail is None else tail.table
        tensors = (
            rows.positions, rows.seq_lens, rows.query_start_loc, rows.table_rows,
            slots.addresses, slots.row_strides, slots.block_sizes, slots.enabled, slots.slot_mapping,
            unused if request_map is None else request_map, indexer.lengths if indexer else unused, *ones,
            unused if indices is None else indices, source, table, unused if pooled is None else pooled.slots, tail_table,
            unused if tail is None else tail.slots,
        )  # fmt: skip
        sizes = (
            rows.num_rows, groups, capacity, slots.slot_mapping.stride(0), source.stride(0), table.stride(0), table.shape[1],
            *((pooled.ratio, pooled.block_states) if pooled else (1, 1)), tail_table.stride(0), tail.ring if tail else 1,
        )  # fmt: skip
        fixed = {
            "SLOTS": number == 0, "MAP": request_map is not None, "INDEXER": indexer is not None,
            "INDICES": indices is not None, "TABLE": indexer is not None and not same_buffer(source, table),
            "POOLED": pooled is not None, "TAIL": tail is not None, "PAD": PAD_SLOT, "BLOCK": STEP_UPDATE_BLOCK, "num_warps": NUM_WARPS,
        }  # fmt: skip

        def launch(first: bool) -> None:
            if not first and number > 0 and indexer is None and tail is None:
                return
            extra = padding_programs if first and number == 0 else 0
            step_update_kernel[(rows.num_rows + extra,)](*tensors, *sizes, FIRST=first, **fixed)

        return launch

    return [bound(number) for number in range(max(1, len(request_maps), len(indexers), len(tails)))]


def bind_group_rows(out: GroupMetadata, enabled: torch.Tensor | None) -> Callable[[BatchDescriptor], None]:
    """The kernel, bound to the buffers of `out`; block tables are those of `out`, too."""
    from nsa_plugin.core.kernels.group_rows import group_rows_kernel

    records = torch.tensor([_group_record(out, group) for group in out.groups], dtype=torch.int64)
    device, num_rows = out.batch.seq_lens.device, out.batch.num_rows
    records = records.to(device)
    widths = [table.shape[1] for group in out.groups for table, _ in group.tables(out.batch).values()]
    grid = (num_rows, len(out.groups), max(1, -(-max(widths, default=0) // GROUP_ROWS_CHUNK)))
    fixed: dict[str, Any] = {
        "SWITCHED": enabled is not None,
        "CHUNK": GROUP_ROWS_CHUNK,
        "BLOCK": GROUP_ROWS_BLOCK,
        "num_warps": NUM_WARPS,
    }
    batch_size, width = out.batch.batch_size, out.batch.draft_tokens

    def launch(batch: BatchDescriptor) -> None:
        if not num_rows:
            return
        seq_lens = batch.seq_lens
        group_rows_kernel[grid](
            seq_lens, batch.query_start_loc, records, seq_lens if enabled is None else enabled, seq_lens.stride(0),
            batch_size, width, records.shape[1], **fixed,
        )  # fmt: skip

    return launch


def _layout(steps: Sequence[StepMetadata], geometry: Geometry) -> tuple[bool, bool, bool]:
    """Whether the steps have a wide page table, whether the real one is another, whether wide rows are 16-byte words."""
    tables = [step.page_table_1 for step in steps if step.page_table_1 is not None]
    aligned = geometry.table_width % 4 == 0 and all(
        table.data_ptr() % 16 == 0 and table.stride(0) % 4 == 0 and table.stride(1) == 1 for table in tables
    )
    return bool(tables), geometry.page_size > 1, bool(tables) and aligned


def _group_record(out: GroupMetadata, group: GroupRows) -> list[int]:
    """Addresses and strides of a group, in the order of the kernel's fields; address 0 is a plane that is not there."""
    page_size = out.geometry.page_size
    words = [_address(group.request_map), _address(group.lengths), _address(group.ones)]
    words += [*map(_address, group.query_lens), 0, 0][:2]
    for table in (group.row_pages, group.request_pages):
        words += [_address(table), 0 if table is None else table.stride(0), 0 if table is None else table.shape[1]]
    if not group.tables(out.batch):
        return [*words, 0, 0, 0, 1, 1, 1, page_size]
    slots = out.block_table(group)
    per_block = slots.block_size // page_size
    blocks = slots.block_table
    return [
        *words, blocks.data_ptr(), *blocks.stride(), blocks.shape[1], per_block, group.page_stride or per_block, page_size
    ]  # fmt: skip


def _address(plane: torch.Tensor | None) -> int:
    return 0 if plane is None else plane.data_ptr()
