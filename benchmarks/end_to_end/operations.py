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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report import machine
from run import NO_PLUGIN, Engine, command, parse, parser_of, random_prompts, say, start

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
    """What the plugin's own metrics count so far, by labels: replays, steps, verifications, fall-backs; zeros left out."""
    from prometheus_client import CollectorRegistry, multiprocess

    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(folder))
    found: dict[str, float] = {}
    for metric in registry.collect():
        for sample in metric.samples:
            other = sample.name.endswith(("_bucket", "_sum", "_created"))
            if sample.name.startswith("nsa_plugin") and sample.value and not other:
                labels = ", ".join(value for name, value in sorted(sample.labels.items()) if name != "pid")
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


def recaptured(engine: Engine, batches: list[Any], tokens: int) -> tuple[list[int], list[Any]]:
    """Bytes that torch holds after each of some re-captures, and the tokens afterwards."""
    (engine.folder / "recapture").write_text(str(RECAPTURES))
    found = generate(engine, batches, tokens)
    return json.loads((engine.folder / "recaptured.json").read_text()), found


def metrics(options: argparse.Namespace, name: str) -> tuple[Path, dict[str, str]]:
    """An empty folder for an engine's metrics, and the settings for them."""
    folder: Path = (options.out / f"{name} metrics").resolve()
    folder.mkdir(parents=True)
    return folder, {"NSA_PLUGIN_METRICS": "prometheus", "PROMETHEUS_MULTIPROC_DIR": str(folder)}


def switched(
    options: argparse.Namespace, batches: list[Any], engine: Engine, folder: Path, file: Path
) -> dict[str, Any]:
    """All phases of an engine with the plugin, which looks at a switch file and writes its metrics to a folder."""
    result: dict[str, Any] = {"tokens": {}, "metrics": {}}

    def phase(name: str) -> None:
        result["tokens"][name] = generate(engine, batches, options.new_tokens)
        engine.idle(SWITCH_SECONDS)
        result["metrics"][name] = replays(folder)
        say(f"switched: {name}")

    phase("on")
    file.touch()
    engine.idle(SWITCH_SECONDS)
    phase("off")
    file.unlink()
    engine.idle(SWITCH_SECONDS)
    phase("on again")
    with storm(file):
        phase("storm")
    if options.engine == "sglang":
        result["bytes"], result["tokens"]["re-captured"] = recaptured(engine, batches, options.new_tokens)
        phase("after re-captures")
    result["log"] = [line for line in engine.log_lines() if "nsa-plugin" in line]
    return result


def main() -> int:
    """Run, and write one JSON file."""
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--verify", type=int, default=10, help="NSA_PLUGIN_VERIFY of the last engine")
    options = parse(parser)
    options.batch, options.prompt = (
        [max(REQUESTS, key=lambda each: each[0])[0]],
        [max(longest for _, longest in REQUESTS)],
    )
    rng = random.Random(options.seed)
    batches = [
        random_prompts(options.model, rng, [longest, *(rng.randrange(1, longest) for _ in range(requests - 1))])
        for requests, longest in REQUESTS
    ]
    results: dict[str, Any] = {
        "engine": options.engine, **machine(), "date": datetime.date.today().isoformat(), "command": command(),
        "environment": options.environment, "batches": list(REQUESTS), "new_tokens": options.new_tokens,
    }  # fmt: skip
    file = (options.out / "switch-off").resolve()
    switched_metrics, switching = metrics(options, "switched")
    verified_metrics, verifying = metrics(options, "verified")
    switching["NSA_PLUGIN_SWITCH_FILE"] = str(file)
    verifying |= {"NSA_PLUGIN_VERIFY": str(options.verify), "NSA_PLUGIN_REPRO_DIR": str(options.out.resolve())}
    alone, ours, verified = (
        start(options, options.steps, name, number, settings)
        for number, (name, settings) in enumerate([(NO_PLUGIN, {}), ("switched", switching), ("verified", verifying)])
    )
    try:
        for engine in (alone, ours, verified):
            engine.wait(options.start_seconds)
        say("three engines are up")
        expected = generate(alone, batches, options.new_tokens)
        if options.engine == "sglang":
            results["bytes without the plugin"], again = recaptured(alone, batches, options.new_tokens)
            results["same tokens without the plugin"] = again == expected
        say("without the plugin: done")
        found = switched(options, batches, ours, switched_metrics, file)
        found["tokens"]["verified"] = generate(verified, batches, options.new_tokens)
        verified.idle(SWITCH_SECONDS)
        found["metrics"]["verified"] = replays(verified_metrics)
        results["verified log"] = [line for line in verified.log_lines() if "nsa-plugin" in line]
        results["same tokens"] = {phase: tokens == expected for phase, tokens in found.pop("tokens").items()}
        results |= found
    finally:
        for engine in (alone, ours, verified):
            engine.quit()
        results["ok"] = all(results.get("same tokens", {"none": False}).values())
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    say(f"same tokens in every phase: {results['ok']}")
    return 0 if results["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
