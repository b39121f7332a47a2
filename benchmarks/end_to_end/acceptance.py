#!/usr/bin/env python3
"""How many drafted tokens are accepted: as shipped, with the plugin, and with exact step lengths, of a trained model.

All engines, one per number of steps and variant, are up at the same time, and generate the same held-out prompts, greedily.
The accepted length is tokens over rounds, the verified token included; it is compared prompt by prompt, with a bootstrap over
prompts. Tokens should be the same in all: how many prompts are is written down.

    python acceptance.py --plugin DIR --probe DIR --model CHECKPOINT --prompts CHECKPOINT/prompts.json --json results.json
        [--engine vllm] [--steps 2 3 4 5 7]

CHECKPOINT is a trained model with an MTP layer, in Hugging Face's layout. The "verified" variant compares the metadata of every
round with the engine's own, after the graph has used it; the plugin's metrics count.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import random
import statistics
import sys
from pathlib import Path
from typing import Any

from operations import SWITCH_SECONDS, metrics, replays
from report import machine
from run import NO_PLUGIN, Engine, command, parse, parser_of, say, start

EXACT, VERIFIED = "exact", "verified"
VARIANTS: dict[str, dict[str, str]] = {
    NO_PLUGIN: {},
    "auto": {"NSA_PLUGIN_STRATEGY": "auto"},
    EXACT: {"NSA_PLUGIN_STEP_LENGTHS": "exact"},
    VERIFIED: {"NSA_PLUGIN_STRATEGY": "graph", "NSA_PLUGIN_VERIFY": "1", "NSA_PLUGIN_VERIFY_MODE": "graph"},
}
"""vLLM's drafts see exact lengths as shipped: there that variant is the same as `auto`."""
RESAMPLES = 4000


def started(options: argparse.Namespace) -> dict[tuple[int, str], tuple[Engine, Path | None]]:
    """All engines that come up, by steps and variant, with the folder of the metrics of those that are verified."""
    engines: dict[tuple[int, str], tuple[Engine, Path | None]] = {}
    for number, (steps, variant) in enumerate(itertools.product(options.steps, options.variants)):
        folder, settings = metrics(options, f"{steps} {variant}") if variant == VERIFIED else (None, {})
        engine = start(options, steps, variant, number, VARIANTS[variant] | settings)
        engines[steps, variant] = engine, folder
        if number == 0 and not options.warm:
            wait(engine, options)
    for engine, _ in list(engines.values())[0 if options.warm else 1 :]:
        wait(engine, options)
    return {key: found for key, found in engines.items() if found[0].ready is not None}


def wait(engine: Engine, options: argparse.Namespace) -> None:
    """Wait until an engine is up; say why, if it does not come up."""
    try:
        engine.wait(options.start_seconds)
        say(f"{engine.name}: up")
    except RuntimeError as error:
        say(f"{engine.name}: {error}")


def accepted(answer: dict[str, Any]) -> float:
    """Tokens per round over all prompts. The first token of a prompt comes without a round."""
    return sum(len(tokens) - 1 for tokens in answer["tokens"]) / sum(answer["rounds"])


def change(base: dict[str, Any], other: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The ratio of accepted lengths, with a 95 % interval by bootstrap over prompts, and what differs prompt by prompt."""
    rows = [
        (len(tokens) - 1, rounds, len(tokens_of_other) - 1, rounds_of_other)
        for tokens, rounds, tokens_of_other, rounds_of_other in zip(
            base["tokens"], base["rounds"], other["tokens"], other["rounds"], strict=True
        )
    ]

    def ratio(chosen: list[tuple[int, int, int, int]]) -> float:
        tokens, rounds, tokens_of_other, rounds_of_other = map(sum, zip(*chosen, strict=True))
        return (tokens_of_other / rounds_of_other) / (tokens / rounds)

    drawn = sorted(ratio(rng.choices(rows, k=len(rows))) for _ in range(RESAMPLES))
    fewer, more = (sum(sign * (row[3] - row[1]) > 0 for row in rows) for sign in (-1, 1))
    return {
        "ratio": ratio(rows),
        "interval": [drawn[math.floor(0.025 * RESAMPLES)], drawn[math.floor(0.975 * RESAMPLES)]],
        "prompts": len(rows),
        "prompts in fewer rounds": fewer,
        "prompts in more rounds": more,
        "prompts with the same tokens": sum(
            one == two for one, two in zip(base["tokens"], other["tokens"], strict=True)
        ),
    }


def cell(answers: dict[str, dict[str, Any]], rng: random.Random) -> dict[str, Any]:
    """The figures of one number of steps. Every round of a prompt is in `rounds`."""
    base = answers[NO_PLUGIN]
    return {
        variant: {
            "accepted": accepted(answer),
            "rounds": answer["rounds"],
            "seconds": answer["end"] - answer["start"],
            **({} if variant == NO_PLUGIN else {"against no plugin": change(base, answer, rng)}),
        }
        for variant, answer in answers.items()
    }


def main() -> int:
    """Run, and write one JSON file."""
    parser = parser_of(__doc__)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON: lists of token ids, or of such in `prompts`")
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 3, 4, 5, 7])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--warm", action="store_true", help="kernels are compiled: no engine need start alone")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    options = parse(parser)
    found = json.loads(options.prompts.read_text())
    prompts = (found["prompts"] if isinstance(found, dict) else found)[: options.requests]
    options.batch, options.prompt = [32], [max(map(len, prompts))]
    options.arguments = {"load_format": "auto"} | options.arguments
    results: dict[str, Any] = {
        "engine": options.engine, **machine(), "date": datetime.date.today().isoformat(), "command": command(),
        "prompt_tokens": [statistics.median(map(len, prompts)), max(map(len, prompts))],
        "new_tokens": options.new_tokens, "steps": {}, "verified": {}, "logs": {},
    }  # fmt: skip
    training = options.model / "training.json"
    results["training"] = json.loads(training.read_text()) if training.exists() else None
    rng, engines = random.Random(options.seed), started(options)
    ask = {"op": "generate", "prompts": prompts, "max_new_tokens": options.new_tokens}
    try:
        for steps in options.steps:
            answers = {}
            for variant in options.variants:
                if (steps, variant) not in engines:
                    continue
                engine, folder = engines[steps, variant]
                answers[variant] = engine.ask(ask)
                if folder is not None:
                    engine.idle(SWITCH_SECONDS)
                    results["verified"][str(steps)] = replays(folder)
            if NO_PLUGIN in answers:
                results["steps"][str(steps)] = cell(answers, rng)
            say(f"{steps} steps: { ({variant: round(accepted(answer), 3) for variant, answer in answers.items()}) }")
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    finally:
        for (steps, variant), (engine, _) in engines.items():
            results["logs"][f"{steps} {variant}"] = [line for line in engine.log_lines() if "nsa-plugin" in line]
            engine.quit()
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
