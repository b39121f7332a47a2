"""Drafts that are not fused: every step as vLLM's own rebuild of all groups, with fewer launches, and right when it fails."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config

from nsa_plugin.adapters.vllm import builders, releases
from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.adapters.vllm.v2 import unfused as v2_unfused
from nsa_plugin.core import step_update
from nsa_plugin.host import Host
from nsa_plugin.rigs.vllm.drafts import BATCHES, LAYOUTS
from nsa_plugin.rigs.vllm.v2_draft import Draft
from tests.vllm.drafts import LARGE, POISONED, SOME, unequal_steps
from tests.vllm.test_builders import importable

Install = Callable[..., tuple[Host, VllmAdapter]]


def drafts(
    layout: str, tokens: int, attention: Any = None, batches: Any = (*BATCHES, LARGE)
) -> list[dict[str, torch.Tensor]]:
    """What each draft step of each batch saw, from poisoned buffers; the last batch is larger than any captured one."""
    draft = Draft(*LAYOUTS[layout], tokens, **({} if attention is None else {"attention": attention}))
    seen = []
    for lengths, rejected, first_block in batches:
        for builder in draft.builders:
            for name in POISONED:
                if hasattr(builder, name):
                    getattr(builder, name).fill_(3)
        draft.tables.slot_mappings.fill_(3)
        seen += draft.propose(lengths, [min(count, tokens) for count in rejected], first_block)
    assert not draft.fused
    assert isinstance(draft.speculator.attn_groups, list) and draft.speculator.block_tables is draft.tables
    assert not any(name in vars(draft.speculator) for name in releases.BUILDS)
    return seen


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[v2_unfused.KeptStep]:
    """The steps that were kept, in the order in which they ran."""
    found: list[v2_unfused.KeptStep] = []
    run = v2_unfused.KeptStep.run

    def counted(step: v2_unfused.KeptStep) -> None:
        found.append(step)
        run(step)

    monkeypatch.setattr(v2_unfused.KeptStep, "run", counted)
    return found


@pytest.mark.parametrize(("layout", "tokens"), SOME)
def test_every_step_equals_a_full_rebuild(
    install: Install, hopper: None, runs: list[v2_unfused.KeptStep], layout: str, tokens: int
) -> None:
    expected = drafts(layout, tokens)
    host, adapter = install("copy")
    got = drafts(layout, tokens)
    assert unequal_steps(expected, got) == set() and len(got) == (len(BATCHES) + 1) * (tokens - 1)
    assert len(runs) == (len(BATCHES) + 1) * (tokens - 2) and all(step.others == [] for step in runs)
    assert len(set(map(id, runs))) == (2 if tokens > 2 else 0) and not host.fallbacks  # captured, and larger
    adapter.undo()
    assert unequal_steps(expected, drafts(layout, tokens)) == set() and len(runs) == (len(BATCHES) + 1) * (tokens - 2)


def test_where_drafts_are_to_be_verified_these_are_left_to_vllm(
    install: Install, hopper: None, runs: list[v2_unfused.KeptStep], log: Callable[[int], list[str]]
) -> None:
    expected = drafts("bf16", 4)
    host, adapter = install("copy", verify=1)
    assert unequal_steps(expected, drafts("bf16", 4)) == set() and not runs
    assert f"nsa-plugin: {v2_unfused.PATH}: strategy off ({v2_unfused.UNVERIFIED})" in log(logging.INFO)
    (plan,) = (plan for plan in adapter.paths(host) if plan.path.startswith(v2_unfused.PATH))
    assert plan.strategy == "off" and plan.why == v2_unfused.UNVERIFIED


def dense() -> Any:
    """FLASHMLA's backend for dense MLA, whose scheduler object is a new one for every build."""
    sys.modules.setdefault("vllm._flashmla_C", ModuleType("vllm._flashmla_C"))  # compiled, and absent on a CPU
    importable("vllm.third_party.flashmla.flash_mla_interface")
    module = importable("vllm.v1.attention.backends.mla.flashmla")
    made = sys.modules["vllm.third_party.flashmla.flash_mla_interface"].get_mla_metadata
    module.get_mla_metadata = lambda *_, **__: made()
    return module.FlashMLABackend


