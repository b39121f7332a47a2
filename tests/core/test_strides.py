"""Buffers that reach past 2**31 elements: every tensor of every kernel, spread out along every dimension in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_plugin import BatchDescriptor, BlockTable, ForwardMode, Geometry, InvalidValueError, TokenTable
from nsa_plugin.core import api
from nsa_plugin.core.draft_steps import DraftLimits, DraftStep, PastEnd, bind_draft_steps, check_source
from nsa_plugin.core.metadata import PrecomputedMetadata
from nsa_plugin.core.step_update import DraftRows, IndexerRows, SlotGroups, StepUpdate
from nsa_plugin.core.validation import check_batch, check_buffers, check_destinations
from tests.batches import assert_equal_live, poisoned

pytest.importorskip("triton")

GEOMETRY = Geometry(index_topk=32, page_size=16, table_width=64, num_sms=1)
POOLED = replace(GEOMETRY, index_kpool=2)
Stretch = Callable[[torch.Tensor, int], torch.Tensor]


@pytest.fixture
def far(tmp_path: Path) -> Stretch:
    """The same values with a dimension so spread out that its last index is 2**31 elements away, over a sparse file."""

    def stretch(values: torch.Tensor, dimension: int) -> torch.Tensor:
        apart = -(-(2**31) // (values.shape[dimension] - 1) // 4) * 4 + 4
        inner = values.numel() // values.shape[dimension]
        shape = list(values.shape)
        strides = list(torch.empty([*shape[:dimension], 1, *shape[dimension + 1 :]], device="meta").stride())
        strides[dimension] = apart
        size = apart * (values.shape[dimension] - 1) + inner
        file = tmp_path / "sparse"
        big = torch.from_file(str(file), shared=True, size=size, dtype=values.dtype)
        file.unlink()
        return big.as_strided(shape, strides).copy_(values)

    return stretch


def tensors(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
    """Every tensor in dataclasses, tuples and lists, with where it is."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors(getattr(value, field.name), (*path, field.name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from tensors(item, (*path, index))


def put(value: Any, path: tuple[Any, ...], tensor: torch.Tensor) -> Any:
    """`value` with another tensor at `path`."""
    if not path:
        return tensor
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{path[0]: put(getattr(value, path[0]), path[1:], tensor)})
    items = list(value)
    items[path[0]] = put(items[path[0]], path[1:], tensor)
    return type(value)(items)


def stretched(make: Callable[[], Any], far: Stretch) -> Iterator[tuple[str, Any]]:
    """What `make` makes, once for each dimension of each of its tensors, which is then spread out."""
    for path, tensor in tensors(make()):
        for dimension in range(tensor.dim()):
            if tensor.shape[dimension] > 1:
                name = f"{'.'.join(map(str, path))} dimension {dimension}"
                yield name, put(make(), path, far(tensor, dimension))


def batch(kind: str) -> BatchDescriptor:
    lengths = torch.tensor([5, 64, 33], dtype=torch.int32)
    table = torch.arange(3 * 64, dtype=torch.int32).view(3, 64) * 16
    if kind == "blocks":
        return BatchDescriptor(ForwardMode.DECODE, 3, lengths, BlockTable(table[:, :16].clone(), 4))
    slots = TokenTable(table, torch.tensor([2, 0, 1], dtype=torch.int32))
    if kind == "tokens":
        return BatchDescriptor(ForwardMode.DECODE, 3, lengths, slots)
    rows = torch.tensor([2, 0, 1], dtype=torch.int32)
    if kind == "pools":  # one request completes two pools, another none
        return BatchDescriptor(ForwardMode.DRAFT_EXTEND, 3, lengths, slots, draft_tokens=4, accepted=rows + 1)
    return BatchDescriptor(ForwardMode.DRAFT_EXTEND, 3, lengths, slots, draft_tokens=2, extend_lens=rows)


def made(kind: str) -> PrecomputedMetadata:
    if kind == "pools":
        return poisoned(batch(kind), POOLED)[0]
    return poisoned(batch(kind), GEOMETRY, tokens=kind != "ragged")[0]


def source(kind: str) -> PrecomputedMetadata:
    out = made(kind)
    api.bind_precompute(out.batch, out, impl="reference")(out.batch)
    return out


