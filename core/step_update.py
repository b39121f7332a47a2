"""`StepUpdate`: writes what one draft step changes in metadata that stays in place, in one launch per step.

It serves an engine that records its whole draft in one CUDA graph. Positions, lengths and block tables are the engine's
buffers, and the engine advances them after each step. Attention groups read their metadata at fixed addresses.
Each step needs the KV slot of one token per request, and each group needs what it derives from the lengths. The request
map, the rows of ones and the copy of the block table are equal in all steps: only the first step writes them. Where index
keys are pooled, a step also has the slot of the pool that its token completes, and that of the token in its tail.
The definition is `reference.step_update`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from nsa_plugin.core import reference, triton_binding
from nsa_plugin.core.api import Impl, resolve_impl
from nsa_plugin.core.checks import INT32, INTEGERS, TensorChecks, at_least, boolean, function, instance, instances
from nsa_plugin.core.errors import reject


@dataclass(frozen=True, slots=True)
class DraftRows:
    """The rows of a draft step, one query token per request, as views of the engine's buffers. All are contiguous.

    Parameters
    ----------
    num_rows : int >= 1
        Requests, padding included.
    positions : int32 or int64 tensor [>= num_rows]
        Position of each row's token.
    seq_lens : int32 tensor [>= num_rows]
        Tokens that each row sees, its own included.
    query_start_loc : int32 tensor [>= num_rows + 1]
        Entry `num_rows` is the number of rows that exist; the rows after those are padding.
    table_rows : int32 or int64 tensor [>= num_rows]
        Each request's row of the block tables; negative for a request without blocks.
    """

    num_rows: int
    positions: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    table_rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class SlotGroups:
    """Block tables of all G KV-cache groups, and the buffer for the slots of their tokens.

    Parameters
    ----------
    tables : sequence of G contiguous int32 tensors [requests, blocks of that group]
    addresses : uint64 or int64 tensor [G]
        Device addresses of `tables`.
    row_strides : int64 tensor [G]
        Row strides of `tables`, in elements.
    block_sizes : int32 tensor [G]
        Tokens per block.
    enabled : bool tensor [G]
        Where it is False, all slots of the group are padding.
    slot_mapping : int64 tensor [G, capacity >= num_rows], rows of stride 1
        Gets the slot of each row's token, and `PAD_SLOT` from the first padding row to the end.
    """

    tables: Sequence[torch.Tensor]
    addresses: torch.Tensor
    row_strides: torch.Tensor
    block_sizes: torch.Tensor
    enabled: torch.Tensor
    slot_mapping: torch.Tensor


@dataclass(frozen=True, slots=True)
class PooledKeys:
    """Of an indexer whose cache has one state for every `ratio` tokens, which the last of them writes.

    Parameters
    ----------
    ratio : int >= 2
        Tokens per state.
    block_states : int >= 1
        States per block of the indexer's block table.
    slots : contiguous int64 tensor [>= num_rows]
        Gets the slot of the state that a row's token completes. It gets `PAD_SLOT` for a token that completes none, for a
        request without blocks, and for padding.
    """

    ratio: int
    block_states: int
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class IndexerRows:
    """Buffers of a sparse-attention indexer whose rows have one query token each. All are int32; vectors are contiguous.

    Parameters
    ----------
    lengths : tensor [num_rows]
        Gets `DraftRows.seq_lens`; with `pooled`, the number of complete states.
    ones : one or two tensors [num_rows]
        Get 1, the number of query tokens of each row.
    indices : tensor [num_rows] or None
        Gets 0, 1, 2 …
    source : tensor [>= num_rows, width], rows of stride 1
        Block table of the requests.
    table : tensor [num_rows, width], rows of stride 1
        Gets a copy of `source`. It may be `source` itself: then nothing is copied.
    pooled : PooledKeys or None
        Where a state stands for several tokens.
    """

    lengths: torch.Tensor
    ones: tuple[torch.Tensor, ...]
    indices: torch.Tensor | None
    source: torch.Tensor
    table: torch.Tensor
    pooled: PooledKeys | None = None


@dataclass(frozen=True, slots=True)
class TailRows:
    """Where the tokens of pools that are not complete are kept: one block per request, written in a circle.

    Parameters
    ----------
    table : int32 tensor [>= num_rows, >= 1], rows of stride 1
        Its first column has each row's block; 0 is a request without one.
    ring : int >= 1
        Tokens per block.
    slots : contiguous int64 tensor [>= num_rows]
        Gets the slot of each row's token; `PAD_SLOT` without a block, and for padding.
    """

    table: torch.Tensor
    ring: int
    slots: torch.Tensor


BoundStepUpdate = Callable[[bool], None]
"""Writes what a draft step needs into the buffers that it was bound to; takes whether the step is its draft's first."""
BindStepUpdate = Callable[
    [DraftRows, SlotGroups, Sequence[torch.Tensor], Sequence[IndexerRows]], BoundStepUpdate | None
]
"""Provides an implementation bound to these buffers, or None for the built-in one."""


