#!/usr/bin/env python3
"""Figures, table and plot of end-to-end runs.

    python report.py results.json … [--plot FILE]

The table, in Markdown, is printed; the plot shows the first file.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import random
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BASELINE, AGAIN = "no plugin", "no plugin again"
"""The second is a further engine, or block, without the plugin."""
CAPTURE = re.compile(r"CUDA graph end.*elapsed=([\d.]+) s|Graph capturing finished in (\d+) secs")
GIVEN_BACK = re.compile(r"([\d.]+) MiB given back")
FEWEST_PAIRS = 10
"""Turns of a cell from which on a change has an interval."""
RESAMPLES = 2000
MOSTLY_PROMPTS = 0.5
"""Part of a request's time that goes into its prompt, from which on what is left of it says nothing of tokens per second."""
SKIPPED = 8
"""Rounds at the start of a request that are not counted, because its prompt is being read."""
Cell = dict[str, Any]


def reduce(results: dict[str, Any]) -> dict[str, Any]:
    """The part of a run that is kept: for each cell and variant figures, and whether the tokens are the same."""
    cells = []
    for cell in sorted(results["cells"], key=lambda cell: (cell["steps"], cell["prompt"], cell["batch"])):
        base = next(run for name in cell["first"] for run in cell["runs"] if run["variant"] == name)
        reference = base["tokens"]
        variants: dict[str, Any] = {}
        for variant in cell["first"]:
            runs = [run for run in cell["runs"] if run["variant"] == variant]
            times = results["times"].get(f"{cell['steps']} {variant}", [])
            variants[variant] = _figures(cell, runs, cell["first"][variant], times) | {
                "same_tokens": all(run["tokens"] == reference for run in runs),
                "same_rounds": all(run["rounds"] == base["rounds"] for run in runs),
                "tokens_sha256": [_digest(run["tokens"]) for run in runs],
                "first_difference": _first_difference(reference, runs),
            }
        cells.append({key: cell[key] for key in ("steps", "prompt", "batch")} | {"variants": variants})
    kept = {key: results[key] for key in ("engine", "tp", "dp_attention", "date", "command", "start_s")}
    return kept | {"machine": machine(), "cells": cells, "profiles": results.get("profiles"), "logs": results["logs"]}


def _figures(cell: Cell, runs: list[Cell], first_token_s: float, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the turns of a variant. `ranks` has the times of each rank's process; figures are in µs."""
    generated = sum(map(len, runs[0]["tokens"]))
    decode = [run["end"] - run["start"] - first_token_s for run in runs]
    windows = [(run["start"], run["end"]) for run in runs]
    calls = {
        name: [[_within(times.get(name, []), window)[SKIPPED:] for times in ranks] for window in windows]
        for name in dict.fromkeys(name for times in ranks for name in times)
    }
    rounds = [entries for window in calls.get("round", []) for entries in window]
    gaps = [(b[0] - a[0]) * 1e6 for entries in rounds for a, b in itertools.pairwise(entries)]
    figures: dict[str, Any] = {
        "turns": len(runs),
        "tokens_per_s": statistics.median((generated - cell["batch"]) / max(seconds, 1e-9) for seconds in decode),
        "tokens_per_s_all": [(generated - cell["batch"]) / max(seconds, 1e-9) for seconds in decode],
        "rounds": runs[0]["rounds"],
        "round_us_by_turn": [
            1e6 * statistics.median(b[0] - a[0] for a, b in itertools.pairwise(entries))
            for window in calls.get("round", [])
            for entries in window[:1]
            if len(entries) > 1
        ],
        "prompt_share": first_token_s / statistics.median(run["end"] - run["start"] for run in runs),
        "round_us_median": statistics.median(gaps) if gaps else None,
        "round_us_p99": _p99(gaps) if gaps else None,
    }
    for name, found in calls.items():
        inside = [entry[1] * 1e6 for window in found for entries in window for entry in entries]
        if inside:
            number = max(sum(map(len, rounds)), 1)
            figures[f"{name} us"] = {"median": statistics.median(inside), "per_round": len(inside) / number}
            figures[f"{name} us"] |= _spread(found) if len(ranks) > 1 else {}
    return figures


def _spread(calls: list[list[list[list[float]]]]) -> dict[str, float]:
    """How much longer, in µs, the slowest rank takes for a call than the fastest. Turns count in which all have as many calls."""
    spreads = [
        1e6 * (max(entry[1] for entry in together) - min(entry[1] for entry in together))
        for window in calls
        if len(set(map(len, window))) == 1
        for together in zip(*window, strict=True)
    ]
    if not spreads:
        return {}
    return {"spread_median": statistics.median(spreads), "spread_p99": _p99(spreads)}


def _p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


def _within(entries: Iterable[list[float]], window: tuple[float, float]) -> list[list[float]]:
    return sorted(entry for entry in entries if window[0] <= entry[0] <= window[1])


def _digest(tokens: Any) -> str:
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]


