"""The kit passes the example's adapter and catches, for each line of the contract, adapters that break it."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from nsa_plugin.testing.conformance import Conformance, assert_conforms, conformance_problems
from nsa_plugin.testing.contract import LINES
from nsa_plugin.testing.engine import Case, Skipped
from nsa_plugin.testing.pytest_conformance import AdapterConformance

for folder in ("examples/custom_adapter", "tests/plugin"):
    sys.path.insert(0, str(Path(__file__).parents[2] / folder))

import toy_engine  # noqa: E402
from tests.plugin import broken_lasting  # noqa: E402
from tests.plugin.broken_adapters import (  # noqa: E402
    BROKEN,
    REGISTRY,
    LeavesAnEntry,
    UndoesHalf,
    allocates,
    preparing,
    syncs,
)
from toy_adapter import NEEDS, ToyAdapter  # noqa: E402
from toy_conformance import CASES, ToyEngine  # noqa: E402


def test_the_example_conforms() -> None:
    assert_conforms(ToyEngine())


def test_the_mixin_has_a_test_for_each_line() -> None:
    source = inspect.getsource(AdapterConformance)
    assert [line for line in LINES if f'_require(conformance, "{line}")' not in source] == []


def test_a_mixin_without_its_fixture_says_what_is_missing() -> None:
    with pytest.raises(NotImplementedError, match="must have a fixture 'engine'"):
        AdapterConformance.__dict__["engine"].__wrapped__.__get__(None, AdapterConformance)()


ALL = [*BROKEN, *broken_lasting.BROKEN]


@pytest.mark.parametrize(("line", "adapter", "said"), ALL, ids=[f"{line}-{said}" for line, _, said in ALL])
def test_a_broken_adapter_is_caught(line: str, adapter: type[ToyAdapter], said: str) -> None:
    before = dict(vars(toy_engine.Forward))
    problems = conformance_problems(ToyEngine(adapter), [line])
    assert any(problem.startswith(f"{line}: ") and said in problem for problem in problems), problems
    assert dict(vars(toy_engine.Forward)) == before, "the kit itself leaves the engine as it was"


def test_what_an_engine_keeps_elsewhere_counts_too() -> None:
    problems = conformance_problems(ToyEngine(LeavesAnEntry, state=lambda: list(REGISTRY)), ["install", "undo"])
    assert any("prepare: something is patched all the same" in problem for problem in problems)
    assert any("a second install() is not without effect" in problem for problem in problems)
    assert any("Engine.state() is not what it was" in problem for problem in problems)


def test_assert_conforms_says_everything() -> None:
    with pytest.raises(AssertionError, match="toy does not conform:\nundo: share: capture is not what it was"):
        assert_conforms(ToyEngine(UndoesHalf), ["undo"])


@pytest.mark.parametrize(
    ("entry_point", "said"),
    [
        ("broken_registers:raises", "unknown strategy: it raised SettingError"),
        ("broken_registers:says_nothing", "by default: one line of the log"),
        ("broken_registers:says_two_lines", "by default: one line of the log"),
        ("broken_registers:ignores_the_switch", "switched off: the engine is patched"),
        ("eager_register:register", "imported without being asked: toy_engine"),
    ],
)
def test_a_broken_entry_point_is_caught(entry_point: str, said: str) -> None:
    problems = conformance_problems(ToyEngine(entry_point=entry_point), ["register"])
    assert any(said in problem for problem in problems), problems


def test_a_release_with_other_parameters_is_named() -> None:
    with mock.patch.object(toy_engine.Forward, "prepare", lambda self, requests: None):
        (problem,) = ToyAdapter().probe()
    assert problem.startswith(f"looked for {NEEDS[1].path}(batch)") and "without batch" in problem


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cases": lambda: CASES[:1]}, "no case covers 'several steps'"),
        ({"never": {}}, "no case covers 'draft extend'"),
        ({"cases": lambda: (*CASES, CASES[0])}, "two cases are called"),
        (
            {"cases": lambda: (Case("x", "draft decode", 0, frozenset({"naps"})),), "expected": lambda case: []},
            "'naps'",
        ),
        ({"expected": lambda case: [[{}]] * case.rounds}, "gave no values"),
        ({"expected": lambda case: []}, "gave 0 rounds, not 4"),
        ({"obstacles": list}, "names nothing that the probe must see"),
    ],
)
def test_a_fixture_that_proves_nothing_is_caught(changes: dict[str, Any], said: str) -> None:
    problems = conformance_problems(ToyEngine(**changes), ["coverage"])
    assert any(said in problem for problem in problems), problems


@pytest.mark.gpu
@pytest.mark.parametrize(("run", "said"), [(allocates, "bytes are allocated"), (syncs, "synchroniz")])
def test_what_only_a_gpu_shows_is_caught(run: Any, said: str) -> None:
    problems = conformance_problems(ToyEngine(preparing(run=run)), ["replays"])
    assert any(said in problem for problem in problems), problems


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_what_only_a_gpu_shows_is_skipped_with_a_reason() -> None:
    with pytest.raises(Skipped, match="CUDA device only"):
        Conformance(ToyEngine()).problems("replays")
