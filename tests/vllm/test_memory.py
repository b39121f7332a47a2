"""What belongs to a speculator or a proposer of vLLM goes with it: nothing of this plugin keeps it, or what it holds, alive."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.host import Host
from nsa_plugin.rigs.vllm import v1_draft
from nsa_plugin.rigs.vllm.drafts import BATCHES
from nsa_plugin.rigs.vllm.v2_draft import Draft
from nsa_plugin.testing.lasting import live_bytes
from tests.vllm.drafts import LARGE, LAYOUT, TOKENS

Install = Callable[..., tuple[Host, VllmAdapter]]
pytestmark = pytest.mark.usefixtures("hopper")
TIMES = 5


def v2(captures: int) -> Any:
    """A speculator that has drafted, after so many captures."""
    draft = Draft(*LAYOUT, TOKENS)
    for _ in range(captures):
        draft.warm_up()
    for batch in (*BATCHES[:2], LARGE):
        draft.propose(*batch)
    return draft.speculator


def v1(captures: int) -> Any:
    """A proposer that has drafted."""
    draft = v1_draft.V1Draft(*LAYOUT, TOKENS)
    v1_draft.proposals(draft, BATCHES[:2] * captures)
    return draft.proposer


@pytest.mark.parametrize("verify", [0, 1])
@pytest.mark.parametrize("make", [v2, v1])
def test_they_come_and_go_and_memory_is_flat(install: Install, make: Callable[[int], Any], verify: int) -> None:
    install(verify=verify)
    gone, held = [], []
    for _ in range(TIMES):
        gone.append(weakref.ref(make(3)))
        held.append(live_bytes())
    assert all(reference() is None for reference in gone)
    assert held[-1] <= held[1] + 4096, held


@pytest.mark.parametrize("verify", [0, 1])
def test_memory_is_flat_over_captures(install: Install, verify: int) -> None:
    install(verify=verify)
    draft = Draft(*LAYOUT, TOKENS)
    held = []
    for number in range(50):
        draft.warm_up()
        if number in (2, 49):
            draft.propose(*BATCHES[0])
            held.append(live_bytes())
    assert held[1] <= held[0] + 4096, held


@pytest.mark.parametrize("mode", ["before", "graph"])
def test_graphs_that_vllm_drops_are_not_kept(install: Install, mode: str) -> None:
    """vLLM captures drafts to measure their memory, drops those graphs, and captures again."""
    install(verify=1, verify_mode=mode)
    draft = Draft(*LAYOUT, TOKENS)
    draft.warm_up()
    dropped = weakref.ref(draft.speculator.prefill_cudagraph_manager)
    draft.speculator.prefill_cudagraph_manager = None
    gc.collect()
    assert dropped() is None
