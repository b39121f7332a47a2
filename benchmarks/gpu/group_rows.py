#!/usr/bin/env python3
"""GPU time that the refresh of the verified tokens adds to the target's graph: the planes of vLLM's groups, switched on and off.

python -m benchmarks.gpu.group_rows --json results.json
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.device_switch import REPEATS, block
from nsa_plugin import BatchDescriptor, BlockTable, ForwardMode, Geometry, ReplayPlan
from nsa_plugin.bench.cell import capture
from nsa_plugin.bench.run import where
from nsa_plugin.core.group_rows import GroupRows

PAGE, WIDTH = 64, 163_840
CELLS = tuple(
    (requests, tokens, context)
    for tokens in (3, 7)
    for requests, context in ((1, 1024), (1, 131072), (8, 16384), (32, 16384), (32, 131072), (128, 16384))
)
"""Requests, draft tokens and tokens of context."""


def planned(
    requests: int, tokens: int, context: int, device: torch.device, on: int
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """`REPEATS` refreshes in a graph; a width without a native kernel has lengths and pages by row. And what must outlive it."""
    rows, pages = tokens + 1, WIDTH // PAGE
    flat = rows not in (1, 2, 4)

    def new(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    table = torch.randint(1, 1 << 20, (requests, pages), dtype=torch.int32, device=device)
    lengths = torch.randint(context // 2, context, (requests,), dtype=torch.int32, device=device)
    starts = torch.arange(requests + 1, dtype=torch.int32, device=device) * rows
    batch = BatchDescriptor(
        ForwardMode.DRAFT_EXTEND, requests, lengths, BlockTable(table, PAGE), draft_tokens=rows, query_start_loc=starts
    )
    total = requests * rows
    indexer = GroupRows(
        lengths=new(total),
        query_lens=(new(requests),) if flat else (new(requests), new(requests)),
        ones=new(total) if flat else None,
        row_pages=new(total, pages) if flat else None,
    )
    enabled = torch.tensor([on], dtype=torch.int32, device=device)
    geometry = Geometry(2048, PAGE, WIDTH, wide_page_table=False)
    plan = ReplayPlan(batch, geometry, [GroupRows(request_map=new(total)), indexer], strategy="share", enabled=enabled)
    plan.run(batch)

    def work() -> None:
        for _ in range(REPEATS):
            plan.run(batch)

    return capture(work), (plan, batch, indexer, enabled)


def main() -> None:
    """Measure every cell, and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=60)
    options = parser.parse_args()
    device, rng, rows = torch.device("cuda"), random.Random(1), []
    for requests, tokens, context in CELLS:
        ways = {name: planned(requests, tokens, context, device, on) for name, on in (("on", 1), ("off", 0))}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for graph, _ in ways.values():
            block(graph)
        for _ in range(options.blocks):
            for name in rng.sample(list(ways), len(ways)):
                times[name].append(block(ways[name][0]))
        spread = {name: [float(np.quantile(values, q)) for q in (0.1, 0.5, 0.9)] for name, values in times.items()}
        rows.append({"requests": requests, "tokens": tokens, "context": context, "us (10, 50, 90 %)": spread})
        print(rows[-1], flush=True)
    result = {**where(device), "command": f"group_rows --blocks {options.blocks}", "cells": rows}
    options.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
