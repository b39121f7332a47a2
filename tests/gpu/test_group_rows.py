"""On a CUDA device: the kernel of attention groups' rows against the reference (on the CPU), in a graph, and switched."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from nsa_plugin import BatchDescriptor, BlockTable, ForwardMode, Geometry, ReplayPlan
from nsa_plugin.core.group_rows import GroupMetadata, GroupRows
from nsa_plugin.core.reference import group_rows

pytestmark = pytest.mark.gpu
DEVICE, POISON, PAGE = "cuda", -77, 64
Planes = Callable[..., torch.Tensor]


def groups_of(
    requests: int, rows: int, pages: int, new: Planes, table: BlockTable | None, stride: int
) -> list[GroupRows]:
    """As vLLM's target has them, twice: FlashMLA-sparse, an indexer by row, and one by request over another table."""
    total = requests * rows
    return [
        GroupRows(request_map=new(total), request_pages=new(requests, pages), page_stride=stride),
        GroupRows(lengths=new(total), query_lens=(new(requests),), ones=new(total), row_pages=new(total, pages)),
        GroupRows(lengths=new(total), query_lens=(new(requests), new(requests)), slots=table),
    ]


class Recorded:
    """A plan in a CUDA graph over static inputs, and the same planes on the CPU for the reference."""

    def __init__(self, rng: random.Random, requests: int, rows: int, blocks: int, per_block: int) -> None:
        self.rng, self.blocks, self.longest = rng, blocks, blocks * per_block * PAGE
        block_size, stride = per_block * PAGE, rng.choice([0, per_block + 1])
        tables = [torch.zeros(requests, blocks, dtype=torch.int32, device=DEVICE) for _ in range(2)]

        def new(*shape: int) -> torch.Tensor:
            return torch.full(shape, POISON, dtype=torch.int32, device=DEVICE)

        self.batch = BatchDescriptor(
            ForwardMode.DRAFT_EXTEND, requests, torch.zeros(requests, dtype=torch.int32, device=DEVICE),
            BlockTable(tables[0], block_size), draft_tokens=rows,
            query_start_loc=torch.zeros(requests + 1, dtype=torch.int32, device=DEVICE),
        )  # fmt: skip
        self.geometry = Geometry(2048, PAGE, self.longest, wide_page_table=False)
        self.groups = groups_of(requests, rows, blocks * per_block, new, BlockTable(tables[1], block_size), stride)
        self.tables = tables
        self.enabled = torch.ones(1, dtype=torch.int32, device=DEVICE)
        plan = ReplayPlan(self.batch, self.geometry, self.groups, strategy="share", enabled=self.enabled)
        self._kept = plan
        plan.run(self.batch)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            plan.run(self.batch)

    def fill(self) -> None:
        """Fresh lengths, blocks and padding."""
        requests, rows = self.batch.batch_size, self.batch.draft_tokens
        real = self.rng.randint(0, requests)
        lengths = [
            self.rng.choice([rows, 63, 64, 65, self.longest, self.rng.randint(rows, self.longest)]) for _ in range(real)
        ]
        self.batch.seq_lens.copy_(torch.tensor([max(length, rows) for length in lengths] + [0] * (requests - real)))
        assert self.batch.query_start_loc is not None
        self.batch.query_start_loc.copy_(torch.arange(requests + 1).clamp(max=real) * rows)
        for table in self.tables:
            table.copy_(torch.randint(1, 1 << 20, table.shape))

    def planes(self) -> list[torch.Tensor]:
        """All that the plan may write."""
        found: list[torch.Tensor] = []
        for group in self.groups:
            found += [plane for plane, _ in (*group.vectors(self.batch).values(), *group.tables(self.batch).values())]
        return found

    def wanted(self) -> list[torch.Tensor]:
        """The same by the reference, from the planes as they are now."""

        def here(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.cpu()
            if isinstance(value, tuple):
                return tuple(map(here, value))
            return BlockTable(value.block_table.cpu(), value.block_size) if isinstance(value, BlockTable) else value

        batch = replace(
            self.batch, **{name: here(getattr(self.batch, name)) for name in ("seq_lens", "slots", "query_start_loc")}
        )
        groups = [
            replace(group, **{name: here(getattr(group, name)) for name in GroupRows.__dataclass_fields__})
            for group in self.groups
        ]
        group_rows(batch, GroupMetadata(groups, batch, self.geometry))
        return [
            plane for group in groups for plane, _ in (*group.vectors(batch).values(), *group.tables(batch).values())
        ]  # fmt: skip


@pytest.mark.parametrize("requests", [1, 3, 32, 129])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8])
@pytest.mark.parametrize(("blocks", "per_block"), [(64, 1), (32, 2), (9000, 1)])
def test_a_replay_writes_what_the_reference_says(requests: int, rows: int, blocks: int, per_block: int) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    recorded = Recorded(random.Random(seed), requests, rows, blocks, per_block)
    for _ in range(3):
        recorded.fill()
        for plane in recorded.planes():
            plane.fill_(POISON)
        want = recorded.wanted()
        recorded.graph.replay()
        assert all(torch.equal(got.cpu(), right) for got, right in zip(recorded.planes(), want, strict=True))


def test_switched_off_a_replay_leaves_every_byte() -> None:
    recorded = Recorded(random.Random(3), 16, 4, 64, 2)
    for turn in range(20):
        recorded.fill()
        recorded.enabled.fill_(turn % 2)
        for plane in recorded.planes():
            plane.fill_(-turn)
        want = recorded.wanted() if turn % 2 else [plane.cpu() for plane in recorded.planes()]
        recorded.graph.replay()
        assert all(torch.equal(got.cpu(), right) for got, right in zip(recorded.planes(), want, strict=True))


def test_another_size_or_length_compiles_nothing() -> None:
    from nsa_plugin.core.kernels.group_rows import group_rows_kernel

    def compiled() -> int:
        return sum(len(cache[0]) for cache in group_rows_kernel.device_caches.values())

    Recorded(random.Random(1), 4, 4, 64, 1)
    before = compiled()
    for requests, rows, blocks, per_block in ((1, 1, 16, 1), (7, 3, 100, 2), (64, 8, 5000, 1)):
        Recorded(random.Random(2), requests, rows, blocks, per_block)
    assert compiled() == before
