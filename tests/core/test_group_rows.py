"""Planes of attention groups: what they must be by a naive loop, the kernel against the reference, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_plugin import (
    BatchDescriptor,
    BlockTable,
    ForwardMode,
    Geometry,
    InvalidTypeError,
    InvalidValueError,
    PrecomputedMetadata,
    ReplayPlan,
)
from nsa_plugin.core import api
from nsa_plugin.core.group_rows import GroupMetadata, GroupRows
from nsa_plugin.core.triton_binding import GROUP_ROWS_CHUNK as CHUNK
from tests.examples import examples

pytest.importorskip("triton")

POISON = -77
NAMES = ("request_map", "lengths", "ones", "row_pages", "request_pages")


@dataclass(frozen=True)
class Case:
    """A batch of `real` requests and padding, and groups that keep some of the planes each."""

    batch: BatchDescriptor
    geometry: Geometry
    groups: tuple[GroupRows, ...]
    real: int

    def poisoned(self) -> Case:
        """The same case with planes of its own, full of a value that none can have."""
        return replace(self, groups=tuple(map(_fresh, self.groups)))

    def run(self, impl: str, enabled: torch.Tensor | None = None) -> None:
        """Once, through a plan."""
        bind = partial(api.bind, impl=impl)  # type: ignore[arg-type]
        plan = ReplayPlan(self.batch, self.geometry, self.groups, strategy="share", bind=bind, enabled=enabled)
        plan.run(self.batch)

    def planes(self) -> list[torch.Tensor]:
        """All that may be written."""
        found = [getattr(group, name) for group in self.groups for name in NAMES]
        found += [plane for group in self.groups for plane in group.query_lens]
        return [plane for plane in found if plane is not None]


def _fresh(group: GroupRows) -> GroupRows:
    planes: dict[str, Any] = {name: getattr(group, name) for name in NAMES}
    made: dict[str, Any] = {
        name: None if plane is None else torch.full_like(plane, POISON) for name, plane in planes.items()
    }
    return replace(group, **made, query_lens=tuple(torch.full_like(plane, POISON) for plane in group.query_lens))


def batch_of(lengths: list[int], rows: int, padding: int, blocks: torch.Tensor, block_size: int) -> BatchDescriptor:
    """As vLLM pads a uniform batch: padded requests have no tokens and no rows."""
    real, size = len(lengths), len(lengths) + padding
    starts = torch.arange(size + 1, dtype=torch.int32).clamp(max=real) * rows
    seq_lens = torch.tensor([*lengths, *[0] * padding], dtype=torch.int32)
    slots = BlockTable(blocks, block_size)
    return BatchDescriptor(
        ForwardMode.DRAFT_EXTEND, size, seq_lens, slots, draft_tokens=rows, query_start_loc=starts
    )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """One to eight rows a request, blocks of one or two pages, padding, one to three groups, gaps between pages."""
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    rows, real, padding = draw(st.integers(1, 8)), draw(st.integers(0, 5)), draw(st.integers(0, 4))
    size = max(real + padding, 1)
    padding = size - real
    page, per_block = 64, draw(st.sampled_from([1, 2]))
    width = draw(st.sampled_from([1, 4, 16]))
    edges = st.sampled_from([0, 1, 63, 64, 65, width * page * per_block])
    longest = width * page * per_block
    lengths = [min(max(draw(st.one_of(edges, st.integers(0, longest))), rows), longest) for _ in range(real)]
    tables = [torch.randint(1, 1 << 20, (size + 1, width), dtype=torch.int32) for _ in range(2)]
    batch = batch_of(lengths, rows, padding, tables[0], page * per_block)

    def plane(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.int32)

    def group() -> GroupRows:
        stride = draw(st.sampled_from([0, 0, per_block + 3]))
        return GroupRows(
            request_map=plane(size * rows + 2),
            lengths=plane(size * rows) if draw(st.booleans()) else None,
            query_lens=tuple(plane(size) for _ in range(draw(st.integers(0, 2)))),
            ones=plane(size * rows) if draw(st.booleans()) else None,
            row_pages=plane(size * rows, width * per_block + 1) if draw(st.booleans()) else None,
            request_pages=plane(size, width * per_block) if draw(st.booleans()) else None,
            slots=BlockTable(tables[1], page * per_block) if draw(st.booleans()) else None,
            page_stride=stride,
        )

    groups = tuple(group() for _ in range(draw(st.integers(1, 3))))
    return Case(batch, Geometry(2048, page, longest, num_sms=2, wide_page_table=False), groups, real).poisoned()


def naive(case: Case, group: GroupRows) -> dict[str, dict[tuple[int, ...], int]]:
    """Defined entries by name of the plane and index, by a loop over requests, rows and pages."""
    batch, slots = case.batch, group.slots or case.batch.slots
    assert isinstance(slots, BlockTable)
    rows, page = batch.draft_tokens, case.geometry.page_size
    per_block = slots.block_size // page
    want: dict[str, dict[tuple[int, ...], int]] = {name: {} for name in (*NAMES, "query_lens")}
    for request in range(batch.batch_size):
        exists, length = request < case.real, int(batch.seq_lens[request])
        pages = []
        for number in range(max(-(-length // page), 1)):
            block = int(slots.block_table[request, number // per_block])
            pages.append(block * (group.page_stride or per_block) + number % per_block if exists else 0)
        want["query_lens"][(request,)] = rows if exists else 0
        want["request_pages"] |= {(request, column): value for column, value in enumerate(pages)}
        for place in range(rows):
            row = request * rows + place
            want["request_map"][(row,)] = request if exists else 0
            want["lengths"][(row,)] = max(length - rows + place + 1, 0)
            want["ones"][(row,)] = 1
            want["row_pages"] |= {(row, column): value for column, value in enumerate(pages)}
    return want


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_every_plane_is_what_a_loop_says_and_nothing_else_is_written(impl: str) -> None:
    @settings(max_examples=60 if impl == "reference" else examples(30), deadline=None)
    @given(cases())
    def check(case: Case) -> None:
        case.run(impl)
        for group in case.groups:
            want = naive(case, group)
            planes = [(name, getattr(group, name)) for name in NAMES]
            for name, plane in [*planes, *(("query_lens", plane) for plane in group.query_lens)]:
                if plane is None:
                    continue
                expected = torch.full_like(plane, POISON)
                for index, value in want[name].items():
                    expected[index] = value
                assert torch.equal(plane, expected), f"{name}:\n{plane}\n{expected}"

    check()


def test_rows_longer_than_a_chunk_are_shared_by_programs() -> None:
    width = CHUNK + 1500
    blocks = torch.randint(1, 1 << 20, (2, width), dtype=torch.int32)
    batch = batch_of([64 * width - 5, 64 * CHUNK], 2, 0, blocks, 64)
    pages = torch.full((4, width), POISON, dtype=torch.int32)
    case = Case(
        batch, Geometry(2048, 64, 64 * width, num_sms=2, wide_page_table=False), (GroupRows(row_pages=pages),), 2
    )
    other = case.poisoned()
    case.run("triton")
    other.run("reference")
    assert torch.equal(pages, other.planes()[0])
    assert torch.equal(pages[0], blocks[0]) and int((pages[2] != POISON).sum()) == CHUNK


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_switched_off_nothing_is_written(impl: str) -> None:
    @settings(max_examples=10 if impl == "reference" else examples(12), deadline=None)
    @given(cases())
    def check(case: Case) -> None:
        enabled, always = torch.zeros(1, dtype=torch.int32), case.poisoned()
        case.run(impl, enabled)
        assert all(bool((plane == POISON).all()) for plane in case.planes())
        enabled.fill_(1)
        case.run(impl, enabled)
        always.run(impl)
        assert all(map(torch.equal, case.planes(), always.planes()))

    check()


def grouped() -> dict[str, Any]:
    """Arguments of a plan that fills two groups."""
    batch = batch_of([5, 64], 2, 1, torch.ones(3, 4, dtype=torch.int32), 64)

    def plane(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.int32)

    own = BlockTable(torch.ones(3, 4, dtype=torch.int32), 64)
    groups = [
        GroupRows(plane(6), plane(6), (plane(3), plane(3)), plane(6), plane(6, 4), plane(3, 4), own),
        GroupRows(plane(6), plane(6), (plane(3),), plane(6), plane(6, 4), plane(3, 4), own),
    ]
    return {"batch": batch, "geometry": Geometry(2048, 64, 256, wide_page_table=False), "consumers": groups}


def plan(**changes: Any) -> ReplayPlan:
    """A plan for the first of `grouped`, changed."""
    arguments = grouped()
    group, batch = arguments["consumers"][0], arguments["batch"]
    group = replace(group, **{key: value for key, value in changes.items() if hasattr(group, key)})
    batch = replace(batch, **{key: value for key, value in changes.items() if hasattr(batch, key) and key != "slots"})
    geometry = changes.get("geometry", arguments["geometry"])
    return ReplayPlan(batch, geometry, [group], strategy=changes.get("strategy", "share"))


SHORT, WIDE = torch.empty(2, dtype=torch.int32), torch.empty(6, 8, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"query_start_loc": None}, InvalidTypeError, "query_start_loc: expected a tensor.*which rows are padding"),
        ({"query_start_loc": SHORT}, InvalidValueError, "query_start_loc: expected at least 4 entries"),
        ({"mode": ForwardMode.TARGET_VERIFY}, InvalidValueError, "query_start_loc: expected None outside DRAFT_EXTEND"),
        ({"request_map": SHORT}, InvalidValueError, r"groups\[0\].request_map: expected at least 6 entries"),
        ({"lengths": torch.empty(6)}, InvalidTypeError, r"groups\[0\].lengths: expected int32, got float32"),
        ({"ones": WIDE[:, 0]}, InvalidValueError, r"groups\[0\].ones: expected a contiguous vector"),
        ({"row_pages": WIDE[:, ::2]}, InvalidValueError, r"groups\[0\].row_pages: expected rows of stride 1"),
        ({"request_pages": WIDE[:2]}, InvalidValueError, r"groups\[0\].request_pages: expected at least 3 rows"),
        ({"query_lens": (SHORT,) * 3}, InvalidValueError, r"groups\[0\].query_lens: expected at most two"),
        ({"geometry": Geometry(2048, 128, 256, wide_page_table=False)}, InvalidValueError, "a multiple of the page size"),
        ({"row_pages": WIDE, "lengths": WIDE.flatten()[:6]}, InvalidValueError, "a buffer apart from"),
        ({"strategy": "copy"}, InvalidValueError, "strategy: expected 'share' for attention groups"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    plan()
    with pytest.raises(error, match=words):
        plan(**changes)


def test_a_group_keeps_something_and_there_is_one() -> None:
    arguments = grouped()
    for groups, words in (([GroupRows()], "groups.0.: expected at least one plane"), ([], "consumers: expected 1")):
        with pytest.raises(InvalidValueError, match=words):
            ReplayPlan(arguments["batch"], arguments["geometry"], groups, strategy="share")
    nothing = GroupMetadata((), arguments["batch"], arguments["geometry"])
    with pytest.raises(InvalidValueError, match="groups: expected at least one"):
        api.bind_precompute(arguments["batch"], nothing)
    with pytest.raises(InvalidValueError, match="destinations: expected none for attention groups"):
        full = GroupMetadata(arguments["consumers"], arguments["batch"], arguments["geometry"])
        api.bind(
            arguments["batch"], full, PrecomputedMetadata.allocate(arguments["batch"], arguments["geometry"]).steps
        )


def test_a_batch_without_starts_is_refused_by_a_plan_that_needs_them() -> None:
    made = plan()
    with pytest.raises(InvalidValueError, match="query_start_loc is None: expected False"):
        made.run(replace(grouped()["batch"], query_start_loc=None))
