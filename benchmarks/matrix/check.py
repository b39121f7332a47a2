"""Runs the conformance kit in an engine's environment. The last line of the output is what it found, as JSON."""

from __future__ import annotations

import json
import logging
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from nsa_plugin.testing.conformance import Conformance
from nsa_plugin.testing.contract import LINES
from nsa_plugin.testing.engine import Skipped

FIXTURES = {
    "sglang": ("nsa_plugin.rigs.sglang.engine:SglangEngine",),
    "vllm": ("nsa_plugin.rigs.vllm.v2_engine:VllmEngine", "nsa_plugin.rigs.vllm.v2_target_engine:TargetEngine"),
}
"""What the kit is run with; all but the first may need more than an old release has."""


def main(name: str) -> dict[str, Any]:
    """Problems by line of the contract, wrong values by path and strategy, and versions."""
    lines: dict[str, list[str]] = {}
    skipped: dict[str, str] = {}
    values: dict[str, dict[str, list[str]]] = {}
    for number, fixture in enumerate(FIXTURES[name]):
        module, _, kind = fixture.partition(":")
        try:
            engine = getattr(import_module(module), kind)()
        except ImportError as error:
            if not number:
                raise
            skipped[kind] = str(error)
            continue
        logging.getLogger(engine.logger).propagate = False
        kit = Conformance(engine)
        found: dict[str, list[str]] = {}
        for line in LINES:
            try:
                found[line] = kit.problems(line)
            except Skipped as reason:
                skipped[line] = str(reason)
        for line, problems in found.items():
            lines.setdefault(line, []).extend(problems)
        for run in () if found["coverage"] else kit.runs:
            cell = values.setdefault(run.case.path, {}).setdefault(run.strategy, [])
            cell += [f"{run.case.name}: {problem}" for problem in (*run.wrong, *run.moved)]
    return {"lines": lines, "skipped": skipped, "values": values, "environment": _environment(name)}


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
