"""Off is off, whenever it is said, for the drafts of both model runners; and what an undo leaves behind."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
from vllm.config import set_current_vllm_config

from nsa_plugin.adapters.vllm import agreement
from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.adapters.vllm.v1 import steps as v1_steps
from nsa_plugin.adapters.vllm.v2 import switch as v2_switch
from nsa_plugin.adapters.vllm.v2 import updates as v2_updates
from nsa_plugin.core.step_update import StepUpdate
from nsa_plugin.host import Host
from nsa_plugin.rigs.vllm import v1_draft
from nsa_plugin.rigs.vllm.drafts import BATCHES
from nsa_plugin.rigs.vllm.v2_draft import Draft
from tests.storm import storm
from tests.vllm.drafts import LARGE, LAYOUT, TOKENS, Step, captured, proposals, unequal, unequal_steps

Install = Callable[..., tuple[Host, VllmAdapter]]
STORM_SECONDS = 4.0


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Everything of this plugin that computes a value of a draft, each time that it does."""
    ran: list[str] = []
    for owner, name in ((StepUpdate, "run"), (v1_steps.DraftSteps, "advance"), (v2_updates, "request_map")):
        monkeypatch.setattr(owner, name, _noted(ran, name, getattr(owner, name)))
    return ran


def _noted(ran: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        ran.append(name)
        return function(*args, **kwargs)

    return noted


@pytest.mark.parametrize("verify", [0, 2])
def test_off_before_the_start_nothing_of_ours_runs(
    install: Install, expected: list[Step], ours: list[str], verify: int
) -> None:
    host, _ = install(verify=verify, on=False)
    draft = captured()
    assert not draft.fused
    assert unequal(expected, proposals(draft)) == [] and ours == []
    assert host.switch(True, "test") == [
        "vllm: draft decode (Model Runner V2) was chosen while switched off: it takes a restart"
    ]
    assert unequal(expected, proposals(draft)) == []


def test_off_at_a_running_engine_captured_and_eager_drafts_are_vllms_own(
    install: Install, expected: list[Step], ours: list[str]
) -> None:
    """`proposals` has batches that fit the captured size, and one that does not."""
    host, _ = install()
    draft = captured()
    for on in (True, False, True, False):
        assert (host.switch(on, "test") == []) and host.on == on
        ours.clear()
        assert unequal(expected, proposals(draft)) == []
        assert bool(ours) == on


def test_a_rank_that_shares_its_draft_keeps_its_graph_and_says_so(
    install: Install, expected: list[Step], ours: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "sharing", lambda: [0, 1])
    monkeypatch.setattr(agreement, "_vote", lambda ranks, own: own)
    host, adapter = install()
    draft = captured()
    assert draft.fused
    began: list[str] = []

    def run_fullgraph(descriptor: Any) -> None:
        began.append("graph")
        draft.graphs.body()

    monkeypatch.setattr(draft.graphs, "run_fullgraph", run_fullgraph)
    (line,) = host.switch(False, "test")
    assert "other ranks share the draft; restart" in line
    ours.clear()
    assert unequal(expected, proposals(draft)) == []
    assert began == ["graph"] * len(BATCHES)
    draft.propose(*LARGE)
    assert began == ["graph"] * len(BATCHES), "a batch that fits no graph is drafted as vLLM does"
    adapter.undo()
    assert unequal(expected, proposals(draft)) == []


def test_after_an_undo_captured_eager_and_newly_captured_drafts_are_vllms_own(
    install: Install, expected: list[Step], ours: list[str], log: Any
) -> None:
    _, adapter = install()
    draft = captured()
    adapter.undo()
    ours.clear()
    assert unequal(expected, proposals(draft)) == [] and ours == []
    draft.warm_up()
    assert unequal(expected, proposals(draft)) == []


def test_after_an_undo_and_a_second_install_a_new_speculator_is_served(
    install: Install, expected: list[Step], ours: list[str]
) -> None:
    _, adapter = install()
    old = captured()
    adapter.undo()
    install()
    assert unequal(expected, proposals(old)) == []
    new = captured()
    ours.clear()
    assert new.fused and unequal(expected, proposals(new)) == [] and ours
    with set_current_vllm_config(old.config):
        old.speculator.set_attn(None, old.cache, old.tables, old.buffers, old.groups)
    assert old.fused and v2_switch.BEGIN not in vars(old.speculator)


@pytest.mark.parametrize("off_first", [True, False])
def test_v1_is_off_from_the_next_draft_on(ours: list[str], off_first: bool) -> None:
    """Whenever it was said, also before the proposer was made."""
    from nsa_plugin.adapters.vllm.ledger import v1_patches

    host, patch = Host(), v1_patches()
    if off_first:
        host.switch(False, "test")
    patch.install(host)
    try:
        draft = v1_draft.V1Draft("auto", 4, TOKENS)
        for on in (not off_first, off_first, not off_first):
            host.switch(on, "test")
            ours.clear()
            v1_draft.proposals(draft, BATCHES[:2])
            assert bool(ours) == on
    finally:
        patch.undo()


@pytest.mark.parametrize("verify", [0, 1])
def test_a_storm_of_switches_changes_no_value(install: Install, monkeypatch: pytest.MonkeyPatch, verify: int) -> None:
    """Through start, capture, replay, eager drafts and captures anew; every step of every draft is compared."""
    batches = [*BATCHES, LARGE]
    stock = Draft(*LAYOUT, TOKENS)
    want = [stock.propose(*batch) for batch in batches]
    host, _ = install(verify=verify)
    rng = random.Random(7)
    with storm(host) as meanwhile:
        deadline, drafts = time.monotonic() + STORM_SECONDS, 0
        while time.monotonic() < deadline or drafts < 10:
            draft = captured()
            for _ in range(8):
                index = rng.randrange(len(batches))
                seen = draft.propose(*batches[index])
                assert unequal_steps(want[index], seen) == set(), (index, drafts)
                drafts += 1
                if rng.random() < 0.2:
                    draft.warm_up()
    assert meanwhile.raised == [] and not host.fallbacks and not host.mismatches


@pytest.mark.usefixtures("hopper")
def test_a_storm_of_switches_over_v1() -> None:
    """Every field of every step is what vLLM's rebuild gives, or what vLLM gives by itself."""
    from nsa_plugin.adapters.vllm.ledger import v1_patches

    batches = BATCHES[:3]
    stock = v1_draft.proposals(v1_draft.V1Draft("auto", 4, TOKENS), batches)
    right = v1_draft.reference(v1_draft.V1Draft("auto", 4, TOKENS), batches)
    host, patch = Host(), v1_patches()
    patch.install(host)
    try:
        with storm(host) as meanwhile:
            deadline, turns = time.monotonic() + STORM_SECONDS, 0
            draft = v1_draft.V1Draft("auto", 4, TOKENS)
            while time.monotonic() < deadline or turns < 3:
                for step, seen in enumerate(v1_draft.proposals(draft, batches)):
                    wrong = set(v1_draft.differing(right[step], seen)) & set(v1_draft.differing(stock[step], seen))
                    assert wrong <= {"addresses that a CUDA graph reads"}
                turns += 1
        assert meanwhile.raised == [] and not host.fallbacks
    finally:
        patch.undo()
