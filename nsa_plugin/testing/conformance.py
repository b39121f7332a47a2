"""The conformance kit: every line of the adapter contract, checked on an engine that a test describes.

    problems = conformance_problems(MyEngine())   # [] if the adapter conforms
    assert_conforms(MyEngine())

`nsa_plugin.testing.pytest_conformance.AdapterConformance` is the same as pytest tests, one per line. Nothing but this
package is needed. `examples/custom_adapter` walks through an adapter and its test.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from nsa_plugin.adapters.base import Strategy
from nsa_plugin.testing.contract import LINES
from nsa_plugin.testing.engine import Case, Engine, Session, Skipped, Values
from nsa_plugin.testing.watching import installed_adapter, restored


@dataclass
class Run:
    """What happened when a case was captured and replayed with one strategy.

    Attributes
    ----------
    case : Case
    strategy : str
    wrong : list of str
        Values that are not the engine's own, errors, fall-backs.
    moved : list of str
        Buffers whose address changed.
    described : list of (batch type, problem or "")
    """

    case: Case
    strategy: Strategy
    wrong: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    described: list[tuple[type, str]] = field(default_factory=list)


class Conformance:
    """The kit for one engine. What the engine's own code computes, and the runs of all cases, are made once."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def problems(self, line: str) -> list[str]:
        """What is wrong with one of `LINES`; raises `Skipped` if that can't be said here."""
        with self.engine.running(), restored(self.engine):
            try:
                return LINES[line](self)
            except Skipped:
                raise
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                return [f"the check broke off: {type(error).__name__}: {error} ({where.filename}:{where.lineno})"]

    @cached_property
    def expected(self) -> dict[str, list[list[Values]]]:
        """By name of case: what the engine's own code computes, round by round, for each consumer."""
        with restored(self.engine):
            return {case.name: self.engine.expected(case) for case in self.engine.cases()}

    @cached_property
    def runs(self) -> list[Run]:
        """Every case with every strategy."""
        _ = self.expected
        return [self._run(case, strategy) for case in self.engine.cases() for strategy in self.engine.strategies]

    def one_of_each_path(self) -> list[Case]:
        """The first case of each path; one with a single captured size, if there is one: it has a single plan."""
        by_sizes = sorted(self.engine.cases(), key=lambda case: "several captured sizes" in case.covers)
        return list({case.path: case for case in reversed(by_sizes)}.values())

    def differences(self, case: Case, round: int, read: Sequence[Values]) -> list[str]:
        """Values that are not the engine's own."""
        expected = self.expected[case.name][round]
        if len(read) != len(expected):
            return [f"round {round}: {len(read)} consumers, the engine's own code has {len(expected)}"]
        wrong = []
        for consumer, (want, have) in enumerate(zip(expected, read, strict=True)):
            names = sorted(
                name
                for name in want.keys() | have.keys()
                if name not in want or name not in have or not _equal(want[name], have[name])
            )
            wrong += [f"round {round}, consumer {consumer}: {name}" for name in names]
        return wrong

    def _run(self, case: Case, strategy: Strategy) -> Run:
        run = Run(case, strategy)
        with restored(self.engine), installed_adapter(self.engine, strategy) as (host, _):
            try:
                session = self.engine.start(case)
                buffers = _addresses(session)
                for round in range(case.rounds):
                    session.prepare(round)
                    run.wrong += self.differences(case, round, session.read())
                    if (now := _addresses(session)) != buffers:
                        run.moved += [f"round {round}: {name}" for name in _different(buffers, now)]
            except Exception as error:
                run.wrong.append(f"it raised {type(error).__name__}: {error}")
            run.wrong += [f"it fell back: {' '.join(cause)}" for cause in host.fallbacks]
            used = [how for path, how in host.served if path == case.path]
            if not any(how.split(",")[0].split(" ")[0] == strategy for how in used):
                run.wrong.append(
                    f"it does not serve {case.path!r} with this strategy: PathReport.using heard {host.served}"
                )
            run.described = host.described
        return run


def conformance_problems(engine: Engine, lines: Sequence[str] | None = None) -> list[str]:
    """Everything that is wrong with an adapter, as "line: problem"; lines that can't be checked here are left out.

    Parameters
    ----------
    engine : Engine
        The engine and its adapter.
    lines : sequence of str, optional
        Which of `LINES` to check; all by default.
    """
    kit, problems = Conformance(engine), []
    for line in LINES if lines is None else lines:
        try:
            problems += [f"{line}: {problem}" for problem in kit.problems(line)]
        except Skipped:
            continue
    return problems


def assert_conforms(engine: Engine, lines: Sequence[str] | None = None) -> None:
    """Raise `AssertionError` with everything that `conformance_problems` finds, if it finds anything."""
    if problems := conformance_problems(engine, lines):
        raise AssertionError(f"the adapter for {engine.name} does not conform:\n" + "\n".join(problems))


def _equal(want: torch.Tensor, have: torch.Tensor) -> bool:
    return want.dtype == have.dtype and torch.equal(want, have)


def _addresses(session: Session) -> list[dict[str, int]]:
    return [{name: tensor.data_ptr() for name, tensor in values.items()} for values in session.buffers()]


def _different(before: list[dict[str, int]], now: list[dict[str, int]]) -> list[str]:
    if len(before) != len(now):
        return [f"{len(now)} consumers instead of {len(before)}"]
    return [
        f"consumer {index}: {name}"
        for index, (then, values) in enumerate(zip(before, now, strict=True))
        for name in sorted(then.keys() | values.keys())
        if then.get(name) != values.get(name)
    ]