@pytest.mark.parametrize("strategy", ["auto", "copy"])
def test_a_group_that_is_not_understood_is_rebuilt(
    install: Install, hopper: None, runs: list[v2_unfused.KeptStep], strategy: str, log: Callable[[int], list[str]]
) -> None:
    attention = dense()
    expected = drafts("bf16", 4, attention)
    host, _ = install(strategy)
    rebuilt: list[Any] = []
    builder = attention.get_builder_cls()
    build = builder.build

    def counted(*args: Any, **kwargs: Any) -> Any:
        rebuilt.append(build(*args, **kwargs))
        return rebuilt[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "build", counted)
        got = drafts("bf16", 4, attention)
    assert unequal_steps(expected, got) == set() and not host.fallbacks
    batches = len(BATCHES) + 1
    assert len(runs) == batches * 2 and {group.backend.get_name() for step in runs for group in step.others} == {
        "FLASHMLA"
    }
    assert len(rebuilt) == 1 + batches * 3  # the captured batch; every step of every batch
    assert "nsa-plugin: draft steps that are not fused: strategy copy" in log(logging.INFO)


def test_the_comparison_can_fail(install: Install, hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = drafts("bf16", 4)
    install("copy")
    monkeypatch.setattr(v2_unfused.KeptStep, "run", lambda step: None)
    assert {"slots", "indexer lengths", "schedule"} <= unequal_steps(expected, drafts("bf16", 4))


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_leaves_vllms_results_right(
    install: Install, hopper: None, monkeypatch: pytest.MonkeyPatch, failing: int, log: Callable[[int], list[str]]
) -> None:
    expected = drafts("fp8 separate", 4)
    host, _ = install("copy")
    calls = iter(range(100))
    run = step_update.StepUpdate.run

    def planted(update: Any, *, first: bool) -> None:
        if next(calls) == failing:
            raise RuntimeError("planted")
        run(update, first=first)

    monkeypatch.setattr(step_update.StepUpdate, "run", planted)
    assert unequal_steps(expected, drafts("fp8 separate", 4)) == set()
    assert list(host.fallbacks.items()) == [(("vllm", v2_unfused.PATH, "replay", "copy", "RuntimeError"), 1)]
    (line,) = log(logging.ERROR)
    assert "planted" in line and next(calls) == failing + 1


def test_an_error_when_the_steps_are_bound(install: Install, hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = drafts("bf16", 4)
    host, _ = install("copy")
    monkeypatch.setattr(v2_unfused, "places", lambda *_: 1 / 0)
    assert unequal_steps(expected, drafts("bf16", 4)) == set()
    assert sum(host.fallbacks.values()) == 1


def test_switching_off_and_on(install: Install, hopper: None, runs: list[v2_unfused.KeptStep]) -> None:
    host, _ = install("copy")
    host.switch(False, "test")
    drafts("bf16", 3, batches=BATCHES[:1])
    assert not runs
    host.switch(True, "test")
    drafts("bf16", 3, batches=BATCHES[:1])
    assert len(runs) == 1


def test_what_no_row_knows_is_left_to_vllm(
    install: Install,
    hopper: None,
    monkeypatch: pytest.MonkeyPatch,
    runs: list[v2_unfused.KeptStep],
    log: Callable[[int], list[str]],
) -> None:
    expected = drafts("bf16", 3)
    install("copy")
    monkeypatch.setattr(builders, "ROWS", {})
    assert unequal_steps(expected, drafts("bf16", 3)) == set() and not runs
    assert any("strategy off (no attention group that this update knows)" in line for line in log(logging.INFO))
    monkeypatch.setattr(releases, "uncovered_speculator", lambda speculator: "context parallelism is not covered")
    assert unequal_steps(expected, drafts("bf16", 3)) == set() and not runs
    assert any("strategy off (context parallelism is not covered)" in line for line in log(logging.INFO))


def test_groups_that_vllm_makes_anew_are_bound_anew(
    install: Install, hopper: None, runs: list[v2_unfused.KeptStep]
) -> None:
    attention = dense()
    expected = drafts("bf16", 3, attention, BATCHES[:1])
    install("copy")
    draft = Draft(*LAYOUTS["bf16"], 3, attention=attention)
    for _ in range(2):
        assert unequal_steps(expected, draft.propose(*BATCHES[0])) == set()
        with set_current_vllm_config(draft.config):
            draft.speculator.set_attn(None, draft.cache, draft.tables, draft.buffers, draft.groups)
            draft.speculator.decode_cudagraph_manager = draft.graphs = type(draft.graphs)(draft)
    first, second = runs
    assert first is not second and first.others[0] is not second.others[0]