@pytest.mark.parametrize("kind", ["tokens", "blocks", "ragged", "pools"])
def test_the_metadata_kernel_reaches_every_element(kind: str, far: Stretch) -> None:
    want = source(kind)
    for _, out in stretched(lambda: made(kind), far):
        check_batch(out.batch, out.geometry)
        check_buffers(out, out.batch, out.geometry)
        api.bind_precompute(out.batch, out, impl="triton")(out.batch)
        assert_equal_live(want, out.steps[0], 0)


@pytest.mark.parametrize("kind", ["tokens", "ragged", "pools"])
def test_the_copy_kernel_reaches_every_element(kind: str, far: Stretch) -> None:
    want = source(kind)
    for _, (origin, target) in stretched(lambda: (source(kind), made(kind).steps[0]), far):
        check_destinations(origin, [target])
        api.bind_copy(origin, [target], impl="triton")()
        assert_equal_live(want, target, 0)


def draft() -> tuple[Any, list[DraftStep]]:
    where = torch.tensor([3, 61, 17])
    table = torch.arange(3 * 16, dtype=torch.int32).view(3, 16)
    steps = [
        DraftStep(
            torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), torch.zeros(3, dtype=torch.int32)
        )
    ]
    return (where, where + 1, BlockTable(table, 4)), steps


def test_the_draft_kernel_reaches_every_element(far: Stretch) -> None:
    limits, refused = DraftLimits(64, PastEnd.CLAMP), []
    (positions, lengths, table), want = draft()
    bind_draft_steps(want, limits, impl="reference")(positions, lengths, table, 3, 4)
    for name, ((positions, lengths, table), steps) in stretched(draft, far):
        check_source(positions, lengths, table, 3)
        try:
            fill = bind_draft_steps(steps, limits, impl="triton")
        except InvalidValueError:
            refused.append(name.split(".")[-1])
            continue
        fill(positions, lengths, table, 3, 4)
        for (_, a), (_, b) in zip(tensors(want), tensors(steps), strict=True):
            assert torch.equal(a, b), name
    assert refused == ["positions dimension 0", "slots dimension 0", "seq_lens dimension 0"]  # contiguous only


def update() -> tuple[DraftRows, SlotGroups, list[torch.Tensor], list[IndexerRows]]:
    def new(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full(shape, -77, dtype=dtype)

    rows = DraftRows(
        3, torch.tensor([3, 61, 17]), torch.tensor([4, 62, 18], dtype=torch.int32),
        torch.tensor([0, 1, 2, 3], dtype=torch.int32), torch.tensor([2, 0, 1], dtype=torch.int32),
    )  # fmt: skip
    tables = [torch.arange(3 * 16, dtype=torch.int32).view(3, 16) + 100 * group for group in range(3)]
    groups = SlotGroups(tables, **grouped(tables), slot_mapping=new(3, 4, dtype=torch.int64))
    indexer = IndexerRows(new(3), (new(3), new(3)), new(3), tables[0].clone(), new(3, 16))
    return rows, groups, [new(3)], [indexer]


def grouped(tables: Any) -> dict[str, torch.Tensor]:
    return {
        "addresses": torch.tensor([table.data_ptr() for table in tables]),
        "row_strides": torch.tensor([table.stride(0) for table in tables]),
        "block_sizes": torch.full((len(tables),), 4, dtype=torch.int32),
        "enabled": torch.ones(len(tables), dtype=torch.bool),
    }


def test_the_step_kernel_reaches_every_element(far: Stretch) -> None:
    want, reached = update(), set()
    StepUpdate(*want, impl="reference").run(first=True)
    for name, (rows, groups, maps, indexers) in stretched(update, far):
        known = grouped(groups.tables)
        groups = replace(groups, addresses=known["addresses"], row_strides=known["row_strides"])
        try:
            step = StepUpdate(rows, groups, maps, indexers, impl="triton")
        except InvalidValueError:
            continue
        step.run(first=True)
        reached.add(name)
        assert torch.equal(want[1].slot_mapping, groups.slot_mapping), name
        for (_, a), (_, b) in zip(tensors(want[2:]), tensors([maps, indexers]), strict=True):
            assert torch.equal(a, b), name
    assert {name.split(".", 1)[1] for name in reached} >= {
        "slot_mapping dimension 0", "0.source dimension 0", "0.table dimension 0",
    }  # fmt: skip
