"""Pictures of results: host time, GPU time, GPU time over the floor, and time against the number of steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from nsa_plugin.bench.report import LAUNCH_US, context, number, ratio, title
from nsa_plugin.bench.results import Results
from nsa_plugin.core.errors import UnavailableError, reject

FORMATS = (".png", ".svg", ".pdf")
LABELLED = 48
"""Bars of a panel that still leave room for their figures."""
L2_BYTES = 50 << 20
"""What an H100's L2 cache holds: a batch of fewer bytes need not come from the memory that the floor is about."""
WORDS = {
    "copy": "copy: computed once, written to every consumer",
    "share": "share: computed once, one set of buffers",
    "graph": "graph: computed once, recorded in the CUDA graph",
    "sglang loop": "own path of sglang, once per draft backend",
    "sglang shipped": "own path of sglang, as shipped",
    "sglang unfused": "own path of sglang, pooled metadata not fused",
    "vllm shipped": "own path of vLLM, as shipped",
    "vllm in place": "fused draft, an update per attention group",
    "no metadata": "fused draft without its metadata",
}
"""Contender to its legend; the others have their names."""


def check(path: Path) -> None:
    """Refuse, before anything is measured, a picture that could not be drawn.

    Raises
    ------
    InvalidValueError
        The name's ending is none of `FORMATS`.
    UnavailableError
        matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        reject(str(path), f"a picture's name that ends in {', '.join(FORMATS)}", repr(path.suffix))
    _pyplot()


def plot(results: Results, path: Path) -> None:
    """Draw results of at least one cell. Panels that would be empty are left out; raises as `check`."""
    check(path)
    plt = _pyplot()
    cells = results["cells"]
    names = list(dict.fromkeys(name for cell in cells for name in cell["contenders"]))
    colours = {name: plt.colormaps["tab10"](index % 10) for index, name in enumerate(names)}
    largest = [
        cell for cell in cells if cell["steps"] == cells[-1]["steps"] and cell["mode"] == cells[0]["mode"]
    ] or cells[-1:]
    panels: list[Callable[[Any], None]] = []
    unit = "µs per draft" if results.get("engine") == "vllm" else "µs per preparation"
    for clock, label in (("host", f"host time, {unit}"), ("gpu", f"GPU time, {unit}")):
        if any(_of(cell, name, clock) for cell in largest for name in names):
            panels.append(partial(_bars, cells=largest, names=names, colours=colours, clock=clock, label=label))
    bound = [cell for cell in largest if any(ratio(cell, name) is not None for name in names)]
    if bound:
        wide = results.get("engine") == "sglang" and "backend" not in results
        panels.append(lambda axes: _ratios(axes, bound, names, colours, wide))
    panels += _against_steps(cells, names, colours, unit)
    if not panels:
        reject("the results", "a time of some preparation", "none")
    columns = len(panels) if len(panels) < 4 else 2
    rows = len(panels) // columns
    size = (7.5 * columns, 4.6 * rows + 0.8)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, constrained_layout=True)
    for draw, axes in zip(panels, grid.flat, strict=True):
        draw(axes)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    marks = [plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    figure.legend(marks, [_plain(WORDS.get(name, name)) for name in names], loc="outside lower center", ncols=2)
    spread = any(key.endswith("spread_us") for cell in cells for row in cell["contenders"].values() for key in row)
    bars = "error bars: least and largest of the repetitions" if spread else "no error bars: this file has medians only"
    figure.suptitle(_plain(f"{title(results)}\n{bars}"), fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(axes: Any, cells: list[Results], names: list[str], colours: dict[str, Any], clock: str, label: str) -> None:
    """Grouped bars of a clock, on a logarithmic axis: they differ by factors."""
    _grouped(axes, cells, names, colours, lambda cell, name: _of(cell, name, clock), clock)
    _logarithmic(axes)
    known = [time for cell in cells for name in names if (time := _of(cell, name, clock))]
    axes.set_ylim(min(known) / 2, max(known) * 3)
    axes.set(ylabel=f"{label} (log)")
    if clock == "host" and any(row["host_us"] is None for cell in cells for row in cell["contenders"].values()):
        axes.set_title("no bar: nothing is left for the host", fontsize=9)


def _ratios(axes: Any, cells: list[Results], names: list[str], colours: dict[str, Any], wide: bool) -> None:
    _grouped(axes, cells, names, colours, ratio)
    _logarithmic(axes)
    known = [value for cell in cells for name in names if (value := ratio(cell, name))]
    axes.set_ylim(min(0.5, min(known) / 2), max(known) * 3)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(ylabel="GPU time / floor (log)")
    lines = [f"cells whose floor is over {LAUNCH_US:.0f} µs, what one launch takes"]
    if reasons := _beaten(cells, names, wide):
        lines.append(f"below 1: {'; '.join(reasons)}")
    axes.set_title("\n".join(lines), fontsize=9)


def _beaten(cells: list[Results], names: list[str], wide: bool) -> list[str]:
    """Why some preparation takes less than the floor; `wide` says that this counts a table that some leave out."""
    beaten = [cell for cell in cells if any((ratio(cell, name) or 1) < 1 for name in names)]
    reasons = []
    if beaten and wide:
        reasons.append("the floor counts the wide page table, which share and graph leave out")
    if any(cell["bytes"] < L2_BYTES for cell in beaten):
        reasons.append(f"under {L2_BYTES >> 20} MiB come from the L2 cache, the floor is the memory's")
    return reasons or (["the copy that gave the floor's rate was slower"] if beaten else [])


def _against_steps(
    cells: list[Results], names: list[str], colours: dict[str, Any], unit: str
) -> list[Callable[[Any], None]]:
    """A panel of the first batch and context against steps, if there is more than one number of steps."""
    first = cells[0]
    same = [cell for cell in cells if all(cell[key] == first[key] for key in ("mode", "batch_size", "context"))]
    steps = sorted({cell["steps"] for cell in same})
    if len(steps) < 2:
        return []

    def draw(axes: Any) -> None:
        for index, name in enumerate(names):
            points = [(cell, clock) for cell in same if (clock := _longer(cell, name))]
            if not points:
                continue
            heights = [_of(cell, name, clock) for cell, clock in points]
            errors = _errors([(cell, name, clock) for cell, clock in points])
            style = "o-" if len(points) > 2 else "o"  # a line through two points would claim a law
            aside = (index / max(len(names) - 1, 1) - 0.5) * 0.2 * (steps[1] - steps[0])  # none hides another
            places = [cell["steps"] + aside for cell, _ in points]
            axes.errorbar(places, heights, errors, fmt=style, capsize=3, color=colours[name])
        axes.set_title(_plain(f"{first['mode']}, batch {first['batch_size']}, context {context(first)}"), fontsize=9)
        axes.set(xlabel="speculative steps", ylabel=f"{unit}, host or GPU,\nwhichever is longer (log)")
        _logarithmic(axes)
        axes.set_xticks(steps, [str(count) for count in steps])
        axes.set_xlim(steps[0] - 1, steps[-1] + 1)

    return [draw]


def _grouped(
    axes: Any, cells: list[Results], names: list[str], colours: dict[str, Any],
    value: Callable[[Results, str], float | None], clock: str = "",
) -> None:  # fmt: skip
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        shown = [(place, cell, height) for place, cell in enumerate(cells) if (height := value(cell, name))]
        if not shown:
            continue
        places, heights = [place + index * width for place, _, _ in shown], [height for _, _, height in shown]
        errors = _errors([(cell, name, clock) for _, cell, _ in shown]) if clock else None
        made = axes.bar(places, heights, width, yerr=errors, color=colours[name], error_kw={"elinewidth": 0.8})
        if len(cells) * len(names) <= LABELLED:
            labels = [number(height, 0 if height >= 10 else 1) for height in heights]
            axes.bar_label(made, labels, fontsize=7, rotation=90, padding=2)
    labels = [f"{cell['batch_size']} × {context(cell)}" for cell in cells]
    axes.set_xticks(
        [place + 0.4 - width / 2 for place in range(len(cells))], labels, rotation=45, ha="right", fontsize=8
    )
    axes.set_xlabel(_plain(f"{cells[0]['mode']}: batch × context, {cells[0]['steps']} steps"))


def _logarithmic(axes: Any) -> None:
    """A logarithmic axis with plain figures at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
    for place in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        place(FuncFormatter(lambda value, _: f"{value:,g}" if value < 1 else f"{value:,.0f}"))
    axes.tick_params(axis="y", which="both", labelsize=8)


def _errors(shown: list[tuple[Results, str, str]]) -> list[list[float]] | None:
    """Distances below and above the medians; None if nothing of it was recorded."""
    below, above = [], []
    for cell, name, clock in shown:
        middle = _of(cell, name, clock) or 0.0
        least, largest = cell["contenders"][name].get(f"{clock}_spread_us") or (middle, middle)
        below.append(max(middle - least, 0.0))
        above.append(max(largest - middle, 0.0))
    return [below, above] if any(below) or any(above) else None


def _of(cell: Results, name: str, clock: str) -> float | None:
    row = cell["contenders"].get(name)
    return None if row is None or row[f"{clock}_us"] is None else float(row[f"{clock}_us"])


def _longer(cell: Results, name: str) -> str:
    """The clock that took longer, "" if neither was measured."""
    known = [(time, clock) for clock in ("host", "gpu") if (time := _of(cell, name, clock))]
    return max(known)[1] if known else ""


def _plain(text: str) -> str:
    """Without matplotlib's markup for formulas."""
    return text.replace("$", r"\$")


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UnavailableError(f"a plot needs matplotlib: {error}; pip install 'nsa-plugin[bench]'") from error
    return plt
