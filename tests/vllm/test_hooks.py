"""What a third party's plugin provides is used by vLLM's drafts, and what it observes is what vLLM drafted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from vllm.v1.attention.backend import CommonAttentionMetadata

from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.adapters.vllm.describe import DraftBatch, describe, describe_draft
from nsa_plugin.adapters.vllm.ledger import v1_patches
from nsa_plugin.adapters.vllm.v1 import proposer as v1_proposer
from nsa_plugin.adapters.vllm.v2 import step as v2_step
from nsa_plugin.adapters.vllm.v2 import unfused
from nsa_plugin.core.batch import BatchDescriptor
from nsa_plugin.core.draft_steps import DraftLimits, DraftStep, FillDraftSteps, bind_draft_steps
from nsa_plugin.core.step_update import StepUpdate
from nsa_plugin.hookspec import hookimpl
from nsa_plugin.host import Host
from nsa_plugin.rigs.vllm import v1_draft
from nsa_plugin.rigs.vllm.drafts import BATCHES, BLOCK_SIZE
from nsa_plugin.rigs.vllm.v2_draft import CAPTURED, Draft
from tests.vllm.drafts import FIRST_IS_REBUILT, LAYOUT, TOKENS, Step, assert_same, proposals, unequal

Install = Callable[..., tuple[Host, VllmAdapter]]
BROKEN = RuntimeError("planted")


class ThirdParty:
    """Provides everything, by the package's own means, and writes down what it was asked and shown."""

    def __init__(self) -> None:
        self.bound: list[str] = []
        self.ran: list[str] = []
        self.described: list[type] = []
        self.seen: list[tuple[str, str, BatchDescriptor, list[int]]] = []
        self.broken = ""

    def _use(self, name: str) -> None:
        self.ran.append(name)
        if name == self.broken:
            raise BROKEN

    @hookimpl
    def nsa_plugin_bind_step_update(
        self, rows: Any, slots: Any, request_maps: Any, indexers: Any
    ) -> Callable[[bool], None]:
        self.bound.append("step update")
        own = StepUpdate(rows, slots, request_maps, indexers, impl="reference")

        def update(first: bool) -> None:
            self._use("step update")
            own.run(first=first)

        return update

    @hookimpl
    def nsa_plugin_bind_draft_steps(self, steps: Sequence[DraftStep], limits: DraftLimits) -> FillDraftSteps:
        self.bound.append("draft steps")
        own = bind_draft_steps(steps, limits, impl="reference")

        def fill(*batch: Any) -> None:
            self._use("draft steps")
            own(*batch)

        return fill

    @hookimpl
    def nsa_plugin_describe(self, engine: str, batch: object) -> Callable[[Any], BatchDescriptor]:
        assert engine == "vllm"
        block_size = BLOCK_SIZE

        def described(live: Any) -> BatchDescriptor:
            self.described.append(type(live))
            padded = isinstance(live, DraftBatch) and live.num_reqs == CAPTURED
            self._use("describe" if padded else "describe without padding")
            if isinstance(live, DraftBatch):
                return describe_draft(live)
            return describe(live, block_size=block_size, draft_steps=TOKENS - 1)

        return described

    @hookimpl
    def nsa_plugin_observe_replays(
        self, engine: str, path: str, strategy: str, batch: BatchDescriptor
    ) -> Callable[[BatchDescriptor], None]:
        assert engine == "vllm" and batch.num_steps == TOKENS - 1
        return lambda live: self.seen.append((path, strategy, live, live.seq_lens[: live.batch_size].tolist()))


@pytest.fixture
def third_party() -> ThirdParty:
    return ThirdParty()


@pytest.fixture
def v1(third_party: ThirdParty) -> Iterator[Callable[[], Host]]:
    """Patches Model Runner V1's proposer, with the third party's plugin; undoes it after the test."""
    patch = v1_patches()

    def install() -> Host:
        host = Host()
        host.manager.register(third_party)
        patch.install(host)
        return host

    yield install
    patch.undo()


def test_a_fused_draft_uses_what_is_provided(install: Install, third_party: ThirdParty, expected: list[Step]) -> None:
    host, _ = install("auto", third_party)
    draft = Draft(*LAYOUT, TOKENS)
    assert draft.fused
    assert unequal(expected, proposals(draft)) == []
    assert third_party.bound and set(third_party.bound) == {"step update"}
    assert third_party.ran.count("step update") >= 2 and not host.fallbacks
    assert set(third_party.described) == {DraftBatch}


