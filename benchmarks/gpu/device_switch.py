#!/usr/bin/env python3
"""What the device switch costs: GPU time of the metadata kernel without a switch, with one that is on, with one that is off.

Each way is recorded in a CUDA graph of `REPEATS` preparations over the same static inputs. The ways take turns in random
order; a pair is two neighbouring blocks of the same turn. The ratio is given with a 95 % bootstrap interval.

    python -m benchmarks.gpu.device_switch --json results.json
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap

from nsa_plugin import ForwardMode, ReplayPlan
from nsa_plugin.bench.cell import Cell, capture
from nsa_plugin.bench.embedded import buffers
from nsa_plugin.bench.run import where

REPEATS = 20
"""Preparations in a graph."""
BLOCK = 10
"""Replays that are timed together."""
CELLS = tuple(
    (mode, batch_size, context)
    for mode in ForwardMode
    for batch_size, context in ((1, 1024), (1, 65536), (8, 16384), (32, 16384), (128, 16384), (128, 131072))
)
WIDTH = 163_840


def graphs(cell: Cell, device: torch.device) -> tuple[dict[str, torch.cuda.CUDAGraph], list[Any]]:
    """A graph for each way, over the first input of a cell; and what must outlive them."""
    geometry, batch = cell.geometry(device), cell.batches(device)[0]
    switches: dict[str, torch.Tensor | None] = {
        "none": None,
        "on": torch.ones(1, dtype=torch.int32, device=device),
        "off": torch.zeros(1, dtype=torch.int32, device=device),
    }
    made: dict[str, torch.cuda.CUDAGraph] = {}
    kept: list[Any] = [batch, switches]
    for name, enabled in switches.items():
        plan = ReplayPlan(batch, geometry, [buffers(batch, geometry)], strategy="share", enabled=enabled)
        plan.run(batch)

        def work(plan: ReplayPlan = plan) -> None:
            for _ in range(REPEATS):
                plan.run(batch)

        made[name] = capture(work)
        kept.append(plan)
    return made, kept


def block(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of one preparation."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(BLOCK):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / (BLOCK * REPEATS)


def ratio(before: list[float], after: list[float]) -> dict[str, float]:
    """Of paired times: the mean ratio and its interval."""
    logs = np.log(np.array(after) / np.array(before))
    interval = bootstrap((logs,), np.mean, confidence_level=0.95, n_resamples=2000).confidence_interval
    return {
        "ratio": float(np.exp(logs.mean())),
        "low": float(np.exp(interval.low)),
        "high": float(np.exp(interval.high)),
    }


def main() -> None:
    """Measure every cell, and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=60)
    options = parser.parse_args()
    device, rng = torch.device("cuda"), random.Random(1)
    rows = []
    for mode, batch_size, context in CELLS:
        cell = Cell(mode, batch_size, context, 4, WIDTH, 1)
        ways, kept = graphs(cell, device)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for graph in ways.values():
            block(graph)
        for _ in range(options.pairs):
            for name in rng.sample(list(ways), len(ways)):
                times[name].append(block(ways[name]))
        del kept
        row = {
            "mode": mode.value, "batch_size": batch_size, "context": context, "pairs": options.pairs,
            "us": {name: float(np.median(values)) for name, values in times.items()},
            "on to none": ratio(times["none"], times["on"]), "off to none": ratio(times["none"], times["off"]),
            "samples": times,
        }  # fmt: skip
        rows.append(row)
        print({key: value for key, value in row.items() if key != "samples"}, flush=True)
    result = {**where(device), "command": f"device_switch --pairs {options.pairs}", "cells": rows}
    options.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
