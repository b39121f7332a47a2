#!/usr/bin/env python3
"""Runs every GPU test of the core under compute-sanitizer, in several processes at a time. The outcome is JSON.

    python -m benchmarks.gpu.sanitize --json sanitizer.json [--tools memcheck racecheck] [--groups 4]

The exit status is 1 if a tool reports an error, a test fails, or a group does not end in time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

TESTS = "tests/gpu"
ALLOCATES = "allocates_in_graph"
"""Marks tests that take memory while a graph is captured, which only torch's caching allocator can."""
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: .*")
PASSED = re.compile(r"(\d+) passed")


def collect(marked: str) -> list[str]:
    """Names of the tests that a marker expression of pytest selects."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", marked, TESTS]
    found = subprocess.run(command, capture_output=True, text=True)
    return [line for line in found.stdout.splitlines() if "::" in line]


def run(tool: str, tests: list[str], caching: bool, seconds: float) -> dict[str, Any]:
    """Run some tests in one process under one tool. Without caching, every tensor has bounds that the tool knows."""
    command = [
        "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "pytest",
        "-q",
        *tests,
    ]
    environment = {**os.environ, "GPU_TEST_CASES": "1"}
    if not caching:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    result: dict[str, Any] = {"tool": tool, "tests": tests}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else ""
        return result | {"clean": False, "outcome": f"not over after {seconds:.0f} s: {said[-500:]}"}
    summary, passed = SUMMARY.search(done.stdout), PASSED.search(done.stdout)
    clean = done.returncode == 0 and passed is not None and int(passed.group(1)) == len(tests)
    outcome = summary.group() if clean and summary else done.stdout[-2000:] + done.stderr[-500:]
    return result | {"clean": clean, "outcome": outcome}


def main() -> int:
    """Run everything; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tools", nargs="+", default=["memcheck", "racecheck"])
    parser.add_argument("--groups", type=int, default=4, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=300, help="limit for one group")
    options = parser.parse_args()
    tests, allocating = collect(f"not {ALLOCATES}"), collect(ALLOCATES)
    groups = [(tests[first :: options.groups], False) for first in range(options.groups)] + [(allocating, True)]
    with ThreadPoolExecutor(options.groups) as pool:
        jobs = [
            pool.submit(run, tool, group, caching, options.seconds)
            for tool in options.tools
            for group, caching in groups
            if group
        ]
        results = []
        for job in as_completed(jobs):
            results.append(job.result())
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    wrong = [result for result in results if not result["clean"]]
    for tool in options.tools:
        clean = sum(len(result["tests"]) for result in results if result["tool"] == tool and result["clean"])
        print(f"{tool}: {clean} of {len(tests) + len(allocating)} tests clean")
    for result in wrong:
        print(result["tool"], result["outcome"])
    return 1 if wrong or not tests else 0


if __name__ == "__main__":
    sys.exit(main())