def _first_difference(reference: list[list[int]], runs: list[Cell]) -> list[list[int | None]]:
    """For each run and request, the index of the first token that differs from the first run's; None if none does."""
    return [
        [
            next((at for at, (a, b) in enumerate(zip(want, have, strict=False)) if a != b), None)
            for want, have in zip(reference, run["tokens"], strict=True)
        ]
        for run in runs
    ]


def machine() -> dict[str, Any]:
    """GPU, versions and date, as `nsa-plugin bench` names them. The plugin must be importable."""
    try:
        import torch

        from nsa_plugin.bench.run import where

        return where(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except ImportError as error:
        return {"machine": f"unknown ({error})"}


def markdown(results: dict[str, Any]) -> str:
    """The tables of a run: one row per cell, then one per engine."""
    variants = list(dict.fromkeys(name for cell in results["cells"] for name in cell["variants"]))
    names = ", ".join(variants)
    lines = [
        f"{_title(results)}: decode tokens/s (median; change "
        f"against {BASELINE}, of cells with {FEWEST_PAIRS} turns or more as a paired ratio with its 95 % interval), µs from round to round (median / p99; change of a turn's median), µs of host time for metadata per round, tokens of "
        "all turns compared:",
        "",
        f"| steps | prompt | batch | {' | '.join(variants)} | round: {names} | metadata: {names} | tokens |",
        "|---|---|---|" + "---|" * (len(variants) + 3),
    ]
    for cell in results["cells"]:
        found = [cell["variants"].get(variant) for variant in variants]
        baseline = cell["variants"].get(BASELINE)
        rates = [_rate(one, baseline) for one in found]
        rounds = ", ".join(_rounds(one, baseline) for one in found)
        metadata = ", ".join("–" if one is None else _metadata(one) for one in found)
        same = "same" if all(one["same_tokens"] for one in found if one) else "differ"
        lines.append(
            f"| {cell['steps']} | {cell['prompt']} | {cell['batch']} | {' | '.join(rates)} | {rounds} | {metadata} | {same} |"
        )
    lines += ["", *_changes(results, variants), *_jitter(results, variants), "", *_engines(results)]
    return "\n".join(lines).rstrip("\n")


def _title(results: dict[str, Any]) -> str:
    """Engine, GPUs, how these share the work, and date."""
    gpus = results["machine"]["machine"]
    if results["tp"] > 1:
        gpus = f"{results['tp']} × {gpus}, {'DP attention' if results['dp_attention'] else 'tensor parallel'}"
    return f"{results['engine']}, {gpus}, {results['date']}"


def _changes(results: dict[str, Any], variants: list[str]) -> list[str]:
    """Geometric mean, lowest and highest change of tokens/s over all cells."""
    lines = []
    for variant in variants:
        ratios = [
            cell["variants"][variant]["tokens_per_s"] / cell["variants"][BASELINE]["tokens_per_s"]
            for cell in results["cells"]
            if variant != BASELINE and {variant, BASELINE} <= set(cell["variants"])
            if not mostly_prompts(cell["variants"][variant])
        ]
        if ratios:
            mean = math.exp(statistics.fmean(map(math.log, ratios)))
            said, low, high = (_change(ratio) for ratio in (mean, min(ratios), max(ratios)))
            lines.append(f"`{variant}` against {BASELINE}, over {len(ratios)} cells: {said} ({low} to {high}).  ")
    return lines


def _jitter(results: dict[str, Any], variants: list[str]) -> list[str]:
    """Median and p99, over all cells, of how much longer the slowest rank takes for a preparation than the fastest."""
    lines = []
    for variant in variants:
        found: dict[str, list[tuple[float, float]]] = {}
        for cell in results["cells"]:
            for name, value in _preparations(cell["variants"].get(variant, {})).items():
                if "spread_median" in value:
                    found.setdefault(name, []).append((value["spread_median"], value["spread_p99"]))
        for name, pairs in found.items():
            median, p99 = (statistics.median(column) for column in zip(*pairs, strict=True))
            lines.append(f"`{variant}`, {name}: slowest rank over fastest {median:,.0f} µs (p99 {p99:,.0f} µs).  ")
    return lines


def _engines(results: dict[str, Any]) -> list[str]:
    """Per engine, what the profiler saw in a round and what the log says of the start. Empty without profiles."""
    if not results.get("profiles"):
        return []
    lines = [
        "Per round at batch 1, with torch's profiler on (slower); capture of all CUDA graphs, which the first engine "
        "compiles for:",
        "",
        "| steps | variant | kernels | launches | graph launches | GPU busy | capture | page tables given back |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, seen in results["profiles"].items():
        log = "\n".join(results["logs"].get(name, ()))
        if "error" in seen:
            figures = ["–", "–", "–", seen["error"]]
        else:
            figures = [f"{seen[key] / seen['rounds']:.0f}" for key in ("kernels", "launches", "graph_launches")]
            figures.append(f"{100 * seen['gpu_busy_us'] / seen['wall_us']:.0f} %")
        captures = [float(a or b) for a, b in CAPTURE.findall(log)]
        figures.append(f"{sum(captures):.0f} s" if captures else "–")
        back = GIVEN_BACK.search(log)
        figures.append(f"{back.group(1)} MiB" if back else "–")
        lines.append(f"| {' | '.join([*name.split(' ', 1), *figures])} |")
    return lines


def _preparations(one: dict[str, Any]) -> dict[str, dict[str, float]]:
    """A variant's figures of the calls that prepare metadata."""
    return {name.removesuffix(" us"): value for name, value in one.items() if name.endswith("metadata us")}


def _metadata(one: dict[str, Any]) -> str:
    """Host time per round of all calls that prepare metadata, in µs."""
    parts = [value["median"] * value["per_round"] for value in _preparations(one).values()]
    return f"{sum(parts):,.0f}" if parts else "–"


def _rate(one: dict[str, Any] | None, baseline: dict[str, Any] | None) -> str:
    if one is None:
        return "–"
    if mostly_prompts(one):
        return "– (mostly prompts)"
    rate = f"{one['tokens_per_s']:,.{int(one['tokens_per_s'] < 100)}f}"
    if baseline is None or one is baseline:
        return rate
    pairs = by_tokens(one, baseline)
    if len(pairs) < FEWEST_PAIRS:
        return f"{rate} ({_change(one['tokens_per_s'] / baseline['tokens_per_s'])})"
    return f"{rate} ({_paired(pairs)})"


def mostly_prompts(one: dict[str, Any]) -> bool:
    """Whether a variant's tokens per second say little, as its prompts took most of the time."""
    return float(one.get("prompt_share", 0)) > MOSTLY_PROMPTS


def by_tokens(one: dict[str, Any], baseline: dict[str, Any]) -> list[tuple[float, float]]:
    """Pairs of blocks, in tokens per second."""
    return list(zip(one["tokens_per_s_all"], baseline["tokens_per_s_all"], strict=False))


def by_rounds(one: dict[str, Any], baseline: dict[str, Any]) -> list[tuple[float, float]]:
    """Pairs of blocks whose ratio is that of rounds per second; prompts are in none. Empty where rounds were not kept by block."""
    ours, theirs = (found.get("round_us_by_turn", []) for found in (one, baseline))
    return list(zip(theirs, ours, strict=False))


def _paired(pairs: list[tuple[float, float]]) -> str:
    mean, low, high = paired(pairs)
    said = f"{_change(mean)}, {_change(low)} to {_change(high)}" if not low <= 1 <= high else "no difference seen"
    return f"{said}; {len(pairs)} pairs"


def _rounds(one: dict[str, Any] | None, baseline: dict[str, Any] | None) -> str:
    """From round to round: median and p99, and how many more rounds there are in the same time."""
    if one is None or one["round_us_median"] is None:
        return "–"
    said = f"{one['round_us_median']:,.0f} / {one['round_us_p99']:,.0f}"
    pairs = by_rounds(one, baseline or {})
    if one is baseline or len(pairs) < FEWEST_PAIRS:
        return said
    return f"{said} (rounds/s {_paired(pairs)})"


def paired(pairs: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Geometric mean of the ratios of pairs, and its 95 % interval by bootstrap over the pairs, which took turns."""
    logs = [math.log(ours / theirs) for ours, theirs in pairs]
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(logs, k=len(logs))) for _ in range(RESAMPLES))
    low, high = means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]
    return math.exp(statistics.fmean(logs)), math.exp(low), math.exp(high)


def _change(ratio: float) -> str:
    """A ratio as a change in percent. A change below 2 % has a decimal."""
    change = 100 * (ratio - 1)
    return f"{change:+.{int(abs(change) < 2)}f} %"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw tokens per second and round time, cell by cell. Both axes start at zero."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = results["cells"]
    variants = list(dict.fromkeys(name for cell in cells for name in cell["variants"]))
    figure, panels = plt.subplots(2, 1, figsize=(11, 9), constrained_layout=True)
    labels = [f"{cell['steps']} steps\n{cell['prompt'] // 1024}K × {cell['batch']}" for cell in cells]
    width = 0.8 / len(variants)
    for index, variant in enumerate(variants):
        for panel, scale in ((panels[0], None), (panels[1], "round_us_median")):
            heights = []
            for cell in cells:
                one = cell["variants"].get(variant, {})
                value = one.get(scale) if scale else one.get("tokens_per_s", 0) / cell["batch"]
                heights.append(value or 0)
            panel.bar([x + index * width for x in range(len(cells))], heights, width, label=variant)
    for panel, text in zip(panels, ("decode tokens/s per request", "µs from round to round (median)"), strict=True):
        panel.set_xticks([x + 0.4 - width / 2 for x in range(len(cells))], labels)
        panel.set_ylabel(text)
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", alpha=0.3)
        panel.legend()
    figure.suptitle(_title(results), fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print the tables; draw the first result if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    loaded = [json.loads(path.read_text()) for path in options.results]
    text = "\n\n".join(markdown(results) for results in loaded)
    if options.plot:
        plot(loaded[0], options.plot)
    print(text)


if __name__ == "__main__":
    main()
