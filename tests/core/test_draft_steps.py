"""Positions, slots and lengths of all draft steps: definition, kernel, and a loop that anybody can follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_plugin.core.api import Impl
from nsa_plugin.core.batch import BlockTable
from nsa_plugin.core.draft_steps import DraftLimits, DraftStep, bind_draft_steps, check_source
from nsa_plugin.core.errors import InvalidTypeError, InvalidValueError

pytest.importorskip("triton")

POISON = -77
INTEGERS = [torch.int32, torch.int64]


@dataclass(frozen=True)
class Case:
    """A batch, how far it is drafted, and what follows by counting."""

    positions: torch.Tensor
    seq_lens: torch.Tensor
    table: BlockTable
    batch_size: int
    num_rows: int
    num_steps: int
    limits: DraftLimits

    def filled(self, impl: Impl) -> list[DraftStep]:
        """The steps, in buffers that were poisoned and are longer than need be."""
        size = self.num_rows + 2
        steps = [
            DraftStep(*(torch.full((size,), POISON, dtype=dtype) for dtype in (torch.int64, torch.int64, torch.int32)))
            for _ in range(self.num_steps)
        ]
        check_source(self.positions, self.seq_lens, self.table, self.batch_size)
        fill = bind_draft_steps(steps, self.limits, impl=impl)
        fill(self.positions, self.seq_lens, self.table, self.batch_size, self.num_rows)
        return steps

    def counted(self) -> list[DraftStep]:
        """The same, request by request and step by step."""
        size = self.num_rows + 2
        steps = [
            DraftStep(*(torch.full((size,), POISON, dtype=dtype) for dtype in (torch.int64, torch.int64, torch.int32)))
            for _ in range(self.num_steps)
        ]
        longest, block_size = self.limits.max_model_len, self.table.block_size
        for row in range(self.num_rows):
            if row >= self.batch_size:
                for step in steps:
                    step.slots[row] = self.limits.padding_slot
                continue
            position, length = int(self.positions[row]), int(self.seq_lens[row])
            for step in steps:
                position, length = position + 1, min(length + 1, longest)
                padded = position >= longest
                if padded:
                    position, length = 0, 1
                block = int(
                    self.table.block_table[row, min(position // block_size, self.table.block_table.shape[1] - 1)]
                )
                slot = block * block_size + position % block_size
                step.positions[row], step.seq_lens[row] = position, length
                step.slots[row] = self.limits.padding_slot if padded else slot
        return steps


def strided(values: torch.Tensor, stride: int) -> torch.Tensor:
    """The same values in a vector or table whose innermost entries lie `stride` apart."""
    wide = torch.full((*values.shape, stride), POISON, dtype=values.dtype)
    wide[..., 0] = values
    return wide[..., 0]


@st.composite
def cases(draw: Callable[..., Any]) -> Case:
    """Any lengths, block sizes and strides; near and past the end often."""
    batch_size, padding = draw(st.integers(0, 9)), draw(st.integers(0, 5))
    longest = draw(st.sampled_from([1, 2, 7, 64, 1000]))
    block_size = draw(st.sampled_from([1, 3, 16, 64]))
    blocks = draw(st.integers(1, -(-longest // block_size) + 1))  # may be too narrow: V1 then reads the last block
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    near = draw(st.booleans())
    low = max(0, longest - 4) if near else 0
    dtypes = [draw(st.sampled_from(INTEGERS)) for _ in range(3)]
    positions = torch.randint(low, longest + 2, (batch_size,), generator=generator).to(dtypes[0])
    seq_lens = torch.randint(low, longest + 2, (batch_size,), generator=generator).to(dtypes[1])
    table = torch.randint(0, 2**20, (batch_size, blocks), generator=generator).to(dtypes[2])
    strides = [draw(st.sampled_from([1, 2])) for _ in range(3)]
    return Case(
        strided(positions, strides[0]), strided(seq_lens, strides[1]), BlockTable(strided(table, strides[2]), block_size),
        batch_size, batch_size + padding, draw(st.integers(1, 8)),
        DraftLimits(longest, draw(st.sampled_from([-1, 0]))),
    )  # fmt: skip


def assert_same(have: list[DraftStep], want: list[DraftStep]) -> None:
    for index, (ours, theirs) in enumerate(zip(have, want, strict=True)):
        for name in ("positions", "slots", "seq_lens"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), (index, name)


@settings(max_examples=150)
@given(cases())
def test_definition_and_kernel_equal_a_plain_loop(case: Case) -> None:
    counted = case.counted()
    assert_same(case.filled("reference"), counted)
    assert_same(case.filled("triton"), counted)


@settings(max_examples=30)
@given(cases())
def test_all_steps_at_once_equal_one_step_at_a_time_in_place(case: Case) -> None:
    """What vLLM does: each step updates the vectors that the next one starts from."""
    want = case.filled("triton")
    size = case.num_rows + 2
    slots = torch.full((size,), POISON)
    here = DraftStep(torch.full((size,), POISON), slots, torch.full((size,), POISON, dtype=torch.int32))
    here.positions[: case.batch_size] = case.positions
    here.seq_lens[: case.batch_size] = case.seq_lens
    fill = bind_draft_steps([here], case.limits, impl="triton")
    for step in want:
        fill(here.positions, here.seq_lens, case.table, case.batch_size, case.num_rows)
        assert_same([here], [step])


def test_more_rows_than_a_program_takes() -> None:
    rows = torch.arange(300)
    table = BlockTable(rows[:, None].repeat(1, 4), 64)
    case = Case(rows % 250, (rows % 250 + 1).int(), table, 300, 391, 3, DraftLimits(251))
    assert_same(case.filled("triton"), case.counted())


def test_past_the_end() -> None:
    """In words: it starts again at the front and writes nowhere, once."""
    table = BlockTable(torch.tensor([[5, 6]]), 4)
    case = Case(torch.tensor([7]), torch.tensor([8]), table, 1, 1, 3, DraftLimits(8))
    first, second, third = case.filled("reference")
    assert [int(first.positions[0]), int(first.slots[0]), int(first.seq_lens[0])] == [0, -1, 1]
    assert [int(second.positions[0]), int(second.slots[0]), int(second.seq_lens[0])] == [1, 21, 2]
    assert [int(third.positions[0]), int(third.slots[0]), int(third.seq_lens[0])] == [2, 22, 3]


def vector(dtype: torch.dtype = torch.int64, stride: int = 1) -> torch.Tensor:
    return strided(torch.zeros(4, dtype=dtype), stride)


@pytest.mark.parametrize(
    ("steps", "limits", "error", "message"),
    [
        ([], DraftLimits(8), InvalidValueError, "steps: expected at least one draft step"),
        ([DraftStep(vector(), vector(), vector(torch.int32))], DraftLimits(0), InvalidValueError, "max_model_len"),
        ([DraftStep(vector(), vector(), vector())], DraftLimits(8), InvalidTypeError, r"steps\[0\].seq_lens: expected torch.int32"),
        ([DraftStep(vector(stride=2), vector(), vector(torch.int32))], DraftLimits(8), InvalidValueError, "contiguous vector"),
        ([DraftStep(vector(), vector(), vector(torch.int32).to("meta"))], DraftLimits(8), InvalidValueError, "on cpu, got meta"),
    ],
)  # fmt: skip
def test_bad_destinations_are_named(
    steps: list[DraftStep], limits: DraftLimits, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        bind_draft_steps(steps, limits)


@pytest.mark.parametrize(
    ("positions", "table", "error", "message"),
    [
        (torch.zeros(3), torch.zeros(3, 2, dtype=torch.int32), InvalidTypeError, "positions: expected int32 or int64"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int32), InvalidValueError, "positions: expected 1"),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(3, 0, dtype=torch.int32), InvalidValueError, "at least one block"),
    ],
)  # fmt: skip
def test_bad_sources_are_named(
    positions: torch.Tensor, table: torch.Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_source(positions, torch.zeros(3, dtype=torch.int32), BlockTable(table, 4), 3)
