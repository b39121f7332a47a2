"""The real vLLM as the conformance kit sees it: the fused multi-step draft of Model Runner V2's real speculator."""

from __future__ import annotations

import contextlib
import logging
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from nsa_plugin.adapters.base import Strategy
from nsa_plugin.adapters.probe import missing
from nsa_plugin.adapters.vllm import releases
from nsa_plugin.adapters.vllm.adapter import v2_parts
from nsa_plugin.adapters.vllm.describe import DraftBatch
from nsa_plugin.adapters.vllm.v2 import choice as v2_choice
from nsa_plugin.adapters.vllm.v2 import step as v2_step
from nsa_plugin.adapters.vllm.v2 import updates as v2_builder
from nsa_plugin.adapters.vllm.v2.target import hooks as v2_target
from nsa_plugin.rigs.vllm.v2_draft import Draft
from nsa_plugin.testing.engine import Case, Engine, Fault, Obstacle, Session, Values, without

LAYOUTS = {"bf16": ("auto", 4), "fp8 mixed": ("fp8_ds_mla", 4), "fp8 separate": ("fp8_ds_mla", 64)}
BATCHES = (
    ([100, 107, 126, 65], [1, 0, 2, 2], 1),
    ([63, 64, 700], [0, 0, 0], 70),  # padded to the captured size
    ([300], [1], 140),
    ([1000, 1022, 1024, 12], [0, 1, 0, 2], 7),  # at the model's maximal length
)
"""Lengths, rejected tokens and the first KV block of each request."""
POISON = 3


@dataclass(frozen=True)
class VllmCase(Case):
    """A draft of `tokens` tokens, the first of which comes with the target's metadata."""

    layout: str = "bf16"
    tokens: int = 2


def draft(layout: str, tokens: int) -> VllmCase:
    """The first step of a draft needs no metadata of its own."""
    steps = "one step" if tokens == 2 else "several steps"
    covers = frozenset({"decode", "padded rows", "int32 lengths", steps})
    return VllmCase(
        f"{tokens} draft tokens, {layout}", "draft decode", len(BATCHES), covers, layout=layout, tokens=tokens
    )


CASES = tuple(draft(layout, tokens) for tokens in (3, 2, 4, 8) for layout in LAYOUTS)


class VllmSession(Session):
    """A speculator that has captured its draft."""

    def __init__(self, case: VllmCase) -> None:
        self.draft = Draft(*LAYOUTS[case.layout], case.tokens)
        self._tokens = case.tokens
        self._seen: list[Values] = []
        for builder in self.draft.builders:  # what the graph has recorded stays, whatever the class has later
            vars(builder)[v2_builder.METHOD] = getattr(builder, v2_builder.METHOD)
        speculator: Any = self.draft.speculator
        for name in (v2_step.GENERATE, v2_step.UPDATE):
            if hasattr(speculator, name):
                setattr(speculator, name, getattr(speculator, name))

    def prepare(self, round: int) -> None:
        """Run the whole draft: vLLM has no place between preparing and replaying. What nobody updates is poison."""
        for builder in self.draft.builders:
            if hasattr(builder, "req_id_per_token_buffer"):
                builder.req_id_per_token_buffer.fill_(POISON)
        lengths, rejected, first_block = BATCHES[round]
        self._seen = list(self.draft.propose(lengths, [min(count, self._tokens) for count in rejected], first_block))

    def read(self) -> list[Values]:
        """What each draft step saw."""
        return self._seen

    def buffers(self) -> list[Values]:
        """The tensors of the metadata that was captured."""
        captured = self.draft.speculator.decode_cudagraph_manager._metadata
        return [
            {name: value for name, value in vars(metadata).items() if isinstance(value, torch.Tensor)}
            for metadata in captured.values()
        ]

    def objects(self) -> Sequence[object]:
        """The speculator and the builders of its groups."""
        return [self.draft.speculator, *self.draft.builders]


class VllmEngine(Engine):
    """The installed vLLM, on CPU tensors."""

    name = "vllm"
    package = "vllm"
    logger = "vllm.plugins.nsa_plugin"
    entry_point = "nsa_plugin.entry:register_vllm"
    strategies: tuple[Strategy, ...] = ("graph",)
    batch_types = (DraftBatch,)
    never: Mapping[str, str] = {
        "target verify": "vLLM prepares the target's metadata once per round: there is nothing to share",
        "draft extend": "vLLM drafts its first token with the target's metadata",
        "batch size 0": "graphs are captured for one request or more",
        "idle batch": "a rank without requests runs vLLM's dummy batch, which the speculator does not draft for",
        "int64 lengths": "the runner's lengths are int32",
        "strided inputs": "the runner's buffers are contiguous",
        "several captured sizes": "the emulated graph has one size, to which smaller batches are padded",
        "capture again": "vLLM captures the graphs of a speculator once",
    }

    def cases(self) -> Sequence[VllmCase]:
        """2 to 8 draft tokens, with a bf16 cache and both layouts of an fp8 cache."""
        return CASES

    def expected(self, case: Case) -> list[list[Values]]:
        """vLLM's own rebuild of every group's metadata at every step."""
        assert isinstance(case, VllmCase)
        session, rounds = VllmSession(case), []
        assert not session.draft.fused, "this vLLM does not rebuild: no reference"
        for round in range(case.rounds):
            session.prepare(round)
            rounds.append(session.read())
        return rounds

    def start(self, case: Case) -> Session:
        """A speculator whose draft is captured."""
        assert isinstance(case, VllmCase)
        return VllmSession(case)

    def patched(self) -> Sequence[object]:
        """The builder that learns to update its metadata, the speculator, Model Runner V1's proposer, and around the target."""
        owners = [releases.BUILDER, releases.INDEXER, releases.speculator(), releases.V1_PROPOSER]
        owners += [] if missing(v2_target.needs()) else v2_target.OWNERS.values()
        return [pkgutil.resolve_name(owner) for owner in owners]

    def obstacles(self) -> Sequence[Obstacle]:
        """Each need in turn, and an installation that breaks off."""
        absent = [
            Obstacle(need.path.rpartition(".")[2], without(need.path))
            for need in dict.fromkeys(need for part in v2_parts() for need in part.needs)
        ]
        broken = mock.patch.object(v2_choice, "hooks", side_effect=RuntimeError("planted"))
        return [*absent, Obstacle("the update can't be made", broken, probed=False)]

    @contextlib.contextmanager
    def plant(self, working: int) -> Iterator[Fault]:
        """In the one-kernel step, and in the function that the builder's update calls; vLLM's own builders keep it."""
        fault, real = Fault(working), v2_builder._vllms_request_map() or v2_builder.request_map

        def failing(query_start_loc: torch.Tensor, out: torch.Tensor, tokens: int) -> None:
            out.fill_(POISON)
            fault.call()
            real(query_start_loc, out, tokens)

        run = v2_step.Step.run

        def failing_step(step: v2_step.Step) -> None:
            fault.call()
            run(step)

        with (
            mock.patch.object(v2_builder, "_vllms_request_map", lambda: failing),
            mock.patch.object(v2_step.Step, "run", failing_step),
        ):
            yield fault

    def running(self) -> AbstractContextManager[object]:
        """With vLLM's own logging as it is in production."""
        logging.getLogger("vllm").propagate = False
        return contextlib.nullcontext()

    @property
    def device(self) -> torch.device:
        """The harness is CPU only."""
        return torch.device("cpu")
