"""Model Runner V2 as the conformance kit sees it: the fused multi-step draft of its real speculator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar
from unittest import mock

import torch

from nsa_plugin.adapters.base import Strategy
from nsa_plugin.adapters.vllm import releases
from nsa_plugin.adapters.vllm.describe import DraftBatch
from nsa_plugin.adapters.vllm.v2 import step as v2_step
from nsa_plugin.adapters.vllm.v2 import updates as v2_updates
from nsa_plugin.rigs.vllm.drafts import BATCHES, LAYOUTS
from nsa_plugin.rigs.vllm.engine import VllmCase, VllmEngine, draft_steps
from nsa_plugin.rigs.vllm.v2_draft import Draft
from nsa_plugin.testing.engine import Case, Fault, Session, Values

POISON = 3
"""What buffers hold that nobody has updated."""


def draft(layout: str, tokens: int) -> VllmCase:
    """A draft of `tokens` tokens, whose graph has one size: smaller batches are padded to it."""
    covers = frozenset({"decode", "padded rows", "int32 lengths", draft_steps(tokens)})
    name = f"{tokens} draft tokens, {layout}"
    return VllmCase(name, "draft decode", len(BATCHES), covers, layout=layout, tokens=tokens)


CASES = tuple(draft(layout, tokens) for tokens in (3, 2, 4, 8) for layout in LAYOUTS)
"""The first is the one in which errors are planted."""


class V2Session(Session):
    """A speculator that has captured its draft."""

    poisoned: tuple[str, ...] = ("req_id_per_token_buffer",)

    def __init__(self, case: VllmCase) -> None:
        self.draft = self.make(case)
        self.draft.keep_methods(v2_step.GENERATE, v2_step.UPDATE_STEP)
        self._tokens = case.tokens
        self._seen: list[Values] = []

    def make(self, case: VllmCase) -> Draft:
        """The speculator of a case."""
        return Draft(*LAYOUTS[case.layout], case.tokens)

    def poison(self) -> None:
        """Fill what nobody may read unwritten."""
        for builder in self.draft.builders:
            for name in self.poisoned:
                if hasattr(builder, name):
                    getattr(builder, name).fill_(POISON)

    def prepare(self, round: int) -> None:
        """Run the whole draft: vLLM has no place between preparing and replaying. What nobody updates is poison."""
        self.poison()
        lengths, rejected, first_block = BATCHES[round]
        self._seen = list(self.draft.propose(lengths, [min(count, self._tokens) for count in rejected], first_block))

    def read(self) -> list[Values]:
        """What each draft step saw."""
        return self._seen

    def buffers(self) -> list[Values]:
        """The tensors of the metadata that was captured."""
        return [
            {name: value for name, value in vars(metadata).items() if isinstance(value, torch.Tensor)}
            for metadata in self.draft.graphs.captured.values()
        ]

    def objects(self) -> Sequence[object]:
        """The speculator and the builders of its groups."""
        return [self.draft.speculator, *self.draft.builders]


class V2Engine(VllmEngine):
    """The installed vLLM's Model Runner V2."""

    strategies: tuple[Strategy, ...] = ("graph",)
    tried = CASES
    session: ClassVar[type[V2Session]] = V2Session
    batch_types = (DraftBatch,)
    never_of_runner: ClassVar[Mapping[str, str]] = {
        "target verify": "the target has cases of its own: `v2_target_engine`",
        "draft extend": "the draft's first pass has cases of its own: `v2_target_engine`",
        "batch size 0": "graphs are captured for one request or more",
        "idle batch": "a rank without requests runs vLLM's dummy batch, which the speculator does not draft for",
        "several captured sizes": "the emulated graph has one size, to which smaller batches are padded",
        "capture again": "vLLM captures the graphs of a speculator once",
    }

    def expected(self, case: Case) -> list[list[Values]]:
        """vLLM's own rebuild of every group's metadata at every step."""
        assert isinstance(case, VllmCase)
        session, rounds = self.start(case), []
        assert not session.draft.fused, "this vLLM does not rebuild: no reference"
        for round in range(case.rounds):
            session.prepare(round)
            rounds.append(session.read())
        return rounds

    def start(self, case: Case) -> V2Session:
        """A speculator whose draft is captured."""
        assert isinstance(case, VllmCase)
        return self.session(case)

    @contextlib.contextmanager
    def plant(self, working: int) -> Iterator[Fault]:
        """In the one-kernel step, and in the function that the builder's update calls; vLLM's own builders keep it."""
        fault, real = Fault(working), releases.vllms_request_map() or v2_updates.request_map

        def failing(query_start_loc: torch.Tensor, out: torch.Tensor, tokens: int) -> None:
            out.fill_(POISON)
            fault.call()
            real(query_start_loc, out, tokens)

        run = v2_step.Step.run

        def failing_step(step: v2_step.Step) -> None:
            fault.call()
            run(step)

        with (
            mock.patch.object(releases, "vllms_request_map", lambda: failing),
            mock.patch.object(v2_step.Step, "run", failing_step),
        ):
            yield fault
