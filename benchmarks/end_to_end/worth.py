#!/usr/bin/env python3
"""What the plugin is worth, by the time of a round and where the GPU's own work is less: a queue of runs, one file for each.

    python worth.py --engine sglang --plan curve --plugin DIR --probe DIR --json end_to_end_sglang.json [--units 61_layers]

A plan is a list of waves. The engines of a wave start together and are measured one after the other; an engine whose turn it
is not is stopped. A unit of a wave is a model with so many layers and so wide a page table, without the plugin and with `auto`.
Blocks of a few tokens take turns in random order, on the same CPU cores. "no plugin again" says how far equals spread: it is
a second engine without the plugin where there is room for one, else a second block of the same engine each turn. The file
says which. JSON names the files: each unit's name is added to it. They are written after every cell, in the form of `run.py`'s.

Where the context is long, a block finds its prompts in the engine's prefix cache. Shorter prompts and smaller batches are
parts of the longest and largest ones.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import AGAIN, BASELINE, GIVEN_BACK, reduce
from run import HERE, Engine, command, parse, parser_of, random_prompts, say, start, take_turns, up

AUTO = "auto"
WIDTH = 163840
IDLE_S = 1.3
"""The probe writes its times when an engine has been idle for so long."""
SPARED = 2
"""CPU cores that no engine is pinned to."""
LEAST_S = 240
"""No further wave starts with less time than that."""


@dataclass(frozen=True)
class Unit:
    """A model, its engines and its cells.

    Attributes
    ----------
    layers : of the model; width, heads and experts are those of `--model`
    steps : drafts of a round
    prompt, batch : every pair is a cell, the longest and largest first
    width : of the page tables: the model's longest context
    cached : whether prompts are kept in the engine's prefix cache
    again : whether there is a second engine without the plugin
    named : what else is in its name
    """

    layers: int
    steps: int
    prompt: tuple[int, ...] = (1024,)
    batch: tuple[int, ...] = (16, 1)
    width: int = WIDTH
    cached: bool = False
    again: bool = False
    named: str = ""

    @property
    def name(self) -> str:
        """Part of the names of its files and folders."""
        return f"{self.layers}_layers" + (f"_{self.named}" if self.named else "")


Waves = tuple[tuple[Unit, ...], ...]


def curve(steps: int) -> Waves:
    """From the shortest round to the longest."""
    small = tuple(Unit(layers, steps, again=True) for layers in (2, 4))
    return small, tuple(Unit(layers, steps) for layers in (8, 16, 32)), (Unit(61, steps),)


LONG: dict[str, Any] = {"prompt": (131072, 65536), "batch": (8, 1), "cached": True}
GPU: Waves = (
    (Unit(8, 4, **LONG, named="long_4_steps"), Unit(8, 7, **LONG, named="long_7_steps")),
    (
        Unit(8, 4, (4096,), (256, 128, 64), cached=True, named="large_batch"),
        Unit(8, 4, (1024,), (128, 32, 1), cached=True, named="width_163840"),
    ),
    (Unit(8, 4, (1024,), (128, 32, 1), width=1048576, cached=True, named="width_1048576"),),
    (Unit(8, 5, **LONG, named="long_5_steps"),),
)
PLANS: dict[str, dict[str, Waves]] = {"sglang": {"curve": curve(4), "gpu": GPU}, "vllm": {"curve": curve(3)}}


def model_of(unit: Unit, source: Path, folder: Path) -> Path:
    """A copy of a model's folder, whose config has the unit's number of layers and longest context."""
    made = folder / unit.name
    made.mkdir(parents=True, exist_ok=True)
    for path in source.glob("*.json"):
        shutil.copy(path, made)
    config = json.loads((source / "config.json").read_text())
    config |= {"num_hidden_layers": unit.layers, "max_position_embeddings": unit.width}
    (made / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return made


def options_of(unit: Unit, options: argparse.Namespace) -> argparse.Namespace:
    """What `run.start` is told to start the unit's engines."""
    ours = copy.copy(options)
    ours.model = model_of(unit, options.model, options.out / "models")
    ours.out, ours.batch, ours.prompt = options.out / unit.name, unit.batch, unit.prompt
    if unit.cached:
        cached = {"sglang": {"disable_radix_cache": False}, "vllm": {"enable_prefix_caching": True}}
        ours.arguments = cached[options.engine] | options.arguments
    return ours


