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

FIXTURES = {"sglang": "nsa_plugin.rigs.sglang.engine:SglangEngine", "vllm": "nsa_plugin.rigs.vllm.v2_engine:VllmEngine"}


def main(name: str) -> dict[str, Any]:
    """Problems by line of the contract, wrong values by path and strategy, and versions."""
    module, _, kind = FIXTURES[name].partition(":")
    engine = getattr(import_module(module), kind)()
    logging.getLogger(engine.logger).propagate = False
    kit = Conformance(engine)
    lines: dict[str, list[str]] = {}
    skipped: dict[str, str] = {}
    for line in LINES:
        try:
            lines[line] = kit.problems(line)
        except Skipped as reason:
            skipped[line] = str(reason)
    values: dict[str, dict[str, list[str]]] = {}
    if not lines["coverage"]:
        for run in kit.runs:
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
