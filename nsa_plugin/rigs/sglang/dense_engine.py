"""The real sglang's dense backends as the conformance kit sees them: FlashAttention and FlashMLA.

On a CPU a captured graph is emulated, as in `engine`.
"""

from __future__ import annotations

import contextlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from nsa_plugin.adapters.base import Strategy
from nsa_plugin.adapters.sglang import dense as rows
from nsa_plugin.adapters.sglang import hooked, refusals
from nsa_plugin.adapters.sglang.registry import beneath_hooks
from nsa_plugin.adapters.sglang.releases import Part, lacking
from nsa_plugin.rigs.sglang import dense
from nsa_plugin.rigs.sglang.engine import SglangEngine
from nsa_plugin.rigs.sglang.flash_attention import Sizes
from nsa_plugin.testing.engine import Case, Session, Values

BATCHES: dict[int, list[tuple[list[int], list[int]]]] = {
    4: [
        ([17, 64, 65, 300], [3, 1, 2, 6]),
        ([303, 4, 128, 129], [2, 5, 7, 4]),
        ([311, 309, 64, 312], [2, 5, 7, 4]),
        ([5, 63], [7, 3]),
        ([], []),
    ],
    2: [([5, 300], [4, 2])],
    1: [([255], [2])],
}
"""By captured size, lengths and rows of the token table: page edges, a shrinking one, the last tokens of a context of 312
tokens, one padded by two requests, and an idle one, which is all padding."""


@dataclass(frozen=True)
class DenseCase(Case):
    """A row of the adapter's table with a page size, a number of speculative steps and captured sizes."""

    backend: dense.Name = "fa3"
    mode: str = "DECODE"
    page_size: int = 64
    steps: int = 4
    sizes: tuple[int, ...] = (4,)
    sliding_window: bool = False
    part: Part = "dense FlashAttention"

    @property
    def column(self) -> str:
        """What the release matrix has it under."""
        return self.part

    @property
    def batches(self) -> list[tuple[int, tuple[list[int], ...]]]:
        """Captured size and batch of each round."""
        return [(size, batch) for size in self.sizes for batch in BATCHES[size]]

    def rig(self) -> Any:
        """Backends that nothing else uses."""
        return dense.Dense(self.backend, self.mode, Sizes(self.page_size, self.sliding_window), self.steps)


SITUATION = {"DECODE": "decode", "TARGET_VERIFY": "target verify", "DRAFT_EXTEND_V2": "draft extend"}


def case(
    row: rows.DenseRow, page_size: int = 64, steps: int = 4, sizes: tuple[int, ...] = (4,), windows: bool = False
) -> DenseCase:
    """A case of one row."""
    covers = {SITUATION[row.mode], "padded rows", "idle batch", "int64 lengths"}
    covers |= {"one step" if steps == 2 else "several steps"} if row.draft else set()
    covers |= {"several captured sizes"} if len(sizes) > 1 else set()
    name = f"{row.path}, page size {page_size}, {steps} steps, sizes {', '.join(map(str, sizes))}"
    name += ", sliding windows" if windows else ""
    backend: dense.Name = "fa3" if row.part == "dense FlashAttention" else "flashmla"
    return DenseCase(
        name, row.path, sum(len(BATCHES[size]) for size in sizes), frozenset(covers), frozenset(),
        frozenset({"graph", "share"}), backend, row.mode, page_size, steps, sizes, windows, row.part,
    )  # fmt: skip


CASES = (
    *(case(row) for row in rows.ROWS),
    *(case(row, sizes=(4, 2, 1)) for row in rows.ROWS if row.draft),
    *(case(row, page, steps) for row in rows.ROWS[:1] for page, steps in ((1, 2), (16, 3), (128, 8))),
    *(case(row, page) for row in rows.ROWS[1:2] for page in (1, 16, 128)),
    *(case(row, page, windows=True) for row in rows.ROWS[:2] for page in (1, 64)),
)
"""The first of each path is the one in which errors are planted."""


