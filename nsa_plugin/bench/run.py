"""Runs the benchmark: every contender of every cell, checked and measured."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import track

from nsa_plugin.bench.cell import SPARE_ROWS, Cell, Contender, recorded_cells
from nsa_plugin.bench.embedded import Embedded
from nsa_plugin.bench.measure import Spread, copy_rate, gpu_spread, host_spread
from nsa_plugin.core.batch import ForwardMode
from nsa_plugin.core.errors import UnavailableError, reject
from nsa_plugin.rigs.requirements import require
from nsa_plugin.rigs.sglang import original_loop
from nsa_plugin.rigs.sglang.backends import stand_ins
from nsa_plugin.trace import load

MODES = {"decode": ForwardMode.DECODE, "verify": ForwardMode.TARGET_VERIFY, "extend": ForwardMode.DRAFT_EXTEND}
PATHS = {"decode": "draft decode", "verify": "target verify", "extend": "draft extend"}
"""What a recorded trace calls the modes."""
OURS = frozenset(("copy", "share", "graph", "vllm in place"))
"""Contenders whose values this package computes: a wrong one is an error."""


class Subject(Protocol):
    """An engine's contenders on the inputs of one cell."""

    contenders: list[Contender]
    bytes: float
    """Bytes that one preparation must at least read and write."""

    def check(self, contender: Contender) -> list[str] | None:
        """Run every input; returns the names of wrong values, None if nothing can be compared. It can be timed afterwards."""

    def close(self) -> None:
        """Leave the engine as it was found."""


@dataclass(frozen=True)
class Options:
    """What to run; see `nsa-plugin bench --help`."""

    engine: str
    modes: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    contexts: tuple[int, ...]
    steps: tuple[int, ...]
    width: int
    decode_impl: str
    original_wheel: Path | None
    seed: int
    trace: Path | None = None
    index_kpool: int = 1


def bench(options: Options, console: Console, save: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Run and return the results in the form of the JSON file.

    `save` gets those so far after every cell, marked as incomplete until the last one is measured.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with contextlib.ExitStack() as stack:
        if options.engine == "vllm" and options.modes != ("decode",):
            reject(
                "--mode", "decode with --engine vllm", " ".join(options.modes),
                fix="leave --mode out: with vLLM only draft steps are measured",
            )  # fmt: skip
        if options.index_kpool > 1 and (options.engine != "sglang" or options.trace is not None):
            reject(
                "--index-kpool", "1 without --engine sglang, and with --trace", options.index_kpool,
                fix="take --engine sglang and random inputs",
            )  # fmt: skip
        if options.engine != "none":
            require(options.engine)
        if options.engine == "sglang":
            stack.enter_context(stand_ins())
        cells = _cells(options)
        _fits(cells, device)
        no_loop = options.engine == "vllm" or options.index_kpool > 1
        wheel = None if no_loop else _original_wheel(options.original_wheel, console)
        rate = copy_rate(device)
        results: dict[str, Any] = {
            **where(device),
            "engine": options.engine,
            "seed": options.seed,
            "copy_bytes_per_us": rate,
            "complete": False,
            "planned_cells": len(cells),
            "cells": [],
        }
        for cell in track(cells, description="cells", console=console):
            results["cells"].append(_run_cell(cell, options, device, wheel, rate))
            results["complete"] = len(results["cells"]) == len(cells)
            save(results)
    return results


def _cells(options: Options) -> list[Cell]:
    if options.trace is None:
        return [
            Cell(MODES[mode], batch_size, context, steps, options.width, options.seed, index_kpool=options.index_kpool)
            for mode in options.modes
            for batch_size in options.batch_sizes
            for context in options.contexts
            for steps in options.steps
        ]
    return [
        cell
        for mode in options.modes
        for cell in recorded_cells(MODES[mode], load(options.trace, PATHS[mode]), options.steps, options.width)
    ]


def _fits(cells: Sequence[Cell], device: torch.device) -> None:
    """Refuse, before anything is measured, a cell whose token table and one wide page table exceed the free memory."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    largest = max(cells, key=lambda cell: cell.batch_size * cell.width)
    needed = 4 * largest.width * (2 * largest.batch_size + SPARE_ROWS)
    if needed > free:
        what = f"{needed >> 20} MiB for batch size {largest.batch_size} and {largest.width} columns"
        reject(
            "--bs and --width", f"tables that fit into {free >> 20} MiB of free memory", what, fix="take less of either"
        )


def _run_cell(cell: Cell, options: Options, device: torch.device, wheel: Path | None, rate: float) -> dict[str, Any]:
    subject = _subject(cell, options, device, wheel)
    measured: dict[str, Any] = {}
    with contextlib.closing(subject):
        for contender in subject.contenders:
            wrong = subject.check(contender)
            host = None if contender.host is None else host_spread(contender.host)
            gpu, kernels = gpu_spread(contender.gpu)
            measured[contender.name] = {
                **_times("host", host),
                **_times("gpu", gpu),
                "kernels": kernels,
                "differs": wrong,
            }
    return {
        "mode": cell.mode.value,
        "batch_size": cell.batch_size,
        "context": cell.context,
        "steps": cell.steps,
        "width": cell.width,
        "index_kpool": cell.index_kpool,
        "bytes": subject.bytes,
        "floor_us": subject.bytes / rate,
        "contenders": measured,
    }


def _times(clock: str, spread: Spread | None) -> dict[str, Any]:
    if spread is None:
        return {f"{clock}_us": None}
    return {f"{clock}_us": spread.median, f"{clock}_spread_us": [spread.least, spread.largest]}


def _subject(cell: Cell, options: Options, device: torch.device, wheel: Path | None) -> Subject:
    """The contenders of a cell. An engine's module is imported here, where the engine is known to be installed."""
    if options.engine == "none":
        return Embedded(cell, device, wheel)
    if options.engine == "sglang":
        from nsa_plugin.bench.sglang_engine import Sglang

        return Sglang(cell, device, wheel, options.decode_impl)
    try:
        from nsa_plugin.bench.vllm_engine import Vllm
    except ImportError as error:
        raise UnavailableError(
            f"--engine vllm drives the speculator of Model Runner V2, as vLLM 0.32 and later have it: {error}"
        ) from error
    return Vllm(cell, device)


def _original_wheel(given: Path | None, console: Console) -> Path | None:
    if given is not None:
        original_loop.load_methods(given)  # refused before anything is measured
    try:
        return given if given is not None else original_loop.fetch_wheel(Path.home() / ".cache" / "nsa-plugin")
    except UnavailableError as error:
        message = f"without the original loop: {error}; give its wheel with --original-wheel"
        console.print(message, style="yellow", markup=False)
        return None


def where(device: torch.device) -> dict[str, Any]:
    """Machine, versions, date and command, for a result file."""
    versions = {"python": platform.python_version()}
    for name in ("nsa-plugin", "torch", "triton", "sglang", "sgl-kernel", "sglang-kernel", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    versions["torch"] = torch.__version__
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(
            Path(word).name if "/" in word else word
            for word in ("nsa-plugin" if "__main__" in sys.argv[0] else sys.argv[0], *sys.argv[1:])
        ),
    }
