"""On a CUDA device: the step-update kernel with pooled index keys and a tail, against the reference (on the CPU), in a graph."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import pytest
import torch

from nsa_plugin.core.step_update import DraftRows, IndexerRows, PooledKeys, SlotGroups, StepUpdate, TailRows

pytestmark = pytest.mark.gpu
DEVICE, POISON, REQUESTS, LONGEST, BLOCK = "cuda", -77, 64, 4096, 256


@dataclass
class Buffers:
    """What a `StepUpdate` is bound to, on one device."""

    rows: DraftRows
    slots: SlotGroups
    request_maps: list[torch.Tensor]
    indexers: list[IndexerRows]
    tails: list[TailRows]

    def update(self, impl: Any) -> StepUpdate:
        """Bound."""
        return StepUpdate(self.rows, self.slots, self.request_maps, self.indexers, self.tails, impl=impl)

    def outputs(self) -> list[torch.Tensor]:
        """All that it writes."""
        pooled = [indexer.pooled.slots for indexer in self.indexers if indexer.pooled is not None]
        written = [plane for indexer in self.indexers for plane in (indexer.lengths, *indexer.ones, indexer.table)]
        return [self.slots.slot_mapping, *self.request_maps, *written, *pooled, *(tail.slots for tail in self.tails)]


def buffers(rows: int, ratio: int, ring: int, seed: int) -> Buffers:
    """On the CPU; outputs are full of a value that none can have."""
    rng = torch.Generator().manual_seed(seed)

    def some(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.randint(low, high, shape, dtype=dtype, generator=rng)

    def out(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full(shape, POISON, dtype=dtype)

    real = random.Random(seed).randint(0, rows)
    lengths = some(1, LONGEST - 8, rows)
    lengths[::3] = lengths[::3] // (8 * ratio) * 8 * ratio
    draft = DraftRows(
        rows, (lengths - 1).clamp(min=0).long(), lengths, torch.arange(rows + 1, dtype=torch.int32).clamp(max=real),
        torch.where(torch.rand(rows, generator=rng) < 0.1, -1, some(0, REQUESTS, rows)),
    )  # fmt: skip
    tables = [some(1, 1 << 20, REQUESTS, LONGEST // BLOCK), some(1, 1 << 20, REQUESTS, 1)]
    slots = SlotGroups(
        tables, torch.zeros(2, dtype=torch.int64), torch.tensor([table.stride(0) for table in tables]),
        torch.tensor([BLOCK, ring], dtype=torch.int32), torch.tensor([True, False]), out(2, rows + 5, dtype=torch.int64),
    )  # fmt: skip
    states = 64
    source = some(1, 1 << 20, rows, -(-LONGEST // (ratio * states)))
    keys = PooledKeys(ratio, states, out(rows, dtype=torch.int64)) if ratio > 1 else None
    indexer = IndexerRows(out(rows), (out(rows), out(rows)), None, source, out(*source.shape), keys)
    tail = TailRows(some(0, 9, rows, 1), ring, out(rows, dtype=torch.int64))
    return Buffers(draft, slots, [out(rows)], [indexer], [tail] if ratio > 1 else [])


def moved(value: Any) -> Any:
    """The same on the GPU, with the addresses that block tables have there."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, (list, tuple)):
        return type(value)(moved(each) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        made = replace(value, **{field.name: moved(getattr(value, field.name)) for field in fields(value)})
        if isinstance(made, SlotGroups):
            addresses = torch.tensor([table.data_ptr() for table in made.tables], device=DEVICE)
            made = replace(made, addresses=addresses)
        return made
    return value


@pytest.mark.allocates_in_graph
@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_every_step_of_a_graph_equals_the_reference(rows: int, ratio: int) -> None:
    ring = ratio * 2 if ratio > 1 else 8
    want = buffers(rows, ratio, ring, seed=rows + ratio)
    got = moved(want)
    reference, kernel = want.update("reference"), got.update("triton")
    for first in (True, False):
        kernel.run(first=first)
    steps, graph = 7, torch.cuda.CUDAGraph()
    seen: list[list[torch.Tensor]] = []
    with torch.cuda.graph(graph):
        for step in range(steps):
            kernel.run(first=step == 0)
            seen.append([plane.clone() for plane in got.outputs()])
            got.rows.positions.add_(1)
            got.rows.seq_lens.add_(1)
    for replay in range(20):
        fresh = buffers(rows, ratio, ring, seed=100 * replay + rows + ratio)
        for name in ("positions", "seq_lens", "query_start_loc", "table_rows"):
            getattr(want.rows, name).copy_(getattr(fresh.rows, name))
            getattr(got.rows, name).copy_(getattr(fresh.rows, name))
        for theirs, ours, new in (
            *zip(want.slots.tables, got.slots.tables, fresh.slots.tables, strict=True),
            (want.indexers[0].source, got.indexers[0].source, fresh.indexers[0].source),
            *((a.table, b.table, c.table) for a, b, c in zip(want.tails, got.tails, fresh.tails, strict=True)),
        ):
            theirs.copy_(new)
            ours.copy_(new)
        graph.replay()
        for step in range(steps):
            reference.run(first=step == 0)
            for plane, (expected, found) in enumerate(zip(want.outputs(), seen[step], strict=True)):
                assert torch.equal(expected, found.cpu()), f"output {plane} of step {step}, replay {replay}"
            want.rows.positions.add_(1)
            want.rows.seq_lens.add_(1)
