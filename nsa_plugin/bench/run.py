"""Runs the benchmark: every contender of every cell, checked and measured."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from nsa_plugin.bench import embedded
from nsa_plugin.bench.cell import Cell, Contender, recorded_cells
from nsa_plugin.bench.measure import copy_rate, gpu_time, host_time
from nsa_plugin.core import api
from nsa_plugin.core.batch import BatchDescriptor, ForwardMode
from nsa_plugin.core.errors import UnavailableError
from nsa_plugin.core.metadata import differing_fields
from nsa_plugin.testing import seed
from nsa_plugin.testing.sglang_backends import installed_sglang
from nsa_plugin.trace import load

MODES = {"decode": ForwardMode.DECODE, "verify": ForwardMode.TARGET_VERIFY, "extend": ForwardMode.DRAFT_EXTEND}
PATHS = {"decode": "draft decode", "verify": "target verify", "extend": "draft extend"}
"""What a recorded trace calls the modes."""


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
    seed_wheel: Path | None
    seed: int
    trace: Path | None = None


def bench(options: Options, console: Console, save: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Run and return the results in the form of the JSON file; `save` gets those so far after every cell."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with contextlib.ExitStack() as stack:
        if options.engine == "sglang":
            stack.enter_context(installed_sglang())
        elif options.engine == "vllm":
            raise UnavailableError("--engine vllm: vLLM support is not there yet; use none or sglang")
        rate = copy_rate(device)
        wheel = _seed_wheel(options.seed_wheel, console)
        cells = _cells(options)
        results = {
            **where(device),
            "engine": options.engine,
            "seed": options.seed,
            "copy_bytes_per_us": rate,
            "cells": [],
        }
        for cell in track(cells, description="cells", console=console):
            results["cells"].append(_run_cell(cell, options, device, wheel, rate))
            save(results)
    return results


def _cells(options: Options) -> list[Cell]:
    if options.trace is None:
        return [
            Cell(MODES[mode], batch_size, context, steps, options.width, options.seed)
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


def _run_cell(cell: Cell, options: Options, device: torch.device, wheel: Path | None, rate: float) -> dict[str, Any]:
    geometry = cell.geometry(device)
    batches = cell.batches(device)
    floor = cell.bytes_to_move(batches) / rate
    measured: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        contenders = embedded.contenders(cell, batches, geometry, wheel)
        engine = None
        if options.engine == "sglang":
            from nsa_plugin.bench.sglang_engine import Sglang

            engine = Sglang(cell, batches, geometry, options.decode_impl)
            stack.callback(engine.close)
            contenders = [entry for entry in contenders if entry.name.startswith("seed")] + engine.contenders
        for contender in contenders:
            wrong = _check(batches, geometry, contender, engine)
            host = None if contender.host is None else host_time(contender.host)
            gpu, kernels = gpu_time(contender.gpu)
            measured[contender.name] = {"host_us": host, "gpu_us": gpu, "kernels": kernels, "differs": wrong}
    return {
        "mode": cell.mode.value,
        "batch_size": cell.batch_size,
        "context": cell.context,
        "steps": cell.steps,
        "width": cell.width,
        "bytes": cell.bytes_to_move(batches),
        "floor_us": floor,
        "contenders": measured,
    }


def _check(batches: list[BatchDescriptor], geometry: Any, contender: Contender, engine: Any) -> list[str]:
    """Run every input and compare with the reference, and with sglang's own per-backend values where it is there."""
    wrong: set[str] = set()
    for index, batch in enumerate(batches):
        contender.run(index)
        expected = api.precompute(batch, geometry, impl="reference")
        for step in contender.consumers:
            wrong |= set(differing_fields(expected, step))
        if engine is not None and not contender.name.startswith("seed"):
            wrong |= set(engine.stale(contender.name, index))
    return sorted(wrong)


def _seed_wheel(given: Path | None, console: Console) -> Path | None:
    try:
        return given if given is not None else seed.fetch_wheel(Path.home() / ".cache" / "nsa-plugin")
    except UnavailableError as error:
        message = f"without the seed-era loop: {error}; give its wheel with --seed-wheel"
        console.print(message, style="yellow", markup=False)
        return None


def where(device: torch.device) -> dict[str, Any]:
    """Machine, versions, date and command, for a result file."""
    versions = {"python": platform.python_version()}
    for name in ("nsa-plugin", "torch", "triton", "sglang", "sgl-kernel", "sglang-kernel"):
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