@pytest.mark.skipif(FIRST_IS_REBUILT, reason="these releases have another method for the start of a fused draft")
def test_a_fused_draft_is_observed_after_each_replay(
    install: Install, third_party: ThirdParty, monkeypatch: pytest.MonkeyPatch, hopper: None
) -> None:
    install("auto", third_party)
    draft = Draft(*LAYOUT, TOKENS)
    third_party.seen.clear()
    lengths: list[list[int]] = []
    begin = type(draft.speculator).on_multi_step_decode_begin

    def remember(speculator: Any, num_reqs: int) -> None:
        lengths.append(speculator.input_buffers.seq_lens[:num_reqs].tolist())
        begin(speculator, num_reqs)

    monkeypatch.setattr(type(draft.speculator), "on_multi_step_decode_begin", remember)
    for requests in ([100, 107, 126, 65], [63, 64]):
        draft.propose(requests, [0] * len(requests), 1)
    assert [(path, strategy, live.batch_size) for path, strategy, live, _ in third_party.seen] == [
        (v2_step.PATH, "graph", 4), (v2_step.PATH, "graph", 2),
    ]  # fmt: skip
    assert third_party.seen[0][2].seq_lens is draft.speculator.input_buffers.seq_lens


def test_a_describe_that_fails_after_a_draft_ends_its_observation(
    install: Install, third_party: ThirdParty, log: Callable[[int], list[str]], hopper: None
) -> None:
    host, _ = install("auto", third_party)
    draft = Draft(*LAYOUT, TOKENS)
    third_party.seen.clear()
    third_party.broken = "describe without padding"
    draft.propose([100, 107], [0] * 2, 1)
    assert third_party.seen == [] and not host.fallbacks
    assert len([line for line in log(logging.ERROR) if "could not be described for observers" in line]) == 1


@pytest.mark.parametrize("broken", ["describe", "step update"])
def test_a_plugin_that_fails_leaves_the_draft_to_vllm(
    install: Install, third_party: ThirdParty, expected: list[Step], broken: str
) -> None:
    third_party.broken = broken
    host, _ = install("auto", third_party)
    assert unequal(expected, proposals(Draft(*LAYOUT, TOKENS))) == []
    assert {key[1:4] for key in host.fallbacks} == {(v2_step.PATH, "capture", "graph")}


def test_a_draft_that_is_not_fused_uses_what_is_provided_and_is_observed(
    install: Install, third_party: ThirdParty, hopper: None
) -> None:
    install("copy", third_party)
    draft = Draft(*LAYOUT, TOKENS)
    assert not draft.fused
    draft.propose([100, 107, 126, 65], [0] * 4, 1)
    assert third_party.ran.count("step update") == TOKENS - 2
    assert [(path, strategy, live.batch_size) for path, strategy, live, _ in third_party.seen] == [
        (unfused.PATH, "copy", 4)
    ]


def test_model_runner_v1_uses_what_is_provided_and_is_observed(third_party: ThirdParty, v1: Callable[[], Host]) -> None:
    draft = v1_draft.V1Draft("auto", 4, TOKENS)
    want = v1_draft.reference(draft, BATCHES[:2])
    host = v1()
    assert_same(want, v1_draft.proposals(draft, BATCHES[:2]))
    assert third_party.bound == ["draft steps"] and third_party.ran.count("draft steps") == 2
    assert set(third_party.described) == {CommonAttentionMetadata}
    assert [(path, strategy, live.batch_size) for path, strategy, live, _ in third_party.seen] == [
        (v1_proposer.PATH, "copy", len(lengths)) for lengths, *_ in BATCHES[:2]
    ]
    assert not host.fallbacks


@pytest.mark.parametrize("broken", ["describe without padding", "draft steps"])
def test_a_plugin_that_fails_leaves_drafts_of_model_runner_v1_to_vllm(
    third_party: ThirdParty, v1: Callable[[], Host], broken: str
) -> None:
    draft = v1_draft.V1Draft("auto", 4, TOKENS)
    want = v1_draft.reference(draft, BATCHES[:2])
    third_party.broken = broken
    host = v1()
    assert_same(want, v1_draft.proposals(draft, BATCHES[:2]))
    assert {key[1:4] for key in host.fallbacks} == {(v1_proposer.PATH, "replay", "copy")}
