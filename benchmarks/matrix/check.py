"""Runs the conformance kit in an engine's environment. The last line of the output is what it found, as JSON.

python -m benchmarks.matrix.check sglang [DenseEngine …]   # all fixtures by default
"""

from __future__ import annotations

import json
import logging
import pkgutil
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from nsa_plugin.rigs.interpreter import spare_overflow_checks
from nsa_plugin.testing.conformance import Conformance
from nsa_plugin.testing.contract import LINES
from nsa_plugin.testing.engine import Case, Skipped

FIXTURES = {
    "sglang": (
        "nsa_plugin.rigs.sglang.engine:SglangEngine",
        "nsa_plugin.rigs.sglang.dense_engine:DenseEngine",
        "nsa_plugin.rigs.sglang.recorded_engine:RecordedEngine",
    ),
    "vllm": (
        "nsa_plugin.rigs.vllm.v2_engine:V2Engine",
        "nsa_plugin.rigs.vllm.v1_engine:V1Engine",
        "nsa_plugin.rigs.vllm.v2_target_engine:TargetEngine",
        "nsa_plugin.rigs.vllm.v2_pooled_engine:PooledEngine",
        "nsa_plugin.rigs.vllm.dense_engine:DenseEngine",
    ),
}
"""What the kit runs on, for each engine. All but the first may need more than an old release has."""


def main(name: str, only: Sequence[str] = ()) -> dict[str, Any]:
    """Problems by line of the contract, wrong values by column and strategy, what is left out and why, and versions.

    `only` names fixtures: the classes of `FIXTURES`.

    Raises
    ------
    ValueError
        An engine has no such fixture.
    """
    known = tuple(map(short, FIXTURES[name]))
    if unknown := [fixture for fixture in only if fixture not in known]:
        raise ValueError(f"fixtures of {name}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    spare_overflow_checks()
    lines: dict[str, list[str]] = {line: [] for line in LINES}
    skipped: dict[str, str] = {}
    values: dict[str, dict[str, list[str]]] = {}
    left_out: dict[str, str] = {}
    for number, fixture in enumerate(FIXTURES[name]):
        if only and short(fixture) not in only:
            continue
        tried: Iterable[Case] = ()
        try:
            made = pkgutil.resolve_name(fixture)
            tried = getattr(made, "tried", ())
            engine = made()
        except (ImportError, AttributeError) as error:
            if not number:
                raise
            skipped[short(fixture)] = str(error)
            left_out |= dict.fromkeys(map(_column, tried), str(error))
            continue
        lacks: dict[str, str] = getattr(engine, "left_out", {})
        left_out = lacks | left_out
        if not engine.cases():
            skipped[short(fixture)] = "; ".join(dict.fromkeys(lacks.values()))
            continue
        logging.getLogger(engine.logger).propagate = False
        kit = Conformance(engine)
        covered = True
        for line in LINES:
            try:
                problems = kit.problems(line)
            except Skipped as reason:
                skipped[line] = "; ".join(dict.fromkeys(filter(None, (skipped.get(line), str(reason)))))
                continue
            lines[line] += [f"{type(engine).__name__}: {problem}" for problem in problems]
            covered &= line != "coverage" or not problems
        for run in kit.runs if covered else ():
            cell = values.setdefault(_column(run.case), {}).setdefault(run.strategy, [])
            cell += [f"{run.case.name}: {problem}" for problem in (*run.wrong, *run.moved)]
    found = {"lines": lines, "skipped": skipped, "values": values, "left out": left_out}
    return found | {"environment": _environment(name)}


def short(fixture: str) -> str:
    """The name of a fixture's class."""
    return fixture.rpartition(":")[2]


def _column(case: Case) -> str:
    """What the table has a case under."""
    column: str = getattr(case, "column", case.path)
    return column


def _environment(name: str) -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for distribution in (name, "torch", "triton", "transformers"):
        try:
            versions[distribution] = version(distribution)
        except PackageNotFoundError:
            continue
    return versions


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2:])))
