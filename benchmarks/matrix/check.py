"""Runs the conformance kit in an engine's environment. The last line of the output is what it found, as JSON."""

from __future__ import annotations

import json
import logging
import pkgutil
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from nsa_plugin.rigs.interpreter import spare_overflow_checks
from nsa_plugin.testing.conformance import Conformance
from nsa_plugin.testing.contract import LINES
from nsa_plugin.testing.engine import Case, Skipped

FIXTURES = {
    "sglang": ("nsa_plugin.rigs.sglang.engine:SglangEngine",),
    "vllm": (
        "nsa_plugin.rigs.vllm.v2_engine:V2Engine",
        "nsa_plugin.rigs.vllm.v1_engine:V1Engine",
        "nsa_plugin.rigs.vllm.v2_target_engine:TargetEngine",
        "nsa_plugin.rigs.vllm.v2_pooled_engine:PooledEngine",
        "nsa_plugin.rigs.vllm.dense_engine:DenseEngine",
    ),
}
"""What the kit runs on, for each engine: vLLM has two model runners. All but the first may need more than an old release has."""


def main(name: str) -> dict[str, Any]:
    """Problems by line of the contract, wrong values by column and strategy, what is left out and why, and versions."""
    spare_overflow_checks()
    lines: dict[str, list[str]] = {line: [] for line in LINES}
    skipped: dict[str, str] = {}
    values: dict[str, dict[str, list[str]]] = {}
    left_out: dict[str, str] = {}
    for number, fixture in enumerate(FIXTURES[name]):
        tried: Iterable[Case] = ()
        try:
            made = pkgutil.resolve_name(fixture)
            tried = getattr(made, "tried", ())
            engine = made()
        except (ImportError, AttributeError) as error:
            if not number:
                raise
            skipped[fixture.rpartition(":")[2]] = str(error)
            left_out |= dict.fromkeys(map(_column, tried), str(error))
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
        left_out |= getattr(engine, "left_out", {})
        for run in kit.runs if covered else ():
            cell = values.setdefault(_column(run.case), {}).setdefault(run.strategy, [])
            cell += [f"{run.case.name}: {problem}" for problem in (*run.wrong, *run.moved)]
    found = {"lines": lines, "skipped": skipped, "values": values, "left out": left_out}
    return found | {"environment": _environment(name)}


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
    print(json.dumps(main(sys.argv[1])))
