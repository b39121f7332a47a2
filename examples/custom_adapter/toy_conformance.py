"""What the conformance kit must know about the toy engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

import toy_engine
from nsa_plugin.adapters.base import Adapter, Strategy
from nsa_plugin.testing.engine import Case, Engine, Obstacle, Session, Values
from toy_adapter import ToyAdapter, ToyPlugin

WIDTH = 300
PADDING = (0, 1)  # of a padded row: request, length
Rows = list[tuple[int, int]]
ROUNDS: dict[int, list[Rows]] = {
    4: [
        [(3, 15), (1, 16), (0, 17), (5, 290)],
        [(2, 9), (5, 64), (4, 63), (1, 1)],
        [(4, 250), (2, 33), PADDING, PADDING],
        [PADDING] * 4,
    ],
    2: [[(1, 200), (2, 100)], [(5, 7), (3, 8)]],
    0: [[]],
}
"""By captured size: the batches, as rows of the scheduler's table."""


@dataclass(frozen=True)
class ToyCase(Case):
    """A forward of the toy engine, and the dtype of the scheduler's table."""

    num_steps: int = 1
    draft_tokens: int = 0
    sizes: tuple[int, ...] = (4,)
    dtype: torch.dtype = torch.int64


EVERY_SIZE = tuple(ROUNDS)
COMMON = frozenset({"padded rows", "idle batch", "strided inputs"})
ALL_SIZES = COMMON | {"batch size 0", "several captured sizes"}
CASES = (
    ToyCase("draft of 1 step", "draft decode", 4, COMMON | {"decode", "one step"}),
    ToyCase("draft of 3 steps", "draft decode", 7, ALL_SIZES | {"several steps", "int64 lengths"}, num_steps=3,
            sizes=EVERY_SIZE),
    ToyCase("draft of 7 steps, int32", "draft decode", 4, COMMON | {"int32 lengths"}, num_steps=7, dtype=torch.int32),
    ToyCase("verification", "target verify", 4, COMMON | {"target verify"}, draft_tokens=4),
    ToyCase("verification, several sizes", "target verify", 7, ALL_SIZES, draft_tokens=3, sizes=EVERY_SIZE),
)  # fmt: skip


class ToySession(Session):
    """A forward with its captured sizes."""

    def __init__(self, case: ToyCase, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        pages = torch.randperm(6 * 19, generator=generator).view(6, 19, 1) * toy_engine.PAGE_SIZE
        slots = (pages + torch.arange(toy_engine.PAGE_SIZE)).flatten(1)[:, :WIDTH].to(torch.int32).to(device)
        self.forward = toy_engine.Forward(slots, case.num_steps, case.draft_tokens)
        self._rounds = [torch.tensor(rows, dtype=case.dtype, device=device).view(-1, 2) for rows in rounds(case)]
        self._tables = {size: self._table(size, case.dtype, device) for size in case.sizes}
        self._size = 0
        for size, table in self._tables.items():
            self.forward.capture(toy_engine.Batch(size, table[:, 0], table[:, 1]))

    def prepare(self, round: int) -> None:
        """As the engine: the live rows go into the scheduler's table, and a namespace stands for the batch."""
        rows = self._rounds[round]
        self._size = len(rows)
        table = self._tables[self._size]
        table.copy_(rows)
        self.forward.prepare(SimpleNamespace(size=self._size, requests=table[:, 0], lengths=table[:, 1]))

    def read(self) -> list[Values]:
        """All vectors, and the pages that hold tokens a row's request has."""
        values: list[Values] = []
        for step in self.forward.captured[self._size]:
            columns = torch.arange(step.pages.shape[1], device=step.pages.device) * toy_engine.PAGE_SIZE
            live = columns < step.lengths.repeat_interleave(self.forward.width)[:, None]
            vectors = {name: tensor.clone() for name, tensor in vars(step).items() if name != "pages"}
            values.append({**vectors, "pages": step.pages.masked_fill(~live, -1)})
        return values

    def buffers(self) -> list[Values]:
        """The step buffers of every captured size."""
        return [vars(step) for steps in self.forward.captured.values() for step in steps]

    def capture_again(self) -> None:
        """The same forward, with new buffers."""
        for size, table in self._tables.items():
            self.forward.capture(toy_engine.Batch(size, table[:, 0], table[:, 1]))

    def objects(self) -> Sequence[object]:
        """The forward."""
        return [self.forward]

    @staticmethod
    def _table(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.tensor([PADDING] * size, dtype=dtype, device=device).view(-1, 2)


def rounds(case: ToyCase) -> list[Rows]:
    """The batches of a case, of its sizes in turn."""
    return [rows for size in case.sizes for rows in ROUNDS[size]]


class ToyEngine(Engine):
    """The toy engine. `adapter` makes the adapter to test; other arguments replace the class attributes."""

    name = "toy"
    package = "toy_engine"
    logger = "toy_engine.plugins"
    entry_point = "toy_adapter:register"
    strategies: tuple[Strategy, ...] = ("share", "copy")
    batch_types = (toy_engine.Batch, SimpleNamespace)
    never = {"draft extend": "the toy engine has no such forward"}  # noqa: RUF012

    def __init__(self, adapter: Callable[[], Adapter] = ToyAdapter, **replaced: Any) -> None:
        self._adapter = adapter
        vars(self).update(replaced)

    def plugins(self) -> Sequence[object]:
        """What offers the adapter."""
        return [ToyPlugin(self._adapter())]

    def cases(self) -> Sequence[ToyCase]:
        """Drafts of one and more steps, verification."""
        return CASES

    def expected(self, case: Case) -> list[list[Values]]:
        """The toy engine's own code is its own reference."""
        session, values = self.start(case), []
        for round in range(case.rounds):
            session.prepare(round)
            values.append(session.read())
        return values

    def start(self, case: Case) -> Session:
        """A forward that has captured its sizes."""
        assert isinstance(case, ToyCase)
        return ToySession(case, self.device)

    def patched(self) -> Sequence[object]:
        """The class that the adapter hooks."""
        return [toy_engine.Forward]

    def obstacles(self) -> Sequence[Obstacle]:
        """A release without one of the needs, and an installation that breaks off between its two hooks."""
        return [
            Obstacle("prepare", mock.patch.object(toy_engine.Forward, "prepare", _without_batch)),
            Obstacle("StepBuffers", mock.patch.object(toy_engine, "StepBuffers", None)),
            Obstacle("the second hook fails", _second_hook_fails(), probed=False),
        ]

    def pretend(self, release: str) -> AbstractContextManager[object]:
        """The toy engine is no installed distribution: it has a `__version__`."""
        return mock.patch.object(toy_engine, "__version__", release)


def _without_batch(self: Any) -> None:
    """What `prepare` might look like in another release."""


def _second_hook_fails() -> AbstractContextManager[object]:
    import toy_adapter

    replace, calls = toy_adapter._replace, []

    def failing(owner: Any, name: str, replacement: Any) -> None:
        calls.append(name)
        if len(calls) > 1:
            raise RuntimeError("planted")
        replace(owner, name, replacement)

    return mock.patch.object(toy_adapter, "_replace", failing)
