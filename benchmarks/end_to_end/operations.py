#!/usr/bin/env python3
"""What an operator does to a running engine: switch off and on, switch without end, capture anew, verify.

First an engine without the plugin generates each batch. Then one with the plugin generates them in each of these phases:
on, off (the switch file is there), on again, a storm (the file comes and goes all the time), after re-captures (sglang),
and one with NSA_PLUGIN_VERIFY generates them once. Tokens must be the same in every phase. The plugin's own metrics, read
between phases, say which path prepared the metadata; memory is what torch holds after each re-capture.

    python operations.py --plugin DIR --probe DIR --json results.json [--engine vllm] [--steps 4] [--verify 10]
        [--environment SGLANG_ENABLE_METADATA_GLUE_GRAPH=1]

The folders are those of `run.py`. Exit status 1 if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report import machine
from run import Engine, command, parse, parser_of, random_prompts, say, start

REQUESTS = ((1, 900), (3, 2500), (8, 700), (5, 300))
"""Requests and longest prompt of each batch, in tokens."""
SWITCH_SECONDS = 2.5
"""The switch file is looked at once a second."""
STORM_SECONDS = 0.4
RECAPTURES = 8


def generate(engine: Engine, batches: list[Any], tokens: int) -> list[Any]:
    """Tokens of each batch."""
    ask = {"op": "generate", "max_new_tokens": tokens}
    return [engine.ask(ask | {"prompts": prompts})["tokens"] for prompts in batches]


def replays(folder: Path) -> dict[str, float]:
    """Replays so far by "mode, strategy", and verifications' mismatches and fall-backs, from the plugin's own metrics."""
    from prometheus_client import CollectorRegistry, multiprocess

    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(folder))
    found: dict[str, float] = {}
    for metric in registry.collect():
        for sample in metric.samples:
            if sample.name.startswith("nsa_plugin") and not sample.name.endswith(("_bucket", "_sum", "_created")):
                labels = ", ".join(
                    value for name, value in sorted(sample.labels.items()) if name not in ("engine", "pid")
                )
                found[f"{sample.name}: {labels}"] = sample.value
    return found


@contextlib.contextmanager
def storm(file: Path) -> Iterator[None]:
    """Within it, the file comes and goes."""
    over = threading.Event()

    def toggle() -> None:
        while not over.wait(STORM_SECONDS):
            if file.exists():
                file.unlink()
            else:
                file.touch()

    thread = threading.Thread(target=toggle)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        file.unlink(missing_ok=True)
        time.sleep(SWITCH_SECONDS)


def recaptured(engine: Engine, batches: list[Any], tokens: int) -> tuple[list[int], list[Any]]:
    """Bytes that torch holds after each of some re-captures, and the tokens afterwards."""
    (engine.folder / "recapture").write_text(str(RECAPTURES))
    found = generate(engine, batches, tokens)
    return json.loads((engine.folder / "recaptured.json").read_text()), found


def switched(options: argparse.Namespace, batches: list[Any], environment: dict[str, str]) -> dict[str, Any]:
    """All phases of one engine with the plugin."""
    folder = (options.out / "switched metrics").resolve()
    folder.mkdir(parents=True)
    file = folder.parent / "switch-off"
    settings = {
        "NSA_PLUGIN_SWITCH_FILE": str(file), "NSA_PLUGIN_METRICS": "prometheus", "PROMETHEUS_MULTIPROC_DIR": str(folder),
    }  # fmt: skip
    engine = start(options, options.steps, "switched", 1, environment | settings)
    engine.wait(options.start_seconds)
    result: dict[str, Any] = {"tokens": {}, "metrics": {}}

    def phase(name: str) -> None:
        result["tokens"][name] = generate(engine, batches, options.new_tokens)
        time.sleep(SWITCH_SECONDS)
        result["metrics"][name] = replays(folder)
        say(f"switched: {name}")

    phase("on")
    file.touch()
    time.sleep(SWITCH_SECONDS)
    phase("off")
    file.unlink()
    time.sleep(SWITCH_SECONDS)
    phase("on again")
    with storm(file):
        phase("storm")
    if options.engine == "sglang":
        result["bytes"], result["tokens"]["re-captured"] = recaptured(engine, batches, options.new_tokens)
        phase("after re-captures")
    engine.quit()
    result["log"] = [line for line in engine.log_lines() if "nsa-plugin" in line]
    return result


def main() -> int:
    """Run, and write one JSON file."""
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--verify", type=int, default=10, help="NSA_PLUGIN_VERIFY of the last engine")
    parser.add_argument("--environment", nargs="*", default=[], metavar="NAME=VALUE", help="of every engine")
    options = parse(parser)
    options.batch, options.prompt = (
        [max(REQUESTS, key=lambda each: each[0])[0]],
        [max(longest for _, longest in REQUESTS)],
    )
    environment = dict(pair.split("=", 1) for pair in options.environment)
    rng = random.Random(options.seed)
    batches = [
        random_prompts(options.model, rng, [longest, *(rng.randrange(1, longest) for _ in range(requests - 1))])
        for requests, longest in REQUESTS
    ]
    results: dict[str, Any] = {
        "engine": options.engine, **machine(), "date": datetime.date.today().isoformat(), "command": command(),
        "environment": environment, "batches": list(REQUESTS), "new_tokens": options.new_tokens,
    }  # fmt: skip
    try:
        alone = start(options, options.steps, "no plugin", 0, environment)
        alone.wait(options.start_seconds)
        expected = generate(alone, batches, options.new_tokens)
        if options.engine == "sglang":
            results["bytes without the plugin"], again = recaptured(alone, batches, options.new_tokens)
            results["same tokens without the plugin"] = again == expected
        alone.quit()
        say("without the plugin: done")
        found = switched(options, batches, environment)
        settings = {"NSA_PLUGIN_VERIFY": str(options.verify), "NSA_PLUGIN_REPRO_DIR": str(options.out.resolve())}
        folder = (options.out / "verified metrics").resolve()
        folder.mkdir(parents=True)
        metrics = {"NSA_PLUGIN_METRICS": "prometheus", "PROMETHEUS_MULTIPROC_DIR": str(folder)}
        verified = start(options, options.steps, "verified", 2, environment | settings | metrics)
        verified.wait(options.start_seconds)
        found["tokens"]["verified"] = generate(verified, batches, options.new_tokens)
        time.sleep(SWITCH_SECONDS)
        found["metrics"]["verified"] = replays(folder)
        verified.quit()
        results["verified log"] = [line for line in verified.log_lines() if "nsa-plugin" in line]
        results["same tokens"] = {phase: tokens == expected for phase, tokens in found.pop("tokens").items()}
        results |= found
    finally:
        results["ok"] = all(results.get("same tokens", {"none": False}).values())
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    say(f"same tokens in every phase: {results['ok']}")
    return 0 if results["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
