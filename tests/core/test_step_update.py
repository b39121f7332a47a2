"""The per-step update: what it must write by a naive loop, the kernel against the reference, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_plugin.core.api import Impl
from nsa_plugin.core.errors import InvalidTypeError, InvalidValueError
from nsa_plugin.core.step_update import (
    DraftRows,
    IndexerRows,
    PooledKeys,
    SlotGroups,
    StepUpdate,
    TailRows,
)

POISON = -77
REQUESTS = 7


@dataclass(frozen=True)
class Case:
    """Everything that a `StepUpdate` is bound to."""

    rows: DraftRows
    slots: SlotGroups
    request_maps: list[torch.Tensor]
    indexers: list[IndexerRows]
    tails: list[TailRows]

    def outputs(self) -> list[torch.Tensor]:
        """All that it may write."""
        planes = [self.slots.slot_mapping, *self.request_maps]
        for indexer in self.indexers:
            planes += [indexer.lengths, *indexer.ones, indexer.table]
            planes += [] if indexer.indices is None else [indexer.indices]
            planes += [] if indexer.pooled is None else [indexer.pooled.slots]
        return [*planes, *(tail.slots for tail in self.tails)]

    def poisoned(self) -> Case:
        """The same case with outputs of its own, full of a value that none can have."""

        def fresh(tensor: torch.Tensor) -> torch.Tensor:
            return torch.full_like(tensor, POISON)

        indexers = [
            IndexerRows(
                fresh(old.lengths), tuple(map(fresh, old.ones)), None if old.indices is None else fresh(old.indices),
                old.source, old.table if old.table is old.source else fresh(old.table),
                None if old.pooled is None else replace(old.pooled, slots=fresh(old.pooled.slots)),
            )
            for old in self.indexers
        ]  # fmt: skip
        slots = replace(self.slots, slot_mapping=fresh(self.slots.slot_mapping))
        tails = [replace(old, slots=fresh(old.slots)) for old in self.tails]
        return Case(self.rows, slots, list(map(fresh, self.request_maps)), indexers, tails)

    def update(self, impl: Impl) -> StepUpdate:
        """Bound."""
        return StepUpdate(self.rows, self.slots, self.request_maps, self.indexers, self.tails, impl=impl)


def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.randint(low, high, shape, dtype=dtype)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """One to three KV-cache groups of any block size, padded rows, requests without blocks, zero to two of each consumer.

    Lengths of an indexer with pooled keys are at the edges of pools and blocks as often as anywhere else.
    """
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(1, 6))
    real = draw(st.integers(0, n))
    sizes = draw(st.lists(st.sampled_from([16, 64]), min_size=1, max_size=3))
    tables = [integers(0, 1 << 20, REQUESTS, -(-256 // size)) for size in sizes]
    capacity = n + draw(st.sampled_from([0, 1, 1500]))
    slots = SlotGroups(
        tables,
        torch.tensor([table.data_ptr() for table in tables], dtype=torch.uint64),
        torch.tensor([table.stride(0) for table in tables]),
        torch.tensor(sizes, dtype=torch.int32),
        torch.tensor([draw(st.sampled_from([True, True, False])) for _ in sizes]),
        integers(0, 9, len(sizes), capacity, dtype=torch.int64),
    )
    kind = draw(st.sampled_from([torch.int32, torch.int64]))
    rows = DraftRows(
        n,
        integers(0, 256, n + 1, dtype=kind),
        integers(0, 256, n + 2),
        torch.arange(n + 2, dtype=torch.int32).clamp(max=real),
        torch.where(torch.rand(n) < 0.2, -1, integers(0, REQUESTS, n, dtype=torch.int64)),
    )
    indexers = []
    for _ in range(draw(st.integers(0, 2))):
        width = draw(st.sampled_from([1, 40, 1100]))
        pooled = None
        if draw(st.booleans()):
            ratio = draw(st.integers(2, 9))
            states = draw(st.sampled_from([1, 8, 64]))
            pooled = PooledKeys(ratio, states, integers(2, 9, n + 1, dtype=torch.int64))
            edges = [
                draw(st.sampled_from([0, 1, ratio - 1, ratio, ratio * states, ratio * states + 1])) for _ in range(n)
            ]
            rows.seq_lens[:n] = torch.where(torch.rand(n) < 0.5, rows.seq_lens[:n], torch.tensor(edges))
            width = max(width, -(-(int(rows.seq_lens.max()) + 4) // (ratio * states)))
        source = integers(0, 1 << 20, n + 1, width + 3)[:, :width]
        indexers.append(
            IndexerRows(
                integers(0, 9, n),
                tuple(integers(2, 9, n) for _ in range(draw(st.integers(1, 2)))),
                integers(2, 9, n) if draw(st.booleans()) else None,
                source,
                source if draw(st.booleans()) else integers(0, 9, n, width),
                pooled,
            )
        )
    tails = [
        TailRows(
            integers(0, 4, n, 3)[:, : draw(st.integers(1, 3))],
            draw(st.integers(1, 17)),
            integers(2, 9, n + 1, dtype=torch.int64),
        )
        for _ in range(draw(st.integers(0, 2)))
    ]
    return Case(rows, slots, [integers(0, 9, n + 2) for _ in range(draw(st.integers(0, 2)))], indexers, tails)


@settings(max_examples=60)
@given(cases())
def test_the_reference_is_what_a_loop_says(case: Case) -> None:
    rows, slots = case.rows, case.slots
    made = case.poisoned()
    made.update("reference").run(first=True)
    real = int(rows.query_start_loc[rows.num_rows])
    for group, table in enumerate(slots.tables):
        expected = [-1] * slots.slot_mapping.shape[1]
        for row in range(min(real, rows.num_rows)):
            request, position, size = int(rows.table_rows[row]), int(rows.positions[row]), int(slots.block_sizes[group])
            if request >= 0 and bool(slots.enabled[group]):
                expected[row] = int(table[request, position // size]) * size + position % size
        assert made.slots.slot_mapping[group].tolist() == expected
    n = rows.num_rows
    for request_map in made.request_maps:
        assert request_map.tolist() == [row if row < real else n - 1 for row in range(n)] + [POISON] * 2
    for indexer in made.indexers:
        pooled = indexer.pooled
        ratio = 1 if pooled is None else pooled.ratio
        assert indexer.lengths.tolist() == [length // ratio for length in rows.seq_lens[:n].tolist()]
        if pooled is not None:
            expected = [-1] * n + [POISON]
            for row in range(min(real, n)):
                length = int(rows.seq_lens[row])
                if length and length % ratio == 0 and rows.table_rows[row] >= 0:
                    block, offset = divmod(length // ratio - 1, pooled.block_states)
                    expected[row] = int(indexer.source[row, block]) * pooled.block_states + offset
            assert pooled.slots.tolist() == expected
        assert all(ones.tolist() == [1] * n for ones in indexer.ones)
        assert indexer.indices is None or indexer.indices.tolist() == list(range(n))
        assert torch.equal(indexer.table[:n], indexer.source[:n])
    for tail in made.tails:
        expected = [-1] * n + [POISON]
        for row in range(min(real, n)):
            if block := int(tail.table[row, 0]):
                expected[row] = block * tail.ring + int(rows.positions[row]) % tail.ring
        assert tail.slots.tolist() == expected


@settings(max_examples=60)
@given(cases(), st.integers(0, 3))
def test_the_kernel_equals_the_reference_in_every_step(case: Case, later: int) -> None:
    pytest.importorskip("triton")
    want, got = case.poisoned(), case.poisoned()
    expected, kernel = want.update("reference"), got.update("triton")
    for step in range(1 + later):
        for update in (expected, kernel):
            update.run(first=step == 0)
        for plane, (ours, theirs) in enumerate(zip(got.outputs(), want.outputs(), strict=True)):
            assert torch.equal(ours, theirs), f"output {plane} of step {step}"
        real = int(case.rows.query_start_loc[case.rows.num_rows])
        case.rows.positions[:real] = (case.rows.positions[:real] + 1).clamp(max=255)
        case.rows.seq_lens.add_(1)


def test_a_later_step_leaves_alone_what_stays_the_same() -> None:
    made = _plain().poisoned()
    made.update("reference").run(first=False)
    assert (made.request_maps[0] == POISON).all() and (made.indexers[0].table == POISON).all()
    assert (made.slots.slot_mapping[0, 2:] == POISON).all() and (made.indexers[0].lengths != POISON).all()


def _plain() -> Case:
    table = integers(1, 9, REQUESTS, 4)
    slots = SlotGroups(
        [table], torch.tensor([table.data_ptr()]), torch.tensor([4]), torch.tensor([64], dtype=torch.int32),
        torch.tensor([True]), torch.zeros(1, 8, dtype=torch.int64),
    )  # fmt: skip
    vector = torch.zeros(3, dtype=torch.int32)
    rows = DraftRows(2, vector, vector + 1, torch.tensor([0, 1, 2], dtype=torch.int32), vector)
    indexer = IndexerRows(vector[:2].clone(), (vector[:2].clone(),), None, table, torch.zeros(2, 4, dtype=torch.int32))
    return Case(rows, slots, [vector.clone()], [indexer], [TailRows(table, 8, torch.zeros(2, dtype=torch.int64))])


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("rows", "num_rows", 0, "num_rows: expected an int >= 1, got 0"),
        ("rows", "seq_lens", torch.zeros(2), "seq_lens: expected int32, got float32; convert with"),
        (
            "rows",
            "query_start_loc",
            torch.zeros(2, dtype=torch.int32),
            "query_start_loc: expected at least 3 entries, got 2",
        ),
        ("rows", "positions", torch.zeros(4, dtype=torch.int32)[::2], "positions: expected a contiguous vector"),
        (
            "slots",
            "slot_mapping",
            torch.zeros(1, 1, dtype=torch.int64),
            "slot_mapping: expected at least 2 columns, got 1",
        ),
        ("slots", "enabled", torch.zeros(1), "enabled: expected bool, got float32"),
        (
            "slots",
            "slot_mapping",
            torch.zeros(1, 8, dtype=torch.int64)[:, ::2],
            "slot_mapping: expected rows of stride 1",
        ),
        (
            "slots",
            "enabled",
            torch.ones(1, dtype=torch.bool, device="meta"),
            "enabled: expected device cpu .that of seq_lens",
        ),
        ("indexer", "ones", (), r"indexers\[0\].ones: expected one or two tensors, got 0"),
        ("indexer", "table", torch.zeros(1, 4, dtype=torch.int32), r"indexers\[0\].table: expected at least 2 rows"),
        ("indexer", "table", torch.zeros(2, 3, dtype=torch.int32), r"indexers\[0\].source: expected 3 columns"),
        ("indexer", "pooled", 4, r"indexers\[0\].pooled: expected a PooledKeys"),
        (
            "indexer",
            "pooled",
            PooledKeys(1, 64, torch.zeros(2, dtype=torch.int64)),
            "pooled.ratio: expected an int >= 2",
        ),
        (
            "indexer",
            "pooled",
            PooledKeys(4, 0, torch.zeros(2, dtype=torch.int64)),
            "block_states: expected an int >= 1",
        ),
        ("indexer", "pooled", PooledKeys(4, 64, torch.zeros(2)), "pooled.slots: expected int64, got float32"),
        ("tail", "ring", 0, r"tails\[0\].ring: expected an int >= 1"),
        ("tail", "table", torch.zeros(1, 1, dtype=torch.int32), r"tails\[0\].table: expected at least 2 rows"),
        ("tail", "slots", torch.zeros(1, dtype=torch.int64), r"tails\[0\].slots: expected at least 2 entries"),
    ],
)
def test_what_does_not_fit_is_refused(part: str, field: str, value: Any, message: str) -> None:
    case = _plain()
    rows, slots, (indexer,), (tail,) = case.rows, case.slots, case.indexers, case.tails
    if part == "rows":
        rows = replace(rows, **{field: value})
    elif part == "slots":
        slots = replace(slots, **{field: value})
    elif part == "tail":
        tail = replace(tail, **{field: value})
    else:
        indexer = replace(indexer, **{field: value})
    with pytest.raises((InvalidTypeError, InvalidValueError), match=message):
        StepUpdate(rows, slots, case.request_maps, [indexer], [tail])


@pytest.mark.parametrize("pooled", [False, True])
def test_what_is_pooled_is_not_asked_of_others(pooled: bool) -> None:
    case, asked = _plain(), []

    def bind(*buffers: Any) -> Any:
        asked.append(buffers)
        return lambda first: None

    StepUpdate(case.rows, case.slots, case.request_maps, case.indexers, case.tails if pooled else (), bind=bind)
    assert len(asked) == (not pooled)
    keys = replace(case.indexers[0], pooled=PooledKeys(4, 64, torch.zeros(2, dtype=torch.int64)))
    StepUpdate(case.rows, case.slots, case.request_maps, [keys if pooled else case.indexers[0]], bind=bind)
    assert len(asked) == 2 * (not pooled)


@pytest.mark.parametrize(
    ("maps", "indexers", "tails", "first", "later"),
    [(0, 0, 0, 1, 1), (1, 1, 0, 1, 1), (1, 1, 1, 1, 1), (2, 1, 0, 2, 1), (1, 3, 0, 3, 3), (1, 1, 2, 2, 2)],
)
def test_launches(
    maps: int, indexers: int, tails: int, first: int, later: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from nsa_plugin.core.kernels import step_update as kernels

    launched = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kwargs: launched.append(grid)

    monkeypatch.setattr(kernels, "step_update_kernel", Kernel())
    case = _plain()
    update = StepUpdate(
        case.rows, case.slots, case.request_maps * maps, case.indexers * indexers, case.tails * tails, impl="triton"
    )
    update.run(first=True)
    assert len(launched) == first and launched[0] == (2 + 1,)  # two rows, and one program that pads the slots
    update.run(first=False)
    assert len(launched) == first + later and launched[-1] == (2,)