class StepUpdate:
    """Writes what a draft step needs into the buffers of one captured size. Call `run` at the start of each step.

    Parameters
    ----------
    rows : DraftRows
    slots : SlotGroups
    request_maps : sequence of contiguous int32 tensors [>= num_rows]
        Get the request of each row; padding rows get the last one, `num_rows` - 1.
    indexers : sequence of IndexerRows
    tails : sequence of TailRows
    impl : "auto", "reference" or "triton"
        As in `precompute`.
    bind : BindStepUpdate, optional
        Provides an implementation. `impl` is used without it, or where it returns None. It is not asked where index keys
        are pooled.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        A buffer has a wrong dtype, shape or stride.
    UnavailableError
        `impl` can't run here.

    Notes
    -----
    With Triton a step is one launch for the slots, the first request map, the first indexer and the first tail. Further
    ones take one more launch each, or all that have the same place. `run` does not sync with the host and may be recorded in a CUDA
    graph. It allocates nothing with Triton; the reference does.
    """

    def __init__(
        self,
        rows: DraftRows,
        slots: SlotGroups,
        request_maps: Sequence[torch.Tensor] = (),
        indexers: Sequence[IndexerRows] = (),
        tails: Sequence[TailRows] = (),
        *,
        impl: Impl = "auto",
        bind: BindStepUpdate | None = None,
    ) -> None:
        _check(rows, slots, request_maps, indexers, tails)
        function("bind", bind, optional=True)
        asked = bind is not None and not tails and not any(indexer.pooled for indexer in indexers)
        provided = bind(rows, slots, request_maps, indexers) if bind is not None and asked else None
        self._launches: Sequence[BoundStepUpdate]
        if provided is not None:
            self._launches = [provided]
        elif resolve_impl(impl, rows.seq_lens.device) == "triton":
            self._launches = triton_binding.bind_step_update(rows, slots, request_maps, indexers, tails)
        else:
            self._launches = [lambda first: reference.step_update(rows, slots, request_maps, indexers, first, tails)]

    def run(self, *, first: bool) -> None:
        """Write what the step that begins now needs; with `first`, also what is equal in all steps of a draft."""
        boolean("first", first)
        for launch in self._launches:
            launch(first)


def _check(
    rows: DraftRows,
    slots: SlotGroups,
    request_maps: Sequence[torch.Tensor],
    indexers: Sequence[IndexerRows],
    tails: Sequence[TailRows],
) -> None:
    instance("rows", rows, DraftRows)
    instance("slots", slots, SlotGroups)
    n, groups = rows.num_rows, len(instances("slots.tables", slots.tables, torch.Tensor))
    at_least("num_rows", n, 1)
    checks = TensorChecks(instance("seq_lens", rows.seq_lens, torch.Tensor).device, "seq_lens")
    instances("request_maps", request_maps, torch.Tensor)
    instances("indexers", indexers, IndexerRows)
    instances("tails", tails, TailRows)
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
        if (pooled := indexer.pooled) is not None:
            instance(f"{name}.pooled", pooled, PooledKeys)
            at_least(f"{name}.pooled.ratio", pooled.ratio, 2)
            at_least(f"{name}.pooled.block_states", pooled.block_states, 1)
            vector(f"{name}.pooled.slots", pooled.slots, n, (torch.int64,))
    for index, tail in enumerate(tails):
        at_least(f"tails[{index}].ring", tail.ring, 1)
        table(f"tails[{index}].table", tail.table, n, 1)
        vector(f"tails[{index}].slots", tail.slots, n, (torch.int64,))
