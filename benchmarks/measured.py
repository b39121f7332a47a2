"""What `nsa-plugin estimate` reads: the measurements of the committed results that it needs, as one small file."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.end_to_end.report import BASELINE, by_rounds, by_tokens

RESULTS = Path(__file__).parent / "results"
FILE = Path(__file__).parents[1] / "nsa_plugin" / "estimate" / "measured.json"
HOST = {"sglang": ("round us",), "vllm": ("round us", "sample and draft us")}
"""Calls that are all of the host's work in a round: the scheduler runs them one after the other."""
WITH_PLUGIN = ("auto", "graph")
SHIPPED = ("sglang shipped", "sglang loop")
"""What the engine does as shipped: draft backends are fused; target verify and draft extend have one backend."""
TABLES = ("bench_sglang_decode_h100", "bench_sglang_verify_extend_h100")
WIDE = "end_to_end_sglang_8_layers_width_1048576_h200"
"""A complete engine with tables of 1,048,576 columns: in batches above 1 its rounds get shorter by what the GPU saves."""
WIDTH, WIDEST = 163840, 1048576
"""Columns of page tables where a result does not say how many: of DeepSeek V3.2's shape and of GLM-5 Next's."""


def measured() -> str:
    """The text of `FILE`."""
    found: dict[str, list[Any]] = {
        "cells": list(_cells()),
        "stale": [
            [cell["ctx"], cell["bs"], cell["fresh_us"], cell["stale_us"]] for cell in _load("stale_schedule_h100")
        ],
        "tables": list(_tables()),
        "wide": [
            [_load(WIDE)["width"], cell["batch"], round(_saved_us(cell["variants"]), 1)]
            for cell in _load(WIDE)["cells"]
            if cell["batch"] > 1
        ],
        "acceptance": sorted(
            [int(steps), *_accepted(one["exact"]["against no plugin"])]
            for steps, one in _load("acceptance_equal_weights_sglang_h200")["steps"].items()
        ),
    }
    lists = (f' "{name}": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]" for name, rows in found.items())
    return "{\n" + ",\n".join(lists) + "\n}\n"


def _load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _accepted(found: dict[str, Any]) -> list[float]:
    return [round(value, 5) for value in (found["ratio"], *found["interval"])]


def _cells() -> Iterator[dict[str, Any]]:
    """Cells of complete engines whose host was timed in both; dense attention, another amount of work, is left out."""
    for path in sorted(RESULTS.glob("end_to_end_*.json")):
        results = json.loads(path.read_text())
        for cell in [] if "_dense_" in path.name else results["cells"]:
            if path.stem == WIDE and cell["batch"] > 1:
                continue
            shipped = cell["variants"].get(BASELINE)
            plugin = next((cell["variants"][name] for name in WITH_PLUGIN if name in cell["variants"]), None)
            if shipped is None or plugin is None or not shipped["round_us_median"]:
                continue
            hosts = [host_ms(results["engine"], one) for one in (shipped, plugin)]
            if None in hosts:
                continue
            pairs = by_rounds(plugin, shipped) or by_tokens(plugin, shipped)
            yield {
                "file": path.stem,
                "engine": results["engine"],
                **{key: cell[key] for key in ("steps", "prompt", "batch")},
                "width": results.get("width", WIDEST if "_glm5_next_" in path.stem else WIDTH),
                "round_ms": round(shipped["round_us_median"] / 1e3, 3),
                "host_ms": hosts[0],
                "host_ms_with_plugin": hosts[1],
                "pairs": len(pairs),
                "log_ratio": round(statistics.fmean(math.log(ours / theirs) for ours, theirs in pairs), 5),
            }


def host_ms(engine: str, variant: dict[str, Any]) -> float | None:
    """The host's work in a round, in milliseconds; None if it was not timed."""
    calls = [variant[name] for name in HOST[engine] if name in variant]
    if len(calls) < len(HOST[engine]):
        return None
    busy_us: float = sum(call["median"] * call["per_round"] for call in calls)
    return round(busy_us / 1e3, 3)


def _saved_us(variants: dict[str, Any]) -> float:
    """By how much a round is shorter with the plugin, in µs."""
    saved: float = variants[BASELINE]["round_us_median"] - variants["auto"]["round_us_median"]
    return saved


def _tables() -> Iterator[list[Any]]:
    """GPU µs that the strategy `graph` saves in one replay: mode, steps, width, batch, context, µs."""
    for name in TABLES:
        for cell in _load(name)["cells"]:
            ways = cell["contenders"]
            shipped = next(ways[way]["gpu_us"] for way in SHIPPED if way in ways)
            saved = round(shipped - ways["graph"]["gpu_us"], 1)
            yield [*(cell[key] for key in ("mode", "steps", "width", "batch_size", "context")), saved]
