"""Other plugins that wrap or replace the methods that ours patches, before or after it."""

from __future__ import annotations

import functools
import importlib
import logging
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nsa_plugin.adapters.vllm import releases
from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.adapters.vllm.v1 import proposer as v1_proposer
from nsa_plugin.adapters.vllm.v2 import step as v2_step
from nsa_plugin.adapters.vllm.v2 import updates as v2_updates
from nsa_plugin.core.kernels import draft_steps
from nsa_plugin.host import Host
from nsa_plugin.rigs.vllm import v1_draft
from nsa_plugin.rigs.vllm.v2_draft import Draft
from nsa_plugin.rigs.vllm.v2_engine import V2Engine
from nsa_plugin.testing.watching import restored
from tests.vllm.drafts import FIRST_IS_REBUILT, LAYOUT, TOKENS, Step, assert_same, proposals, unequal

Install = Callable[..., tuple[Host, VllmAdapter]]


class Wrapper:
    """Another plugin, which counts the calls of one method, and then passes them on."""

    def __init__(self, owner: str, name: str) -> None:
        self.owner, self.name, self.calls = pkgutil.resolve_name(owner), name, 0
        inner: Any = getattr(self.owner, name, None)

        @functools.wraps(inner)
        def counted(*arguments: Any, **keywords: Any) -> Any:
            self.calls += 1
            return inner(*arguments, **keywords)

        self.method = counted
        setattr(self.owner, name, counted)


CHOOSE = releases.CHOOSE[releases.speculator()]
WRAPPED = [(releases.speculator(), CHOOSE), (releases.BUILDER, v2_updates.METHOD),
           (releases.speculator(), v2_step.GENERATE), (releases.speculator(), v2_step.UPDATE_STEP)]  # fmt: skip


@pytest.mark.parametrize("before_us", [True, False])
@pytest.mark.parametrize(("owner", "name"), WRAPPED[: -1 if FIRST_IS_REBUILT else None])
def test_another_plugin_wraps_a_method_of_v2(
    install: Install, log: Any, expected: list[Step], owner: str, name: str, before_us: bool
) -> None:
    """Both work: where ours would leave theirs out, that step is vLLM's, and theirs. An undo does not take theirs away."""
    with restored(V2Engine()):
        if before_us:
            other = Wrapper(owner, name)
        host, adapter = install("graph")
        if not before_us:
            other = Wrapper(owner, name)
        draft = Draft(*LAYOUT, TOKENS)
        other.calls *= name == CHOOSE  # called when the draft is made
        assert unequal(expected, proposals(draft)) == [] and not host.fallbacks
        fused = not (before_us and name == v2_updates.METHOD)  # theirs does not say that it may be used
        assert draft.fused == fused
        assert bool(other.calls) == fused
        left_out = [line for line in log(logging.INFO) if "draft step: strategy off (" in line]
        assert len(left_out) == (name == v2_step.UPDATE_STEP) and all(name in line for line in left_out)
        adapter.undo()
        assert vars(other.owner)[name] is other.method
        assert_named_once(log, name, before_us)
        draft = Draft(*LAYOUT, TOKENS)
        assert unequal(expected, proposals(draft)) == [] and not draft.fused


def test_the_probe_of_the_end_to_end_example_has_no_effect(
    install: Install, log: Any, expected: list[Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks" / "end_to_end" / "probe"))
    host_times, probe = importlib.import_module("host_times"), importlib.import_module("vllm_times")
    host, _ = install("graph")
    with monkeypatch.context() as patch:
        for owner, name, label in probe.TARGETS:
            cls = pkgutil.resolve_name(owner)
            patch.setattr(cls, name, getattr(cls, name))  # so that it is put back
            host_times.measure(cls, name, label)
        draft = Draft(*LAYOUT, TOKENS)
        assert unequal(expected, proposals(draft)) == [] and draft.fused and not host.fallbacks
    assert host_times.times["draft"] and not [line for line in log(logging.INFO) if "strategy off" in line]


@pytest.mark.parametrize("before_us", [True, False])
@pytest.mark.parametrize("name", [v1_proposer.UPDATE, v1_proposer.BUILD])
def test_another_plugin_wraps_a_method_of_v1(
    install: Install, monkeypatch: pytest.MonkeyPatch, log: Any, hopper: None, name: str, before_us: bool
) -> None:
    draft = v1_draft.V1Draft("auto", 4, TOKENS)
    want = v1_draft.reference(draft)
    with restored(V2Engine()):
        if before_us:
            other = Wrapper(releases.V1_PROPOSER, name)
        host, adapter = install("copy")
        if not before_us:
            other = Wrapper(releases.V1_PROPOSER, name)
        assert_same(want, v1_draft.proposals(draft))
        assert other.calls >= len(want) and not host.fallbacks
        left_out = [line for line in log(logging.INFO) if f"{name} was patched by {__name__})" in line]
        assert len(left_out) == before_us
        adapter.undo()
        assert vars(other.owner)[name] is other.method
        assert_named_once(log, name, before_us)
        monkeypatch.setattr(v1_proposer, "DraftSteps", None)
        monkeypatch.delattr(draft_steps, "draft_steps_kernel")
        assert_same(want, v1_draft.reference(draft))
        assert not host.fallbacks


def assert_named_once(log: Any, name: str, before_us: bool) -> None:
    """The undo says that it leaves somebody else's method in place, if it does."""
    lines = log(logging.WARNING)
    assert len(lines) == (not before_us)
    assert all(f"{name} was patched by somebody else too" in line and "undo theirs first" in line for line in lines)


@pytest.mark.skipif(FIRST_IS_REBUILT, reason="this vLLM's loop asks each group itself")
def test_a_later_plugin_that_replaces_the_update_of_a_step(install: Install, expected: list[Step]) -> None:
    """It never calls ours: no slots may be waiting for that."""
    host, _ = install()
    stock = pkgutil.resolve_name(releases.speculator()).__mro__[1].__dict__[v2_step.UPDATE_STEP]
    with restored(V2Engine()):
        setattr(pkgutil.resolve_name(releases.speculator()), v2_step.UPDATE_STEP, lambda *arguments: stock(*arguments))
        assert unequal(expected, proposals(Draft(*LAYOUT, TOKENS))) == [] and not host.fallbacks
