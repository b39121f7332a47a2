"""Verification of Model Runner V2's drafts whose graphs compute the metadata: each is compared after it has run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.adapters.vllm.v2 import step as v2_step
from nsa_plugin.adapters.vllm.v2.verified import rebuild as v2_rebuild
from nsa_plugin.host import Host
from nsa_plugin.rigs.vllm.drafts import BATCHES
from tests.vllm.drafts import LARGE, SOME, captured
from tests.vllm.test_v2_verification import LAYOUT, TOKENS, propose, stock, unequal

Install = Callable[..., tuple[Host, VllmAdapter]]
pytestmark = pytest.mark.usefixtures("hopper")


@pytest.mark.parametrize(("layout", "tokens"), SOME[:2])
def test_right_values_pass(install: Install, layout: str, tokens: int, compared: list[int]) -> None:
    expected = stock(layout, tokens)
    host, adapter = install(verify=1, verify_mode="graph")
    draft = captured(layout, tokens)
    assert unequal(expected, propose(draft)) == []
    assert compared == [len(batch[0]) for batch in BATCHES]
    for _ in range(2):  # larger than any captured batch: no graph runs it
        draft.propose(*LARGE)
    assert compared[len(BATCHES) :] == [len(LARGE[0])] * 2
    assert host.on and not host.mismatches and not host.fallbacks
    assert {key[-1] for key in host.verifications} == {"graph"}
    plans = {plan.path: plan for plan in adapter.paths(host)}
    assert plans["draft decode (Model Runner V2)"].strategy == "graph"


@pytest.mark.parametrize("step", range(TOKENS - 1))
def test_a_wrong_value_of_any_step_is_seen_after_the_draft(
    install: Install, monkeypatch: pytest.MonkeyPatch, step: int, log: Any, tmp_path: Path
) -> None:
    expected = stock()
    host, _ = install(verify=1, verify_mode="graph", repro_dir=tmp_path)
    draft, runs = captured(LAYOUT, TOKENS), [0]
    run = v2_step.Step.run

    def wrong(own: Any) -> None:
        run(own)
        if runs[0] == step:
            draft.tables.slot_mappings[0, 0] += 1
        runs[0] += 1

    monkeypatch.setattr(v2_step.Step, "run", wrong)
    propose(draft, BATCHES[:1])
    assert not host.on and {key[-1] for key in host.mismatches} == {"slot_mapping"}
    assert any("from the next batch on: this one was computed with the others" in line for line in log(logging.ERROR))
    assert len(list(tmp_path.iterdir())) == 1
    assert unequal(expected[3:], propose(draft, BATCHES[1:])) == []


def test_an_error_of_the_comparison_is_a_fall_back(
    install: Install, monkeypatch: pytest.MonkeyPatch, compared: list[int]
) -> None:
    expected = stock()
    host, _ = install(verify=1, verify_mode="graph")
    draft = captured(LAYOUT, TOKENS)

    def failing(*arguments: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr(v2_rebuild.Rebuild, "steps", failing)
    assert unequal(expected, propose(draft)) == []
    assert host.on and compared == [] and sum(host.fallbacks.values()) == 1
