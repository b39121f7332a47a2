"""Checks of batches, geometries and buffers. They run when buffers are bound, never at a replay."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch

from nsa_plugin.core.batch import NO_LIMIT, BatchDescriptor, BlockTable, ForwardMode, Geometry, TokenTable
from nsa_plugin.core.checks import INT32, INTEGERS, TensorChecks, at_least, boolean, instance, instances, overlap
from nsa_plugin.core.errors import InvalidTypeError, reject
from nsa_plugin.core.metadata import (
    PAGE_TABLES,
    ROW_VECTORS,
    TABLES,
    TOKENS,
    VECTORS,
    PrecomputedMetadata,
    StepMetadata,
    plane,
    same_buffer,
    table_sizes,
    vector_sizes,
)
from nsa_plugin.core.pools import (
    INT64_POOL_PLANES,
    POOL_PLANES,
    POOL_TABLE,
    PREFIX,
    PoolMetadata,
    pool_shapes,
    rows_of_requests,
)


def check_batch(batch: BatchDescriptor, geometry: Geometry) -> None:
    """Raise unless `batch` and `geometry` are well formed and fit each other. Checks shapes, dtypes, devices, no values."""
    instance("batch", batch, BatchDescriptor)
    instance("geometry", geometry, Geometry)
    if not isinstance(batch.mode, ForwardMode):
        reject("mode", "a ForwardMode", repr(batch.mode), error=InvalidTypeError)
    at_least("batch_size", batch.batch_size, 0)
    at_least("num_steps", batch.num_steps, 1)
    at_least("draft_tokens", batch.draft_tokens, 1)
    for name in ("index_topk", "page_size", "table_width", "num_sms", "index_kpool"):
        at_least(f"geometry.{name}", getattr(geometry, name), 1)
    if geometry.page_size & (geometry.page_size - 1):
        reject("geometry.page_size", "a power of two", geometry.page_size)
    boolean("geometry.wide_page_table", geometry.wide_page_table)
    if geometry.max_length is not None:
        at_least("geometry.max_length", geometry.max_length, 1)
        if geometry.max_length > NO_LIMIT:
            reject("geometry.max_length", f"at most {NO_LIMIT} (NO_LIMIT)", geometry.max_length)
    pool = geometry.index_kpool
    if pool & (pool - 1) or geometry.page_size % pool or geometry.index_topk % pool:
        wanted = f"a power of two that divides page_size {geometry.page_size} and index_topk {geometry.index_topk}"
        reject("geometry.index_kpool", wanted, pool)
    instance("seq_lens", batch.seq_lens, torch.Tensor)
    checks = _checks(batch)
    checks.vector("seq_lens", batch.seq_lens, batch.batch_size, INTEGERS)
    _check_steps(batch)
    _check_slots(batch, geometry, checks)
    if batch.extend_lens is not None:
        if batch.mode is not ForwardMode.DRAFT_EXTEND:
            reject("extend_lens", "None outside DRAFT_EXTEND", f"a tensor in {batch.mode.name}")
        checks.vector("extend_lens", batch.extend_lens, batch.batch_size, INTEGERS)
    if batch.query_start_loc is not None:
        checks.vector("query_start_loc", batch.query_start_loc, batch.batch_size + 1, INTEGERS, contiguous=True)
        if batch.mode is not ForwardMode.DRAFT_EXTEND or batch.extend_lens is not None:
            reject("query_start_loc", "None outside DRAFT_EXTEND of the static width", f"a tensor in {batch.mode.name}")
    if batch.accepted is not None:
        if batch.mode is not ForwardMode.DRAFT_EXTEND:
            reject("accepted", "None outside DRAFT_EXTEND", f"a tensor in {batch.mode.name}")
        checks.vector("accepted", batch.accepted, batch.batch_size, INTEGERS)


def check_values(batch: BatchDescriptor, geometry: Geometry) -> None:
    """Raise unless every length, request index and live slot is in range. Reads the tensors on the host."""
    bs = batch.batch_size
    if bs == 0:
        return
    longest = geometry.table_width - batch.added_tokens
    _check_range(
        "seq_lens", batch.seq_lens[:bs], 0, longest, f"table_width {geometry.table_width} less the added tokens"
    )
    if batch.extend_lens is not None:
        _check_range("extend_lens", batch.extend_lens[:bs], 0, batch.draft_tokens, "draft_tokens")
        rows = batch.extend_lens[:bs]
        if (wrong := (rows > batch.seq_lens[:bs]).nonzero()).numel():
            index = int(wrong[0])
            reject(f"extend_lens[{index}]", f"at most {int(batch.seq_lens[index])} (its seq_lens)", int(rows[index]))
    if batch.accepted is not None:
        _check_range("accepted", batch.accepted[:bs], 0, batch.draft_tokens, "draft_tokens")
        if (wrong := (batch.accepted[:bs] > rows_of_requests(batch)).nonzero()).numel():
            index = int(wrong[0])
            reject(f"accepted[{index}]", "at most its extend_lens", int(batch.accepted[index]))
    unit, name = 1, "block_table"
    if isinstance(batch.slots, TokenTable):
        last, name = batch.slots.req_to_token.shape[0] - 1, "req_to_token"
        _check_range("req_pool_indices", batch.slots.req_pool_indices[:bs], 0, last, "rows of req_to_token")
    else:
        unit = batch.slots.block_size
    live = batch.seq_lens[:bs] + batch.added_tokens + max(batch.offsets)
    slots = batch.slots.lookup(bs, geometry.table_width, unit)
    columns = torch.arange(slots.shape[1], device=slots.device) * unit
    if (wrong := ((slots < 0) & (columns < live[:, None])).nonzero()).numel():
        request, column = wrong[0].tolist()
        reject(f"{name}, request {request}, column {column}", "0 or more", int(slots[request, column]) // unit)


def check_buffers(out: PrecomputedMetadata, batch: BatchDescriptor, geometry: Geometry) -> None:
    """Raise unless `out` can hold the metadata of `batch`."""
    instance("out", out, PrecomputedMetadata)
    instances("out.steps", out.steps, StepMetadata)
    if len(out.steps) != len(batch.offsets):
        reject("out.steps", f"{len(batch.offsets)} (one per distinct step offset)", len(out.steps))
    for index, step in enumerate(out.steps):
        check_step(f"out.steps[{index}]", step, batch, geometry)
        for other in range(index):
            _check_apart(f"out.steps[{index}]", step, f"out.steps[{other}]", out.steps[other], batch, geometry)
        for name in (*VECTORS, "pools"):
            if (getattr(step, name) is None) is not (getattr(out.steps[0], name) is None):
                reject(f"out.steps[{index}].{name}", "those of all steps, or of none", "others than in step 0")
        for name in PAGE_TABLES if batch.num_rows else ():
            shared, table = plane(out.steps[0], name), plane(step, name)
            if shared is not table and (shared is None or table is None or not same_buffer(shared, table)):
                fix = "all steps share their page tables"
                reject(f"out.steps[{index}].{name}", "the buffer of step 0", "another one", fix=fix)


def check_enabled(enabled: torch.Tensor | None, batch: BatchDescriptor, copies: Sequence[StepMetadata]) -> None:
    """Raise unless `enabled` can switch a precompute of `batch` that a copy to `copies` follows."""
    if enabled is None:
        return
    flag = _checks(batch).tensor("enabled", enabled, 1, INT32)
    if flag.shape[0] != 1:
        reject("enabled", "1 entry", flag.shape[0], fix="make it with torch.ones(1, dtype=torch.int32)")
    if copies:
        why = "a copy that is switched off would still overwrite its destinations; use 'share'"
        reject(
            "enabled",
            "None where metadata is copied to further consumers",
            f"a tensor and {len(copies)} copies",
            fix=why,
        )


def check_shared(consumers: Sequence[StepMetadata]) -> None:
    """Raise unless all consumers have the buffers of the first one."""
    instances("consumers", consumers, StepMetadata)
    for index, step in enumerate(consumers):
        for name in (*VECTORS, *TOKENS, *POOL_PLANES):
            ours, theirs = plane(step, name), plane(consumers[0], name)
            if ours is not theirs and (ours is None or theirs is None or not same_buffer(ours, theirs)):
                reject(f"consumers[{index}].{name}", "the buffer of consumers[0]", "another one", fix="use 'copy'")


def check_step(name: str, step: StepMetadata, batch: BatchDescriptor, geometry: Geometry) -> None:
    """Raise unless the buffers of `step` can hold the metadata of one step of `batch`."""
    instance(name, step, StepMetadata)
    if not isinstance(step.derived, Mapping):
        reject(f"{name}.derived", "a mapping of tensors by name", type(step.derived).__name__, error=InvalidTypeError)
    checks = _checks(batch)
    for vector, size in vector_sizes(batch).items():
        if vector == "cache_seqlens" or getattr(step, vector) is not None:
            checks.vector(f"{name}.{vector}", getattr(step, vector), size)
    lacking = [vector for vector in ROW_VECTORS if getattr(step, vector) is None]
    if lacking and (len(lacking) < len(ROW_VECTORS) or step.pools is not None):
        wanted = f"a tensor, or None and so {', '.join(ROW_VECTORS)} and pools"
        reject(f"{name}.{lacking[0]}", wanted, "None beside others of them")
    tokens = [vector for vector in TOKENS if getattr(step, vector) is not None]
    if tokens and (len(tokens) < len(TOKENS) or batch.mode is not ForwardMode.DECODE):
        reject(f"{name}.{tokens[0]}", "both positions and slot_mapping in DECODE, else neither", "a tensor")
    if tokens and geometry.length_limit(batch) > geometry.table_width and batch.step_offsets:
        fix = "positions past the table have no slot; leave max_length out"
        reject(
            f"{name}.{tokens[0]}",
            f"None with a max_length above table_width {geometry.table_width}",
            "a tensor",
            fix=fix,
        )
    for vector in tokens:
        checks.vector(f"{name}.{vector}", getattr(step, vector), batch.batch_size, (torch.int64,))
    if step.pools is not None:
        _check_pools(name, step.pools, batch, geometry, checks)
    for table, width in zip(TABLES, (geometry.table_width, geometry.real_width), strict=True):
        value = getattr(step, table)
        if value is None and table == "page_table_1" and geometry.page_size > 1:
            continue
        checks.table(f"{name}.{table}", value, batch.num_rows, width)
    if geometry.page_size == 1 and batch.num_rows and not same_buffer(step.real_page_table, _wide(step)):
        reject(f"{name}.real_page_table", "page_table_1 itself with page size 1", "another buffer")
    _check_planes(name, step, batch, geometry)
    for derived, value in step.derived.items():
        instance(f"{name}.derived[{derived!r}]", value, torch.Tensor)
        if value.element_size() % 4 or not value.is_contiguous():
            reject(
                f"{name}.derived[{derived!r}]",
                "a contiguous tensor of 4-byte elements",
                f"{value.dtype}, strides {value.stride()}",
            )


def check_destinations(source: PrecomputedMetadata, destinations: Sequence[StepMetadata]) -> None:
    """Raise unless every destination can take a copy of its step of `source`."""
    instance("precomputed", source, PrecomputedMetadata)
    check_batch(source.batch, source.geometry)
    check_buffers(source, source.batch, source.geometry)
    instances("destinations", destinations, StepMetadata)
    if len(source.steps) > 1 and len(destinations) != len(source.steps):
        reject("destinations", f"{len(source.steps)} (one per step of the source)", len(destinations))
    for index, destination in enumerate(destinations):
        check_step(f"destinations[{index}]", destination, source.batch, source.geometry)
    planes = sorted(destinations[0].derived) if destinations else []
    for index, destination in enumerate(destinations):
        name, step = f"destinations[{index}]", source.step(index)
        if sorted(destination.derived) != planes:
            reject(f"{name}.derived", f"the planes of destinations[0], {planes}", sorted(destination.derived))
        if destination.page_table_1 is not None and step.page_table_1 is None:
            reject(
                f"{name}.page_table_1", "None, as in the source", "a buffer", fix="precompute with a wide page table"
            )
        if destination.positions is not None and step.positions is None:
            reject(f"{name}.positions", "None, as in the source", "a buffer", fix="allocate the source with tokens")
        for field in (*VECTORS, *POOL_PLANES, POOL_TABLE):
            if plane(destination, field) is not None and plane(step, field) is None:
                reject(f"{name}.{field}", "None, as in the source", "a buffer", fix="give the source the same plane")
        for derived, value in destination.derived.items():
            origin = step.derived.get(derived)
            if origin is None or origin.shape != value.shape or origin.dtype != value.dtype:
                got = (
                    "missing in the source" if origin is None else f"{tuple(origin.shape)} {origin.dtype} in the source"
                )
                reject(f"{name}.derived[{derived!r}]", f"{tuple(value.shape)} {value.dtype}", got)


Planes = dict[str, tuple[torch.Tensor, tuple[int, ...]]]


def _planes(step: StepMetadata, batch: BatchDescriptor, geometry: Geometry, *, tables: bool) -> Planes:
    """The planes of a step by name, each with the shape that a precompute writes; with `tables` also page tables."""
    shapes: dict[str, tuple[int, ...]] = {name: (size,) for name, size in vector_sizes(batch).items()}
    shapes |= dict.fromkeys(TOKENS, (batch.batch_size,))
    shapes |= pool_shapes(batch, geometry) if step.pools is not None else {}
    if tables:
        shapes |= {name: (batch.num_rows, width) for name, (width, _) in table_sizes(geometry).items()}
    else:
        shapes.pop(POOL_TABLE, None)
    planes = {name: (plane(step, name), shape) for name, shape in shapes.items()}
    return {name: (value, shape) for name, (value, shape) in planes.items() if value is not None}


def _check_planes(name: str, step: StepMetadata, batch: BatchDescriptor, geometry: Geometry) -> None:
    """Raise if two planes of a step share memory and may have different values."""
    planes = _planes(step, batch, geometry, tables=True)
    same = (
        {("cache_seqlens", "seqlens_expanded")} if batch.rows_per_request == 1 and batch.extend_lens is None else set()
    )
    if geometry.page_size == 1:
        same.add(TABLES)
    for pair in itertools.combinations(planes, 2):
        (first, shape), (second, other) = (planes[name_of] for name_of in pair)
        if overlap(first, shape, second, other) and not (pair in same and same_buffer(first, second)):
            reject(f"{name}.{pair[1]}", f"a buffer apart from {pair[0]}", "one that overlaps it")


def _check_apart(
    name: str, step: StepMetadata, other_name: str, other: StepMetadata, batch: BatchDescriptor, geometry: Geometry
) -> None:
    """Raise if vectors of two steps share memory."""
    mine, theirs = (_planes(side, batch, geometry, tables=False) for side in (step, other))
    for field, (vector, shape) in mine.items():
        for against, (another, extent) in theirs.items():
            if overlap(vector, shape, another, extent):
                reject(f"{name}.{field}", f"a buffer apart from {other_name}.{against}", "one that overlaps it")


def _check_pools(
    name: str, pools: PoolMetadata, batch: BatchDescriptor, geometry: Geometry, checks: TensorChecks
) -> None:
    """Raise unless the planes of pooled index keys can hold those of `batch`."""
    instance(f"{name}.pools", pools, PoolMetadata)
    if geometry.index_kpool == 1:
        reject(f"{name}.pools", "None with index_kpool 1", "a PoolMetadata")
    if not isinstance(batch.slots, TokenTable):
        reject(f"{name}.pools", "None with a block table", "a PoolMetadata")
    for field, shape in pool_shapes(batch, geometry).items():
        value = getattr(pools, field.removeprefix(PREFIX))
        if value is None and field in (POOL_TABLE, "pools.accepted"):
            continue
        dtypes = (torch.int64,) if field in INT64_POOL_PLANES else INT32
        if len(shape) == 2:
            checks.table(f"{name}.{field}", value, shape[0], shape[1], dtypes)
        else:
            checks.vector(f"{name}.{field}", value, shape[0], dtypes)


def _wide(step: StepMetadata) -> torch.Tensor:
    return step.real_page_table if step.page_table_1 is None else step.page_table_1


def _check_steps(batch: BatchDescriptor) -> None:
    instance("step_offsets", batch.step_offsets, tuple)
    if batch.step_offsets and len(batch.step_offsets) != batch.num_steps:
        reject("step_offsets", f"{batch.num_steps} offsets (num_steps), or none", f"{len(batch.step_offsets)}")
    for offset in batch.step_offsets:
        at_least("step_offsets", offset, 0)
    if batch.mode is not ForwardMode.DECODE and batch.num_steps != 1:
        reject("num_steps", f"1 in {batch.mode.name}", batch.num_steps)


def _checks(batch: BatchDescriptor) -> TensorChecks:
    return TensorChecks(batch.seq_lens.device, "seq_lens")


def _check_slots(batch: BatchDescriptor, geometry: Geometry, checks: TensorChecks) -> None:
    slots = batch.slots
    if isinstance(slots, TokenTable):
        checks.tensor("req_to_token", slots.req_to_token, 2, INTEGERS)
        checks.vector("req_pool_indices", slots.req_pool_indices, batch.batch_size, INTEGERS)
        table = "req_to_token"
    elif isinstance(slots, BlockTable):
        checks.tensor("block_table", slots.block_table, 2, INTEGERS)
        at_least("block_size", slots.block_size, 1)
        if slots.block_table.shape[0] < batch.batch_size:
            reject("block_table", f"at least {batch.batch_size} rows (batch_size)", slots.block_table.shape[0])
        table = "block_table"
    else:
        reject("slots", "a TokenTable or a BlockTable", type(slots).__name__, error=InvalidTypeError)
    if slots.width() < geometry.table_width:
        reject(table, f"rows that name at least {geometry.table_width} tokens (table_width)", slots.width())


def _check_range(name: str, values: torch.Tensor, low: int, high: int, meaning: str) -> None:
    wrong = ((values < low) | (values > high)).nonzero()
    if wrong.numel():
        index = int(wrong[0])
        reject(f"{name}[{index}]", f"{low} to {high} ({meaning})", int(values[index]))