class DenseSession(Session):
    """Backends of a case with their captured sizes."""

    def __init__(self, case: DenseCase) -> None:
        self._case, self._rig = case, case.rig()
        self._captured: dict[int, tuple[Any, list[Any]]] = {}
        self._size = 0
        self._capture()

    def _capture(self) -> None:
        """As sglang's runners: with every request at the fill length 1, row 0; once without a graph, then with it."""
        owner = self._rig.owner
        for size in self._case.sizes:
            static = self._rig.static(size)
            owner.init_forward_metadata_out_graph(static, in_capture=True)
            self._captured[size] = static, [backend.forward_metadata for backend in self._rig.backends]
            owner.init_forward_metadata_in_graph(static)
            with mock.patch.object(hooked, "capturing", lambda: True):
                owner.init_forward_metadata_in_graph(static)

    def capture_again(self) -> None:
        """As when weights change and sglang is told to capture anew."""
        self._captured.clear()
        self._rig.allocate()
        self._capture()

    def objects(self) -> Sequence[object]:
        """The draft's, and every backend."""
        return list({id(part): part for part in (self._rig.owner, *self._rig.backends)}.values())

    def prepare(self, round: int) -> None:
        """As sglang's runners: the live batch goes into the static buffers, and a namespace stands for the batch."""
        self._size, batch = self._case.batches[round]
        self._rig.owner.init_forward_metadata_out_graph(self._rig.live(self._size, *batch))

    def read(self) -> list[Values]:
        """Run the graph; then what captured kernels read. A graph runs what it has recorded, whatever the host says by then."""
        static, seen = self._captured[self._size]
        with mock.patch.object(rows.DensePreparation, "native", False):
            self._rig.owner.init_forward_metadata_in_graph(static)
        return [self._rig.values(metadata, index, self._size) for index, metadata in enumerate(seen)]

    def buffers(self) -> list[Values]:
        """All tensors of the metadata that was captured."""
        return [
            {name: value for name, value in vars(metadata).items() if isinstance(value, torch.Tensor)}
            for _, captured in self._captured.values()
            for metadata in captured
        ]


class DenseEngine(SglangEngine):
    """The dense backends of the installed sglang, from 0.5.22 on."""

    strategies: tuple[Strategy, ...] = ("graph", "share")
    never: Mapping[str, str] = {
        **SglangEngine.never,
        "int32 lengths": "the runners of these releases have int64 lengths",
    }
    tried = CASES

    def __init__(self, cases: Sequence[DenseCase] = CASES, plugins: Sequence[object] = ()) -> None:
        super().__init__((), plugins)
        self.strategies, self.never = type(self).strategies, type(self).never
        with super().running(), dense.importable():
            lacks = {case.column: lacking(case.part) or refusals.not_graph() for case in cases}
        self.left_out = {column: problem for column, problem in lacks.items() if problem}
        self._dense = [case for case in cases if case.column not in self.left_out]

    def cases(self) -> Sequence[DenseCase]:  # type: ignore[override]
        """Drafts, target verify and draft extend."""
        return self._dense

    def expected(self, case: Case) -> list[list[Values]]:
        """What sglang's own code computes, in backends of its own."""
        assert isinstance(case, DenseCase)
        rig, rounds = case.rig(), list[list[Values]]()
        compute = beneath_hooks(type(rig.owner).init_forward_metadata_out_graph)
        for size in case.sizes:
            compute(rig.owner, rig.static(size), in_capture=True)
        for size, batch in case.batches:
            compute(rig.owner, rig.live(size, *batch))
            rounds.append(
                [rig.values(backend.forward_metadata, index, size) for index, backend in enumerate(rig.backends)]
            )
        return rounds

    def start(self, case: Case) -> Session:
        """Real backends with captured sizes."""
        assert isinstance(case, DenseCase)
        return DenseSession(case)

    def patched(self) -> Sequence[object]:
        """The dense classes, too."""
        kinds = dict.fromkeys(row.backend for row in rows.ROWS)
        return [*super().patched(), *(pkgutil.resolve_name(kind) for kind in kinds)]

    def running(self) -> AbstractContextManager[object]:
        """With stand-ins for compiled kernels and a server's settings."""
        return self._running()

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        with super().running(), dense.stand_ins():
            yield
