"""Runs the benchmark: every contender of every cell, checked and measured."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import itertools
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import track

from nsa_plugin.bench.cell import PAGE_SIZE, SPARE_ROWS, Cell, Contender, recorded_cells
from nsa_plugin.bench.embedded import Embedded
from nsa_plugin.bench.measure import GpuTime, Spread, copy_rate, gpu_time, host_spread
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
LAUNCHES = ("metadata_kernel", "copy_kernel")
"""This package's kernels that prepare a replay, as a profile names them. What an engine's functions derive is not theirs."""
ONE_LAUNCH = frozenset(("copy", "share", "graph"))
"""Contenders that launch each of them once."""
SHOWN = 12
"""Kernels of a contender whose times are kept by name."""


class Subject(Protocol):
    """An engine's contenders on the inputs of one cell."""

    bytes: float
    """Bytes that one preparation must at least read and write."""

    @property
    def contenders(self) -> Iterable[Contender]:
        """In the order in which they are checked and measured, each before the next one is asked for."""

    def check(self, contender: Contender) -> list[str] | None:
        """Run every input; returns the names of wrong values, None if nothing can be compared. It can be timed afterwards."""

    def close(self) -> None:
        """Leave the engine as it was found."""


DENSE = {"fa3": (1, 16, 32, 64, 128), "flashmla": (64,)}
"""sglang's backends of dense attention by its names for them, with tokens per page of the cache, the default first."""


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
    backend: str = "dsa"
    page_size: int | None = None

    @property
    def is_dense(self) -> bool:
        """Whether a backend of dense attention is measured."""
        return self.backend in DENSE

    @property
    def tokens_per_page(self) -> int:
        """Of the cache: as asked for, else sglang's default for the backend."""
        return self.page_size or DENSE.get(self.backend, (PAGE_SIZE,))[0]

    def check(self) -> None:
        """Refuse what does not go together, before an engine is imported."""
        if self.engine == "vllm" and self.modes != ("decode",):
            reject(
                "--mode", "decode with --engine vllm", " ".join(self.modes),
                fix="leave --mode out: with vLLM only draft steps are measured",
            )  # fmt: skip
        random = self.engine == "sglang" and self.trace is None
        if self.index_kpool > 1 and (not random or self.is_dense):
            reject(
                "--index-kpool", "1 without --engine sglang, with --trace, and with another --backend than dsa",
                self.index_kpool, fix="take --engine sglang, --backend dsa and random inputs",
            )  # fmt: skip
        if self.is_dense and not random:
            reject(
                "--backend", "dsa without --engine sglang, and with --trace", self.backend,
                fix="take --engine sglang and random inputs",
            )  # fmt: skip
        sizes = DENSE.get(self.backend, (PAGE_SIZE,))
        if self.tokens_per_page not in sizes:
            reject("--page-size", f"{' or '.join(map(str, sizes))} with --backend {self.backend}", self.page_size)


def bench(options: Options, console: Console, save: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Run and return the results in the form of the JSON file.

    `save` gets those so far after every cell, marked as incomplete until the last one is measured.
    """
    options.check()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with contextlib.ExitStack() as stack:
        if options.engine != "none":
            require(options.engine)
        if options.engine == "sglang":
            stack.enter_context(stand_ins())
        cells = _cells(options)
        _fits(cells, device)
        no_loop = options.engine == "vllm" or options.index_kpool > 1 or options.is_dense
        wheel = None if no_loop else _original_wheel(options.original_wheel, console)
        rate = copy_rate(device)
        results: dict[str, Any] = {
            **where(device),
            "engine": options.engine,
            **_backend(options),
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
        pages = options.index_kpool, options.tokens_per_page
        return [
            Cell(MODES[mode], batch_size, context, steps, options.width, options.seed, None, *pages)
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
            gpu = gpu_time(contender.gpu)
            measured[contender.name] = {
                **_times("host", host),
                **_times("gpu", None if gpu is None else gpu.spread),
                "kernels": None if gpu is None else gpu.kernels,
                **_by_kernel(contender.name, gpu),
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


def _by_kernel(name: str, gpu: GpuTime | None) -> dict[str, Any]:
    """µs of the longest kernels, and of this package's own launches if each ran once at most."""
    if gpu is None:
        return {}
    ours = [time for kernel, time in gpu.by_kernel.items() if kernel.startswith(LAUNCHES)]
    launch = {"launch_us": sum(ours)} if name in ONE_LAUNCH and ours else {}
    return {**launch, "gpu_us_by_kernel": dict(itertools.islice(gpu.by_kernel.items(), SHOWN))}


def _backend(options: Options) -> dict[str, Any]:
    """What the results say of a backend of dense attention."""
    if not options.is_dense:
        return {}
    from nsa_plugin.rigs.sglang.dense import has_compiled_schedule

    said: dict[str, Any] = {"backend": options.backend, "page_size": options.tokens_per_page}
    if options.backend == "flashmla":
        said["schedule"] = "compiled" if has_compiled_schedule() else "stand-in"
    return said


def _subject(cell: Cell, options: Options, device: torch.device, wheel: Path | None) -> Subject:
    """The contenders of a cell. An engine's module is imported here, where the engine is known to be installed."""
    if options.engine == "none":
        return Embedded(cell, device, wheel)
    if options.is_dense:
        from nsa_plugin.bench.sglang_dense import SglangDense

        return SglangDense(cell, device, "fa3" if options.backend == "fa3" else "flashmla")
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
    for name in ("nsa-plugin", "torch", "triton", "sglang", "sgl-kernel", "sglang-kernel", "sgl-flash-mla", "vllm"):
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
