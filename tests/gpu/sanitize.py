#!/usr/bin/env python3
"""Every GPU test of the core under compute-sanitizer, several at a time; the outcome as JSON.

    python tests/gpu/sanitize.py --json sanitizer.json [--tools memcheck racecheck] [--parallel 8]

Exit status 1 if a tool reports an error, a test fails, or one does not end in time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TESTS = "tests/gpu/test_gpu.py"
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: .*")


def collect() -> list[str]:
    """Names of all tests."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", TESTS]
    found = subprocess.run(command, capture_output=True, text=True)
    return [line for line in found.stdout.splitlines() if "::" in line]


def run(tool: str, test: str, seconds: float) -> dict[str, Any]:
    """One test under one tool."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", test]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"tool": tool, "test": test, "outcome": f"not over after {seconds:.0f} s"}
    summary = SUMMARY.search(done.stdout)
    outcome = summary.group() if summary else done.stdout[-500:] + done.stderr[-500:]
    return {"tool": tool, "test": test, "status": done.returncode, "outcome": outcome}


def main() -> int:
    """Run everything; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tools", nargs="+", default=["memcheck", "racecheck"])
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=300, help="limit for one test")
    options = parser.parse_args()
    jobs = [(tool, test) for tool in options.tools for test in collect()]
    with ThreadPoolExecutor(options.parallel) as pool:
        results = list(pool.map(lambda job: run(job[0], job[1], options.seconds), jobs))
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    wrong = [result for result in results if result.get("status") != 0]
    print(f"{len(jobs) - len(wrong)} of {len(jobs)} clean")
    for result in wrong:
        print(result)
    return 1 if wrong or not jobs else 0


if __name__ == "__main__":
    sys.exit(main())
