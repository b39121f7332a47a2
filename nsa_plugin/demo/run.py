"""Runs the demo and prints its tables."""

from __future__ import annotations

import contextlib
import statistics
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nsa_plugin.demo.embedded import OPERATIONS, Harness, Original
from nsa_plugin.demo.sglang_engine import SglangHarness
from nsa_plugin.rigs.requirements import require
from nsa_plugin.rigs.sglang.backends import stand_ins
from nsa_plugin.trace import Round, Sizes, SlotTable, generate, load, sizes_of

INDEX_TOPK = 2048
SGLANG_ON_CPU = Sizes(width=1024, max_requests=9, captured=(1, 2, 4, 8))
"""Sizes without a GPU: small, because sglang's kernels then run in an interpreter."""

ON_CPU = (
    "What these times mean: on a CPU this package computes in plain torch, the definition that its kernels must equal, and "
    "copy also writes every plane to every consumer, so that it may well take longer than the first. On a GPU either is one "
    "launch. Times of GPUs and engines are in docs/performance.md."
)
ON_GPU = (
    "What these times mean: host and GPU together, waited for after each round. Within an engine a GPU is not waited for, "
    "and with graph the host does nothing: docs/performance.md has such times."
)


class Contest(Protocol):
    """Several ways to prepare the same rounds."""

    contenders: tuple[str, ...]
    seconds: dict[str, list[float]]

    def run(self, entry: Round) -> list[str]:
        """Prepare a round with every contender; returns the values that differ."""

    def close(self) -> None:
        """Undo what was patched."""


def demo(engine: str, rounds: int, steps: list[int], trace: Path | None, seed: int, console: Console) -> int:
    """Run the trace for each number of draft steps; returns the exit status, 1 if any value differs."""
    gpu = torch.cuda.is_available()
    interpreted = engine == "sglang" and not gpu
    recorded = load(trace) if trace else None
    sizes = sizes_of(recorded) if recorded else SGLANG_ON_CPU if interpreted else Sizes()
    device = torch.device("cuda" if gpu else "cpu")
    where = torch.cuda.get_device_name(device) if gpu else "this CPU"
    console.print(f"[bold]nsa-plugin demo[/bold] on {where}, torch {torch.__version__}")
    wrong: list[str] = []
    checked = _table("Checked and counted", "steps", "preparation", "rounds", "values compared", "differ", "operations")
    times = _table(f"Time of one round on {where}, median", "steps", "preparation", "µs", "against the first")
    parts, notes = [], []
    for num_steps in steps:
        entries = recorded or list(generate(rounds, num_steps, sizes, seed))
        contest, differences = _play(engine, num_steps, entries, sizes, device, console)
        if isinstance(contest, Harness):
            parts.append(_operations(contest.original, num_steps - 1))
        baseline = statistics.median(contest.seconds[contest.contenders[0]])
        values = (num_steps - 1) * sum(_live_values(entry, sizes.page_size) for entry in entries)
        for name in contest.contenders:
            first = name == contest.contenders[0]
            different = sum(line.startswith(name) for line in differences)
            compared = ("the measure", "-") if first else (f"{values:,}", str(different))
            checked.add_row(str(num_steps), name, str(len(entries)), *compared, _count(contest, name))
            median = statistics.median(contest.seconds[name])
            times.add_row(str(num_steps), name, f"{median * 1e6:,.0f}", f"{baseline / median:.1f}×")
        if stale := getattr(contest, "stale", 0):
            notes.append(
                f"{num_steps} steps: sglang's shipped code left a schedule or plan of some draft backend stale in "
                f"{stale} of {len(entries)} rounds (known upstream; not counted as a difference)"
            )
        wrong += differences
    console.print(checked)
    for line in notes:
        console.print(line)
    for line in wrong[:10]:
        console.print(line, style="red", markup=False)
    console.print(f"[red]{len(wrong)} values differ[/red]" if wrong else "Every live value of every round is equal.")
    if interpreted:
        console.print("No times: without a GPU sglang's kernels run in an interpreter, here only values are compared.")
        return int(bool(wrong))
    for table in (*parts, times):
        console.print(table)
    console.print(ON_GPU if gpu else ON_CPU)
    return int(bool(wrong))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("preparation", "operation") else "right")
    return table


def _live_values(entry: Round, page_size: int) -> int:
    """Values of a round that a draft step may read: four vectors and two page tables, without derived planes."""
    return 4 * len(entry.seq_lens) + 2 + sum(length - length // -page_size for length in entry.seq_lens)


def _count(contest: Contest, name: str) -> str:
    """What a round takes: torch operations, or one launch of a kernel of this package."""
    counted = getattr(contest, "operations", {}).get(name)
    return "-" if counted is None else "one launch" if counted == 0 else str(counted)


def _play(
    engine: str, num_steps: int, entries: list[Round], sizes: Sizes, device: torch.device, console: Console
) -> tuple[Contest, list[str]]:
    slots = SlotTable(sizes, device)
    differences: list[str] = []
    with contextlib.ExitStack() as stack:
        contest: Contest
        if engine == "sglang":
            require("sglang")
            stack.enter_context(stand_ins())
            contest = SglangHarness(sizes, INDEX_TOPK if device.type == "cuda" else 256, num_steps, slots.table)
        else:
            contest = Harness(sizes, INDEX_TOPK, num_steps, slots.table)
        stack.callback(contest.close)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            for entry in progress.track(entries, description=f"{num_steps} draft steps"):
                slots.advance(entry)
                differences += contest.run(entry)
    return contest, differences


def _operations(original: Original, consumers: int) -> Table:
    columns = ("operation", "calls, every step", "µs, every step", "calls, once", "µs, once")
    table = _table(f"Five operations of the first preparation, {consumers} consumers, each timed alone", *columns)
    rounds = len(original.seconds["page lookup"]) // consumers
    totals = [0.0] * 4
    for operation in OPERATIONS:
        seconds = original.seconds[operation]
        calls = len(seconds) // rounds
        every = statistics.median(sum(seconds[i : i + calls]) for i in range(0, len(seconds), calls)) * 1e6
        row = (calls, every, calls / consumers, every / consumers)
        totals = [total + value for total, value in zip(totals, row, strict=True)]
        table.add_row(
            operation,
            f"{row[0]:.0f}",
            f"{row[1]:,.1f}",
            f"{row[2]:.0f}",
            f"{row[3]:,.1f}",
            end_section=operation == OPERATIONS[-1],
        )
    table.add_row("total", f"{totals[0]:.0f}", f"{totals[1]:,.1f}", f"{totals[2]:.0f}", f"{totals[3]:,.1f}")
    return table