class Running:
    """A unit whose engines start at once."""

    def __init__(self, unit: Unit, options: argparse.Namespace, number: int) -> None:
        self.unit, self.options = unit, options_of(unit, options)
        self.engines: dict[str, Engine] = {}
        wanted = [(BASELINE, BASELINE, "without"), (AUTO, AUTO, "with")]
        wanted += [(AGAIN, BASELINE, "again")] if unit.again else []
        for offset, (name, variant, folder) in enumerate(wanted):
            apart = copy.copy(self.options)
            apart.out = self.options.out / folder
            self.engines[name] = start(apart, unit.steps, variant, number + offset)

    def wait(self, cores: frozenset[int]) -> None:
        """Wait for its engines, and pin them. One that does not come up is left out."""
        for name, engine in list(self.engines.items()):
            try:
                engine.wait(self.options.start_seconds)
                engine.pin(cores)
                say(f"{self.unit.name}, {name}: up after {engine.ready}")
            except RuntimeError as error:
                say(f"{self.unit.name}, {name}: {error}")
                self.engines.pop(name).quit()

    def cells(self, until: float) -> Iterator[dict[str, Any]]:
        """Measure, the longest prompt and the largest batch first, until the time is over."""
        if BASELINE not in self.engines:
            say(f"{self.unit.name}: left out, no engine without the plugin is up")
            return
        turns = self.engines if self.unit.again else {**self.engines, AGAIN: self.engines[BASELINE]}
        rng = random.Random(self.options.seed)
        longest = random_prompts(self.options.model, rng, [max(self.unit.prompt)] * max(self.unit.batch))
        for prompt in self.unit.prompt:
            for batch in self.unit.batch:
                said = f"{self.unit.name}, prompt {prompt}, batch {batch}"
                if time.perf_counter() > until:
                    say(f"{said}: left out, the time is over")
                    continue
                try:
                    cell = take_turns(self.options, turns, [one[:prompt] for one in longest[:batch]])
                except (RuntimeError, OSError) as error:
                    say(f"{said}: left out, {error}")
                    continue
                say(f"{said}: {1 + cell['runs'][-1]['turn']} turns")
                yield {"steps": self.unit.steps, "prompt": prompt, "batch": batch, **cell}

    def result(self, cells: list[dict[str, Any]], cores: frozenset[int]) -> dict[str, Any]:
        """What is kept, in the form of `run.py`'s results. The engines have been idle, so that the probes have written."""
        unit, named = self.unit, {f"{self.unit.steps} {name}": engine for name, engine in self.engines.items()}
        times = {name: engine.times() for name, engine in named.items()}
        times.setdefault(f"{unit.steps} {AGAIN}", times.get(f"{unit.steps} {BASELINE}", []))
        logs = {name: engine.log_lines() for name, engine in named.items()}
        found = reduce({
            "engine": self.options.engine, "tp": self.options.tp, "dp_attention": self.options.dp_attention,
            "date": datetime.date.today().isoformat(), "command": command(),
            "start_s": {name: engine.ready["start_s"] for name, engine in named.items() if engine.ready},
            "cells": cells, "times": times, "logs": logs,
        })  # fmt: skip
        for cell in found["cells"]:
            for figures in cell["variants"].values():
                if figures["same_tokens"]:
                    del figures["first_difference"]
                figures["tokens_sha256"] = sorted(set(figures["tokens_sha256"]))
        back = GIVEN_BACK.findall("\n".join(logs.get(f"{unit.steps} {AUTO}", ())))
        return found | {
            "layers": unit.layers, "width": unit.width, "prompts cached": unit.cached, "cpu_cores": sorted(cores),
            AGAIN: "a second engine" if unit.again else "a second block of the same engine",
            "given_back_gib": math.fsum(map(float, back)) / 1024 if back else None,
        }  # fmt: skip

    def idle(self) -> None:
        """Let the probes write."""
        for engine in self.engines.values():
            engine.idle(IDLE_S)

    def quit(self) -> None:
        """End its engines."""
        for engine in self.engines.values():
            engine.quit()


def measure(units: list[Unit], options: argparse.Namespace, until: float, compiled: bool) -> None:
    """Start the engines of a wave, measure unit by unit, and write a file for each after every cell."""
    cores = frozenset(sorted(os.sched_getaffinity(0))[SPARED:]) or frozenset(os.sched_getaffinity(0))
    running: list[Running] = []
    try:
        for number, unit in enumerate(units):
            running.append(Running(unit, options, 3 * number))
            if not compiled and number == 0:
                running[0].wait(cores)
        for one in running[0 if compiled else 1 :]:
            one.wait(cores)
        up(sum(len(one.engines) for one in running), options)
        for one in running:
            file = options.json.with_name(f"{options.json.stem}_{one.unit.name}.json")
            cells = []
            for cell in one.cells(until):
                cells.append(cell)
                one.idle()
                file.write_text(json.dumps(one.result(cells, cores), indent=1) + "\n")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ending = [threading.Thread(target=one.quit) for one in running]
        for thread in ending:
            thread.start()
        for thread in ending:
            thread.join()
        signal.signal(signal.SIGTERM, stop)


def stop(number: int, frame: object) -> None:
    """End the run; what was measured is in its files."""
    sys.exit(f"stopped by signal {number}")


def main() -> None:
    """Run the waves of a plan."""
    parser = parser_of(__doc__)
    parser.add_argument("--plan", choices=("curve", "gpu"), required=True)
    parser.add_argument("--units", nargs="+", help="only these; default: all of the plan")
    parser.add_argument("--warm", action="store_true", help="kernels are compiled: no engine need start alone")
    parser.add_argument("--new-tokens", type=int, default=64, help="of a block")
    parser.add_argument("--most", type=int, default=40, help="turns of a cell at most")
    parser.add_argument("--seconds-per-cell", type=float, default=90, help="no further turn after this time")
    parser.add_argument("--seconds", type=float, default=1500, help="no further cell after this time")
    parser.add_argument("--wait-for", type=Path, help="measure only when this file is there")
    parser.set_defaults(model=HERE / "model_61_layers")
    options = parse(parser)
    waves = PLANS[options.engine].get(options.plan)
    if waves is None:
        parser.error(f"--plan {options.plan}: for {options.engine} there is {', '.join(PLANS[options.engine])}")
    known = [unit.name for wave in waves for unit in wave]
    if unknown := set(options.units or ()) - set(known):
        parser.error(f"--units: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, stop)
    until = time.perf_counter() + options.seconds
    for index, wave in enumerate(waves):
        wanted = [unit for unit in wave if options.units is None or unit.name in options.units]
        if wanted and time.perf_counter() > until - LEAST_S:
            say(f"{', '.join(unit.name for unit in wanted)}: left out, the time is over")
        elif wanted:
            measure(wanted, options, until, compiled=options.warm or index > 0)
    say("done")


if __name__ == "__main__":
    main()
