"""What the plugin is worth by the time of a round: a table and a picture of models of different depths.

    python -m benchmarks.curve docs/images/worth.svg

They are drawn from `end_to_end_ENGINE_N_layers_….json` among the results: cells of complete engines, `auto` against no plugin.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import svg
from benchmarks.end_to_end.report import AGAIN, BASELINE, FEWEST_PAIRS, by_rounds, by_tokens, paired
from benchmarks.measured import RESULTS, WIDTH, host_ms

FILES = re.compile(r"end_to_end_(sglang|vllm)_(\d+)_layers(?:_\w+)?_h[12]00")
LONG = 16384
"""Prompts from here on are named in the picture."""
MANY = 16
"""Batches above that are named in it."""
COLOURS = {"sglang": "#1f77b4", "vllm": "#d95f02"}
LEFT, TOP, ACROSS, HEIGHT = 70, 60, 780, 380
NULL = "#999999"
NOTE = f"Full: batch 1, empty: larger. Numbers: layers, and what is long, wide or large. Bars: 95 % intervals, of {FEWEST_PAIRS} pairs or more."
Gain = tuple[float, float, float]
"""A change in percent, and its 95 % interval."""


@dataclass(frozen=True)
class Point:
    """One cell: gains and both times of a round, in milliseconds.

    `gain` is that of tokens per second. `rounds` is that of rounds per second, which no prompt disturbs; it is None in results
    that have no rounds block by block. `null` is "no plugin again", of rounds where `rounds` is.
    """

    engine: str
    machine: str
    layers: int
    steps: int
    prompt: int
    batch: int
    width: int
    round_ms: float
    host_ms: tuple[float | None, float | None]
    gain: Gain
    rounds: Gain | None
    null: Gain | None
    pairs: int

    @property
    def best(self) -> Gain:
        """The gain in rounds per second, else in tokens per second. Tokens are the same, so both are one gain."""
        return self.rounds or self.gain

    @property
    def enough(self) -> bool:
        """Whether there are enough pairs for an interval."""
        return self.pairs >= FEWEST_PAIRS


def points() -> list[Point]:
    """All cells, by engine, layers, prompt and batch."""
    found = []
    for path in sorted(RESULTS.glob("end_to_end_*_layers_*.json")):
        if named := FILES.fullmatch(path.stem):
            results = json.loads(path.read_text())
            found += list(_points(results, named[1], int(named[2])))
    return sorted(found, key=lambda one: (one.engine, one.layers, one.steps, one.width, one.prompt, one.batch))


def _points(results: dict[str, Any], engine: str, layers: int) -> Iterator[Point]:
    for cell in results["cells"]:
        shipped, plugin, again = (cell["variants"].get(name) for name in (BASELINE, "auto", AGAIN))
        if shipped is None or plugin is None or shipped["round_us_median"] is None:
            continue
        rounds = by_rounds(plugin, shipped)
        yield Point(
            engine, results["machine"]["machine"].removeprefix("NVIDIA ").split(" ")[0], layers,
            cell["steps"], cell["prompt"], cell["batch"], results.get("width", WIDTH), shipped["round_us_median"] / 1e3,
            (host_ms(engine, shipped), host_ms(engine, plugin)), _gain(by_tokens(plugin, shipped)),
            _gain(rounds) if rounds else None,
            again and _gain(by_rounds(again, shipped) or by_tokens(again, shipped)), min(plugin["turns"], shipped["turns"]),
        )  # fmt: skip


def _gain(pairs: list[tuple[float, float]]) -> Gain:
    mean, low, high = (100 * (ratio - 1) for ratio in paired(pairs))
    return mean, low, high


def table() -> str:
    """Every point, in Markdown."""
    lines = [
        "`auto` against no plugin: tokens and rounds per second as paired ratios with their 95 % intervals; no prompt is in the "
        "rounds. Times per round in ms. Equals: a second engine or block without the plugin, by rounds if they are there:",
        "",
        "| engine | layers | steps | columns | prompt | batch | round | host: shipped → plugin | tokens/s | rounds/s | pairs | equals | GPU |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in points():
        host = " → ".join("–" if value is None else f"{value:.1f}" for value in one.host_ms)
        tokens, rounds, null = (_said(gain, one.enough) for gain in (one.gain, one.rounds, one.null))
        lines.append(
            f"| {one.engine} | {one.layers} | {one.steps} | {one.width:,} | {one.prompt} | {one.batch} | {one.round_ms:.1f} "
            f"| {host} | {tokens} | {rounds} | {one.pairs} | {null} | {one.machine} |"
        )
    return "\n".join(lines)


def _said(gain: Gain | None, enough: bool) -> str:
    if gain is None:
        return "–"
    if not enough:
        return f"{gain[0]:+.1f} %, too few for an interval"
    seen = f"{gain[0]:+.1f} %" if not gain[1] <= 0 <= gain[2] else "no difference seen"
    return f"{seen} ({gain[1]:+.1f} to {gain[2]:+.1f} %)"


def _named(one: Point) -> str:
    """What a point is, beside its number of layers, if it is out of the ordinary."""
    return ", ".join([
        str(one.layers), *[f"{one.prompt // 1024}K"] * (one.prompt >= LONG), *["1M columns"] * (one.width > WIDTH),
        *[f"batch {one.batch}"] * (one.batch > MANY),
    ])  # fmt: skip


def draw() -> str:
    """The picture, as SVG: the gain against the time of a round as shipped."""
    drawn = points()
    first, last = min(one.round_ms for one in drawn) / 1.15, max(one.round_ms for one in drawn) * 1.15
    lowest = 5 * math.floor(min(min(one.best[1], *(one.null or (0, 0))) for one in drawn) / 5)
    highest = 5 * math.ceil(max(one.best[2] for one in drawn) / 5)

    def x(ms: float) -> float:
        return LEFT + ACROSS * math.log(ms / first) / math.log(last / first)

    def y(percent: float) -> float:
        return TOP + HEIGHT * (highest - percent) / (highest - lowest)

    parts = [svg.text(20, 26, "Rounds per second with the plugin, by the time of a round as shipped", "bold 17px")]
    for percent in range(lowest, highest + 1, 10 if highest - lowest > 50 else 5):
        parts.append(svg.line(LEFT, y(percent), LEFT + ACROSS, y(percent), "#333" if percent == 0 else "#ddd"))
        parts.append(svg.text(LEFT - 8, y(percent) + 4, f"{percent:+d} %" if percent else "0", "12px", "end"))
    for ms in (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100):
        if first <= ms <= last:
            parts.append(svg.line(x(ms), TOP, x(ms), TOP + HEIGHT, "#eee"))
            parts.append(svg.text(x(ms), TOP + HEIGHT + 18, f"{ms} ms", "12px", "middle"))
    for one in drawn:
        if one.null:
            at = x(one.round_ms) + 7
            parts.append(svg.line(at, y(one.null[1]), at, y(one.null[2]), NULL, 3))
    for one in drawn:
        at, colour = x(one.round_ms), COLOURS[one.engine]
        if one.enough:
            parts.append(svg.line(at, y(one.best[1]), at, y(one.best[2]), colour, 1.5))
        fill = colour if one.batch == 1 else "#fff"
        parts.append(f'<circle cx="{at:.1f}" cy="{y(one.best[0]):.1f}" r="5" fill="{fill}" stroke="{colour}"/>')
        far = at > LEFT + 0.75 * ACROSS
        parts.append(
            svg.text(at + (-8 if far else 8), y(one.best[0]) - 7, _named(one), "11px", "end" if far else "start")
        )
    at = 20.0
    engines = [(COLOURS[name], name) for name in COLOURS if any(one.engine == name for one in drawn)]
    for colour, label in (*engines, (NULL, "equals: no plugin against no plugin")):
        parts += [svg.bar(at, 38, 12, 12, colour), svg.text(at + 18, 48, label, "12px")]
        at += 50 + 7 * len(label)
    parts.append(svg.text(LEFT, TOP + HEIGHT + 40, NOTE, "11px"))
    return svg.document(parts, LEFT + ACROSS + 60, TOP + HEIGHT + 56)


def main() -> None:
    """Write the picture."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    Path(sys.argv[1]).write_text(draw())


if __name__ == "__main__":
    main()
