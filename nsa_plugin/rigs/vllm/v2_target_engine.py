"""The real vLLM as the conformance kit sees it: the target's verified tokens, and the draft's first pass over them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from nsa_plugin.adapters.base import Strategy
from nsa_plugin.adapters.vllm.describe import TargetBatch
from nsa_plugin.adapters.vllm.v2.target import hooks
from nsa_plugin.core import api
from nsa_plugin.core.batch import BatchDescriptor
from nsa_plugin.core.group_rows import GroupMetadata
from nsa_plugin.hookspec import hookimpl
from nsa_plugin.rigs.vllm.engine import VllmEngine
from nsa_plugin.rigs.vllm.v2_target import Batch, Shape, TargetRunner, hopper
from nsa_plugin.testing.engine import Case, Fault, Session, Values

POISON = 1 << 20
REQUESTS = ((3, 0), (4, 0), (1, 4), (2, 0))
"""Of each round: requests, and to how many other ranks pad the batch."""


@dataclass(frozen=True)
class TargetCase(Case):
    """Tokens to verify, or the draft's first pass over the same buffers."""

    shape: Shape = field(default_factory=Shape)


def case(path: str, shape: Shape) -> TargetCase:
    """Four rounds."""
    covers = frozenset({path, "padded rows", "int32 lengths", "several captured sizes"})
    blocks = f", blocks of {shape.block_size}" if shape.block_size != 64 else ""
    return TargetCase(
        f"{path} of {shape.tokens + 1} tokens, {shape.layout}{blocks}", path, len(REQUESTS), covers, shape=shape
    )


CASES = (
    case(hooks.PATH, Shape("bf16", 3)),  # lengths by request
    case(hooks.FIRST_PASS, Shape("fp8 separate", 2)),  # lengths by row, and a block table of the rows
    case(hooks.PATH, Shape("fp8 mixed", 4, block_size=128)),
)


class TargetSession(Session):
    """A runner that has captured its target and its draft's first pass."""

    def __init__(self, case: TargetCase) -> None:
        self.runner = TargetRunner(case.shape)
        self._first_pass = case.path == hooks.FIRST_PASS
        self._batch: Batch | None = None

    def prepare(self, round: int) -> None:
        """The runner's own preparation. What nobody writes for this batch is poison."""
        with self.runner.inference():
            self.runner.poison(POISON)
            self._batch = self.runner.batch(round, *REQUESTS[round])
            self.runner.prepare(self._batch)

    def read(self) -> list[Values]:
        """What the target's layers and the draft's have read, as the case's path says."""
        assert self._batch is not None
        with self.runner.inference():
            target, first_pass = self.runner.replay(self._batch)
        return [first_pass if self._first_pass else target]

    def buffers(self) -> list[Values]:
        """What builders keep."""
        return [
            {name: value for name, value in vars(builder).items() if isinstance(value, torch.Tensor)}
            for builder in self.runner.builders
        ]

    def capture_again(self) -> None:
        """As after graphs were released."""
        self.runner.capture()

    def objects(self) -> Sequence[object]:
        """The managers, the builders and the model's state."""
        return [self.runner.manager, self.runner.speculator, self.runner.state, *self.runner.builders]


class Failing:
    """Provides a refresh that fails after some calls, half-written."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault

    @hookimpl(tryfirst=True)
    def nsa_plugin_bind_precompute(
        self, batch: BatchDescriptor, out: Any, enabled: torch.Tensor | None
    ) -> Callable[[BatchDescriptor], None] | None:
        if not isinstance(out, GroupMetadata):
            return None
        right = api.bind_precompute(batch, out, impl="reference", enabled=enabled)

        def run(live: BatchDescriptor) -> None:
            if enabled is not None and not enabled:
                return  # an emulated graph runs what it has recorded, and that finds that it is switched off
            for group in out.groups:
                for plane, size in group.vectors(batch).values():
                    plane[:size] = -5  # half-written results must not survive
            self._fault.call()
            right(live)

        return run


class TargetEngine(VllmEngine):
    """The installed vLLM, on CPU tensors, with the branches of Hopper."""

    strategies: tuple[Strategy, ...] = ("graph",)
    tried = CASES
    """Lengths by request and by row, both paths, pages as large as blocks and smaller ones."""
    batch_types = (TargetBatch,)
    needs = hooks.needs()
    never_of_runner: ClassVar[Mapping[str, str]] = {
        "decode": "the draft's steps have cases of their own",
        "one step": "a batch is verified in one pass",
        "several steps": "a batch is verified in one pass",
        "batch size 0": "graphs are captured for one request or more",
        "idle batch": "a rank without requests replays vLLM's dummy batch, as any other",
    }

    def expected(self, case: Case) -> list[list[Values]]:
        """vLLM's own build before each replay."""
        session, rounds = self.start(case), []
        for round in range(case.rounds):
            session.prepare(round)
            rounds.append(session.read())
        return rounds

    def start(self, case: Case) -> Session:
        """A runner that has captured."""
        assert isinstance(case, TargetCase)
        return TargetSession(case)

    @contextlib.contextmanager
    def plant(self, working: int) -> Iterator[Fault]:
        """In the refresh."""
        fault = Fault(working)
        fault.plugins.append(Failing(fault))
        yield fault

    def running(self) -> AbstractContextManager[object]:
        """With vLLM's own logging as it is in production, and a stand-in for DeepGEMM."""
        stack = contextlib.ExitStack()
        stack.enter_context(super().running())
        stack.enter_context(hopper())
        return stack
