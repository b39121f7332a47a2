"""Results as a table in the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from nsa_plugin.bench.results import Results

LAUNCH_US = 4.0
"""Below this floor the ratio to it says how long a launch takes, not how well bytes are moved."""
BOUND = 1.3
"""Times the floor: what a launch may take that moves the floor's bytes, besides `LAUNCH_US`."""
BOUND_TEXT = f"launch / ({BOUND} × floor + {LAUNCH_US:.0f} µs)"


def title(results: Results) -> str:
    """Where and when, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    note = " (a CPU: the times say nothing about a GPU)" if results["machine"] == "CPU" else ""
    planned = results.get("planned_cells", "more")
    rest = "" if results.get("complete", True) else f"; incomplete: {len(results['cells'])} of {planned} cells"
    return f"{results['machine']}{note}, {versions}, {results['date']}{backend(results)}{rest}"


def backend(results: Results) -> str:
    """Which dense backend was measured, as a part of a sentence; empty for others."""
    if "backend" not in results:
        return ""
    schedule = f", {results['schedule']} schedule" if "schedule" in results else ""
    return f", {results['backend']}, page size {results['page_size']}{schedule}"


def number(value: float | None, digits: int = 1) -> str:
    """A figure as text; a dash for None."""
    return "–" if value is None else f"{value:,.{digits}f}"


def terminal(results: Results) -> Group:
    """Everything, for a terminal of 80 columns: a table per cell, in columns that stand below each other."""
    longest = max((len(name) for cell in results["cells"] for name in cell["contenders"]), default=0)
    parts: list[Table | Text] = [Text(title(results), style="bold")]
    for cell in results["cells"]:
        label = f"{cell['mode']}, batch {cell['batch_size']}, context {context(cell)}, {cell['steps']} steps"
        table = Table(
            title=f"{label}, floor {number(cell['floor_us'])} µs", title_justify="left", box=box.SIMPLE_HEAD,
            pad_edge=False, padding=(0, 1, 0, 0),
        )  # fmt: skip
        table.add_column("preparation", width=longest, overflow="fold")
        for column, width in (("host µs", 8), ("GPU µs", 8), ("kernels", 7), ("/ floor", 7)):
            table.add_column(column, justify="right", width=width)
        table.add_column("differs", width=7)
        for name, row in cell["contenders"].items():
            differs = "–" if row["differs"] is None else "yes" if row["differs"] else "no"
            table.add_row(
                Text(name), number(row["host_us"]), number(row["gpu_us"]), number(row["kernels"], 0), number(ratio(cell, name)),
                differs,
            )  # fmt: skip
        parts.append(table)
        launches = [f"{name} {number(bound, 2)}" for name in cell["contenders"] if (bound := to_bound(cell, name))]
        parts += [Text(f"{BOUND_TEXT}: {', '.join(launches)}")] if launches else []
        for name, row in cell["contenders"].items():
            parts += [Text(f"{name} differs: {', '.join(row['differs'])}")] if row["differs"] else []
    caption = (
        "Floor: bytes that must move over the measured copy rate. The GPU's ratio to it is shown where the floor is over "
        f"{LAUNCH_US:.0f} µs, what one launch takes."
    )
    if any("launch_us" in row for cell in results["cells"] for row in cell["contenders"].values()):
        caption += " Launch: the kernels of this package alone."
    return Group(*parts, Text(caption, style="italic"))


def context(cell: Results) -> str:
    """The context length of a cell, in units of 1024 where it is whole."""
    tokens = int(cell["context"])
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def ratio(cell: Results, name: str) -> float | None:
    """GPU time over the floor; None where that says how long a launch takes."""
    row = cell["contenders"].get(name)
    if row is None or row["gpu_us"] is None or cell["floor_us"] < LAUNCH_US:
        return None
    return float(row["gpu_us"]) / float(cell["floor_us"])


def to_bound(cell: Results, name: str) -> float | None:
    """Time of this package's own launch over what it may take; None if it was not measured or there is none."""
    launch = cell["contenders"].get(name, {}).get("launch_us")
    return None if launch is None else float(launch) / (BOUND * float(cell["floor_us"]) + LAUNCH_US)
