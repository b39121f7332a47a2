"""Results as a table in the terminal and as plots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from nsa_plugin.core.errors import UnavailableError

Results = dict[str, Any]
LAUNCH_US = 4.0
"""No ratio is shown to a floor below this: it would say how long a launch takes, not how well bytes are moved."""
LABELLED = 48
"""Most bars in a panel that has room for their figures."""


def title(results: Results) -> str:
    """Where and when, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    note = " (a CPU: the times say nothing about a GPU)" if results["machine"] == "CPU" else ""
    return f"{results['machine']}{note}, {versions}, {results['date']}"


def number(value: float | None, digits: int = 1) -> str:
    """A figure as text; a dash for None."""
    return "–" if value is None else f"{value:,.{digits}f}"


def terminal(results: Results) -> Table:
    """All results as a table for the terminal."""
    caption = (
        "times in µs; floor: bytes that must move over the measured copy rate; the ratio to it only where it is over "
        f"{LAUNCH_US:.0f} µs, what one launch takes"
    )
    table = Table(title=title(results), caption=caption)
    for column in ("cell", "preparation", "host", "GPU", "kernels", "floor", "GPU / floor", "differs"):
        table.add_column(column, justify="left" if column in ("cell", "preparation", "differs") else "right")
    for cell in results["cells"]:
        label = f"{cell['mode']} bs {cell['batch_size']} ctx {cell['context']} steps {cell['steps']}"
        for name, row in cell["contenders"].items():
            differs = "–" if row["differs"] is None else ", ".join(row["differs"]) or "no"
            table.add_row(
                label, name, number(row["host_us"]), number(row["gpu_us"]), number(row["kernels"], 0), number(cell["floor_us"]),
                number(_ratio(cell, name)), differs,
            )  # fmt: skip
            label = ""
        table.add_section()
    return table


def plot(results: Results, path: Path) -> None:
    """Draw time against steps, time against batch and context, and GPU time.

    GPU time is shown as the ratio to the floor where that means something. All axes start at zero.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UnavailableError(f"a plot needs matplotlib: {error}; pip install 'nsa-plugin[bench]'") from error
    cells = results["cells"]
    names = list(dict.fromkeys(name for cell in cells for name in cell["contenders"]))
    colours = {name: matplotlib.colormaps["tab10"](index) for index, name in enumerate(names)}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(18, 6), constrained_layout=True)
    first = cells[0]
    same = [cell for cell in cells if all(cell[key] == first[key] for key in ("mode", "batch_size", "context"))]
    for name in names:
        points = [(cell["steps"], _time(cell, name)) for cell in same if _time(cell, name) is not None]
        left.plot([x for x, _ in points], [y for _, y in points], "o-", label=name, color=colours[name])
    left.set(xlabel="speculative steps", ylabel="µs per preparation, the larger of host and GPU")
    left.set_title(f"{first['mode']}, batch {first['batch_size']}, context {_context(first)}")
    left.set_xticks(sorted({cell["steps"] for cell in same}))
    last = [cell for cell in cells if cell["steps"] == cells[-1]["steps"] and cell["mode"] == first["mode"]]

    def bars(panel: Any, shown: list[Results], value: Callable[[Results, str], float | None], text: str) -> None:
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            heights = [value(cell, name) or 0 for cell in shown]
            made = panel.bar(
                [x + index * width for x in range(len(shown))], heights, width, label=name, color=colours[name]
            )
            if len(shown) * len(names) <= LABELLED:
                labels = [number(height, 0 if height >= 10 else 1) if height else "" for height in heights]
                panel.bar_label(made, labels, fontsize=7, rotation=90, padding=2)
        labels = [f"{cell['batch_size']} × {_context(cell)}" for cell in shown]
        panel.set_xticks([x + 0.4 - width / 2 for x in range(len(shown))], labels, rotation=45, ha="right")
        panel.set(xlabel=f"batch × context, {last[0]['steps']} steps", ylabel=text)

    bars(middle, last, _time, "µs per preparation, the larger of host and GPU")
    if bound := [cell for cell in last if any(_ratio(cell, name) is not None for name in names)]:
        bars(right, bound, _ratio, "GPU time / floor")
        right.set_title(f"cells whose floor is over {LAUNCH_US:.0f} µs, what one launch takes")
        right.axhline(1, color="black", linewidth=0.8)
    elif any(_gpu(cell, name) for cell in last for name in names):
        bars(right, last, _gpu, "GPU µs per preparation")
        right.set_title("the GPU alone")
    else:
        right.text(0.5, 0.5, "no GPU: nothing to show", transform=right.transAxes, ha="center")
    for panel in (left, middle, right):
        panel.set_ylim(0, 1.1 * panel.get_ylim()[1])
        panel.grid(axis="y", alpha=0.3)
    left.legend()
    figure.suptitle(title(results), fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _context(cell: Results) -> str:
    tokens = int(cell["context"])
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def _gpu(cell: Results, name: str) -> float | None:
    row = cell["contenders"].get(name)
    return None if row is None or row["gpu_us"] is None else float(row["gpu_us"])


def _time(cell: Results, name: str) -> float | None:
    row = cell["contenders"].get(name)
    known = [] if row is None else [time for time in (row["host_us"], row["gpu_us"]) if time is not None]
    return max(known) if known else None


def _ratio(cell: Results, name: str) -> float | None:
    """GPU time over the floor; None if the floor is below `LAUNCH_US`."""
    gpu = _gpu(cell, name)
    return None if gpu is None or cell["floor_us"] < LAUNCH_US else gpu / float(cell["floor_us"])
