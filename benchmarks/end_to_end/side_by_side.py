#!/usr/bin/env python3
"""Two complete engines side by side on one GPU, each with the plugin and under load, every n-th replay verified.

First an engine without the plugin generates each batch by itself. Then two engines with the plugin generate all batches
at the same time, one in reverse order. Their tokens must be the same, and no log may tell of a difference or a fall-back.

    python side_by_side.py --plugin DIR --probe DIR --json results.json [--engine vllm] [--steps 4] [--verify 10]

The folders are those of `run.py`. The exit status is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import threading
from collections.abc import Sequence
from typing import Any

from report import machine
from run import NO_PLUGIN, Engine, command, parse, parser_of, random_prompts, say, start

REQUESTS = ((1, 900), (3, 2500), (8, 700), (16, 400), (1, 6000), (5, 300))
"""Number of requests, and tokens of the longest prompt, of each batch."""
TROUBLE = re.compile(r"nsa-plugin.*(own values are used|left as it is)")


def generate(engine: Engine, batches: Sequence[Any], order: Sequence[int], tokens: int, out: dict[int, Any]) -> None:
    """Have an engine generate the batches in an order, until all are done or the engine ends."""
    for index in order:
        out[index] = engine.ask({"op": "generate", "prompts": batches[index], "max_new_tokens": tokens})["tokens"]


def main() -> int:
    """Run, and write one JSON file."""
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--verify", type=int, default=10, help="NSA_PLUGIN_VERIFY of both engines")
    options = parse(parser)
    options.batch, options.prompt = [max(REQUESTS)[0]], [max(longest for _, longest in REQUESTS)]
    rng = random.Random(options.seed)
    batches = [
        random_prompts(options.model, rng, [longest, *(rng.randrange(1, longest) for _ in range(requests - 1))])
        for requests, longest in REQUESTS
    ]
    expected: dict[int, Any] = {}
    order = range(len(batches))
    alone = start(options, options.steps, NO_PLUGIN, 0)
    alone.wait(options.start_seconds)
    generate(alone, batches, order, options.new_tokens, expected)
    alone.quit()
    say("without the plugin: done")
    settings = {"NSA_PLUGIN_VERIFY": str(options.verify), "NSA_PLUGIN_REPRO_DIR": str(options.out.resolve())}
    engines = [start(options, options.steps, f"verified {index}", 1 + index, settings) for index in (0, 1)]
    for engine in engines:
        engine.wait(options.start_seconds)
    found: list[dict[int, Any]] = [{}, {}]
    threads = [
        threading.Thread(target=generate, args=(engine, batches, turn, options.new_tokens, out))
        for engine, turn, out in zip(engines, (order, order[::-1]), found, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results = outcome(options, expected, found, engines)
    for engine in engines:
        engine.quit()
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    say(f"as it should be: {results['ok']}")
    return 0 if results["ok"] else 1


def outcome(
    options: argparse.Namespace, expected: dict[int, Any], found: list[dict[int, Any]], engines: list[Engine]
) -> dict[str, Any]:
    """What happened; "ok" if every batch of every engine is there and right, and no log tells of trouble."""
    logs = {engine.name: engine.log_lines() for engine in engines}
    trouble = [line for lines in logs.values() for line in lines if TROUBLE.search(line)]
    same = [[out.get(index) == tokens for index, tokens in expected.items()] for out in found]
    return {
        "engine": options.engine, **machine(), "command": command(),
        "ok": len(expected) == len(REQUESTS) and all(map(all, same)) and not trouble,
        "batches": list(REQUESTS), "same_tokens": same, "trouble": trouble,
        "logs": {name: [line for line in lines if "nsa-plugin" in line] for name, lines in logs.items()},
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
