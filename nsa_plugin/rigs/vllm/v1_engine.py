"""Model Runner V1 as the conformance kit sees it: the draft steps of its real proposer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import mock

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from nsa_plugin.adapters.base import Strategy
from nsa_plugin.adapters.vllm.v1.proposer import PATH
from nsa_plugin.adapters.vllm.v1.steps import DraftSteps
from nsa_plugin.rigs.vllm.drafts import BATCHES, LAYOUTS
from nsa_plugin.rigs.vllm.engine import VllmCase, VllmEngine, draft_steps
from nsa_plugin.rigs.vllm.stand_ins import emulated_cuda
from nsa_plugin.rigs.vllm.v1_draft import ADDRESSES, MORE_BATCHES, Step, V1Draft, caches_cleared, proposals
from nsa_plugin.testing.engine import Case, Fault, Session, Values

POISON = 3
"""A slot that no batch has."""
UNWRITTEN = ".dummy_block_table"
"""A field that vLLM only hands to FlashMLA for its shape: nothing is ever written there."""
HOPPER = 90
"""Device family that the indexer's builder is made to see."""
SHIPPED_DEFECTS = frozenset({"attn.req_id_per_token"})
"""What vLLM 0.31 to 0.33 leaves as it was before the first draft step: the request map."""


@dataclass(frozen=True)
class V1Case(VllmCase):
    """A draft whose steps are padded to CUDA graphs of these `sizes`, if there are any.

    `batches` are arguments of `V1Draft.propose`; each is drafted for in a round.
    """

    sizes: tuple[int, ...] = (4,)
    batches: tuple[tuple[Any, ...], ...] = BATCHES


def draft(layout: str, tokens: int, *covers: str, name: str = "", **fields: Any) -> V1Case:
    """A draft of `tokens` tokens."""
    every = frozenset({"decode", "int32 lengths", draft_steps(tokens), *covers})
    name = f"{tokens} draft tokens, {layout}{name}"
    rounds = len(fields.get("batches", BATCHES))
    return V1Case(name, PATH, rounds, every, SHIPPED_DEFECTS, layout=layout, tokens=tokens, **fields)


CASES = (
    *(draft(layout, tokens, "padded rows") for tokens in (3, 2, 4, 8) for layout in LAYOUTS),
    draft("bf16", 4, "several captured sizes", "padded rows", name=", several sizes", sizes=(1, 2, 4)),
    draft("fp8 mixed", 4, name=", unpadded, with prefill, past the end", sizes=(), batches=MORE_BATCHES),
)
"""The first is the one in which errors are planted."""


class V1Session(Session):
    """A proposer."""

    def __init__(self, case: V1Case) -> None:
        self._case = case
        self.draft = V1Draft(*LAYOUTS[case.layout], case.tokens)
        self.draft.pad_to(case.sizes)
        self._seen: list[Step] = []

    def prepare(self, round: int) -> None:
        """Run the whole draft: vLLM has no place between preparing the steps and running them."""
        self._seen = proposals(self.draft, [self._case.batches[round]])

    def read(self) -> list[Values]:
        """Every field of the metadata that each draft step was handed."""
        return [
            {name: _as_tensor(name, value) for name, value in step.items() if name != ADDRESSES} for step in self._seen
        ]

    def buffers(self) -> list[Values]:
        """Positions and slots, which a piecewise CUDA graph reads; before the first draft where the proposer has them."""
        proposer = self.draft.proposer
        of_proposer = {"positions": proposer.positions, "slots": proposer._slot_mapping_buffer}
        return list(self.draft.model.handed[1:]) or [of_proposer] * (self._case.tokens - 1)

    def objects(self) -> Sequence[object]:
        """The proposer and the builders of its groups."""
        proposer = self.draft.proposer
        return [proposer, *(group.get_metadata_builder() for group in proposer.draft_attn_groups)]


def _as_tensor(name: str, value: Any) -> torch.Tensor:
    """A field as the kit compares it. What is no tensor becomes the bytes of its text, its type included."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value) if name.endswith(UNWRITTEN) else value
    return torch.tensor(list(f"{type(value).__name__} {value!r}".encode()), dtype=torch.uint8)


class V1Engine(VllmEngine):
    """The installed vLLM's Model Runner V1."""

    strategies: tuple[Strategy, ...] = ("copy",)
    tried = CASES
    batch_types = (CommonAttentionMetadata,)
    never_of_runner: ClassVar[Mapping[str, str]] = {
        "target verify": "the target's metadata is vLLM's own in this runner",
        "draft extend": "vLLM drafts its first token with the target's metadata",
        "batch size 0": "vLLM drafts for one request or more",
        "idle batch": "a rank without requests runs vLLM's dummy batch, which prepares no metadata for draft steps",
        "capture again": "the metadata of draft steps is in no CUDA graph, and what graphs read stays the proposer's",
    }

    def expected(self, case: Case) -> list[list[Values]]:
        """vLLM's own rebuild at every step, with its stale caches cleared."""
        assert isinstance(case, V1Case)
        session, rounds = V1Session(case), []
        with caches_cleared():
            for round in range(case.rounds):
                session.prepare(round)
                rounds.append(session.read())
        return rounds

    def start(self, case: Case) -> Session:
        """A proposer."""
        assert isinstance(case, V1Case)
        return V1Session(case)

    @contextlib.contextmanager
    def plant(self, working: int) -> Iterator[Fault]:
        """In both things that a draft step asks for: the batch moved on by a token, and its metadata."""
        fault, advance, metadata = Fault(working), DraftSteps.advance, DraftSteps.metadata

        def failing_advance(steps: DraftSteps, *arguments: Any) -> torch.Tensor:
            steps._slots.fill_(POISON)
            fault.call()
            return advance(steps, *arguments)

        def failing_metadata(steps: DraftSteps, *arguments: Any) -> tuple[list[Any], dict[str, Any]]:
            fault.call()
            return metadata(steps, *arguments)

        with mock.patch.multiple(DraftSteps, advance=failing_advance, metadata=failing_metadata):
            yield fault

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """With the indexer's branches for Hopper, so that DeepGEMM's schedule is among the values."""
        with super().running(), emulated_cuda(HOPPER):
            yield
