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
    where = torch.cuda.get_device_name(device) if gpu else "CPU (times say nothing about a GPU)"
    console.print(f"[bold]nsa-plugin demo[/bold] on {where}, torch {torch.__version__}")
    wrong = 0
    totals = Table(title="Preparation of one draft round, median", min_width=80)
    for column in ("draft steps", "preparation", "µs", "against the first", "rounds", "values that differ"):
        totals.add_column(column, justify="right" if column != "preparation" else "left")
    for num_steps in steps:
        entries = recorded or list(generate(rounds, num_steps, sizes, seed))
        contest, differences = _play(engine, num_steps, entries, sizes, device, console)
        if isinstance(contest, Harness):
            console.print(_operations(contest.original, num_steps - 1))
        baseline = statistics.median(contest.seconds[contest.contenders[0]])
        for name in contest.contenders:
            median = statistics.median(contest.seconds[name])
            count = sum(line.startswith(name) for line in differences)
            times = ("-", "-") if interpreted else (f"{median * 1e6:,.0f}", f"{baseline / median:.1f}×")
            totals.add_row(str(num_steps), name, *times, str(len(entries)), str(count))
        if stale := getattr(contest, "stale", 0):
            console.print(
                f"{num_steps} steps: sglang's shipped code left a schedule or plan of some draft backend stale in "
                f"{stale} of {len(entries)} rounds (known upstream; not counted as a difference)"
            )
        wrong += len(differences)
        for line in differences[:10]:
            console.print(line, style="red", markup=False)
    console.print(totals)
    if interpreted:
        console.print("No times: without a GPU sglang's kernels run in an interpreter, here only values are compared.")
    if wrong:
        console.print(f"[red]{wrong} values differ[/red]")
        return 1
    console.print("Every live value of every round is equal.")
    return 0


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
    table = Table(title=f"Operations of one round, {consumers} draft consumers")
    for column in ("operation", "calls, every step", "µs, every step", "calls, once", "µs, once"):
        table.add_column(column, justify="right" if column != "operation" else "left")
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
