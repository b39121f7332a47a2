"""What the commands of `nsa-plugin` do: a function each, of the command's name; returns the exit status."""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nsa_plugin import launch_lines
from nsa_plugin.core.errors import UnavailableError, reject


def demo(options: argparse.Namespace) -> int:
    """Run the demo."""
    from nsa_plugin.demo.run import demo as run

    return run(options.engine, options.rounds, options.steps, options.trace, options.seed, Console())


def bench(options: argparse.Namespace) -> int:
    """Measure; 1 if one of this package's ways gives a wrong value. After Ctrl-C what was measured is reported."""
    for path in (options.json, options.plot):
        _writable(path)
    if options.plot is not None:
        from nsa_plugin.bench import plots

        plots.check(options.plot)
    from nsa_plugin.bench.report import terminal
    from nsa_plugin.bench.results import save
    from nsa_plugin.bench.run import OURS, Options
    from nsa_plugin.bench.run import bench as run

    console, measured = Console(), {}

    def keep(results: dict[str, Any]) -> None:
        measured.update(results)
        if options.json is not None:
            save(options.json, results)

    def report() -> None:
        if measured:
            console.print(terminal(measured))
            if options.plot is not None:
                plots.plot(measured, options.plot)

    wanted = Options(
        options.engine, tuple(options.mode), tuple(options.bs), tuple(options.ctx), tuple(options.steps), options.width,
        options.decode_impl, options.original_wheel, random.randrange(1 << 30) if options.seed is None else options.seed,
        options.trace, options.index_kpool, options.backend, options.page_size,
    )  # fmt: skip
    try:
        run(wanted, console, keep)
    except KeyboardInterrupt:
        report()
        raise
    report()
    rows = [(name, row) for cell in measured["cells"] for name, row in cell["contenders"].items()]
    return int(any(row["differs"] for name, row in rows if name in OURS))


def plot(options: argparse.Namespace) -> int:
    """Draw a result file."""
    from nsa_plugin.bench import plots
    from nsa_plugin.bench.results import load

    _writable(options.picture)
    plots.plot(load(options.results), options.picture)
    return 0


def plugins(options: argparse.Namespace) -> int:
    """List the hooks and who implements them."""
    from nsa_plugin.host import Host
    from nsa_plugin.settings import Settings

    host = Host(Settings.from_environment())
    host.manager.load_third_parties()
    table = Table(title="plugins of each hook, in the order in which they are asked", title_justify="left")
    table.add_column("hook", no_wrap=True)
    table.add_column("plugins", overflow="fold")
    for hook, names in host.manager.providers().items():
        table.add_row(hook, ", ".join(names) or "(built-in default)")
    Console().print(table)
    return 0


def settings(options: argparse.Namespace) -> int:
    """List the settings; 1 if one was not understood and is at its default."""
    from nsa_plugin.settings import Settings

    found = Settings.from_environment()
    table = Table()
    for column, wrapped in (("variable", False), ("value", True), ("from", False)):
        table.add_column(column, no_wrap=not wrapped, overflow="fold")
    for row in found.rows():
        table.add_row(*row)
    Console().print(table)
    for _, mistake in found.mistakes:
        Console(stderr=True).print(f"nsa-plugin: {mistake}; the default is used", markup=False, style="yellow")
    return int(bool(found.mistakes))


def launch(options: argparse.Namespace) -> int:
    """Print the line that starts an engine."""
    print(launch_lines.line(options.engine, options.model))
    return 0


def estimate(options: argparse.Namespace) -> int:
    """Say what gain to expect."""
    from nsa_plugin.estimate import metrics
    from nsa_plugin.estimate.model import Measured, Round
    from nsa_plugin.estimate.report import show

    round_ms = options.round_ms
    if round_ms is None:
        round_ms = metrics.round_ms(metrics.read(options.metrics), options.engine)
    of = Round(options.engine, round_ms, options.host_ms, options.steps, options.context, options.batch, options.width)
    measured = Measured.load()
    show(measured, of, measured.estimate(of), Console())
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Report what is installed and what each path would get."""
    from nsa_plugin.doctor import run

    if options.json:
        return run.as_json()
    if options.check:
        return run.check()
    return run.doctor(Console(), everything=options.all, patches=options.patches)


def verify(options: argparse.Namespace) -> int:
    """Compute a repro file's batch with each implementation; 1 if one of them differs from the engine's values."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    from nsa_plugin import repro

    console, recorded = Console(), repro.load(options.file)
    facts = recorded.facts
    console.print(
        f"{facts['engine']}, {facts['path']}, strategy {facts['strategy']}, batch size {facts['batch_size']}; "
        f"recorded as different: {', '.join(facts['fields'])}; {facts['versions']}",
        markup=False,
    )
    table = Table("implementation", "other than the engine's values", "other than the plugin's values")
    wrong = False
    for impl in ("reference", "triton"):
        try:
            found = repro.recompute(recorded, impl)
        except UnavailableError as error:
            table.add_row(impl, str(error), "")
            continue
        wrong = wrong or bool(found["engine"])
        table.add_row(impl, ", ".join(found["engine"]) or "none", ", ".join(found["plugin"]) or "none")
    console.print(table)
    console.print("The difference shows here too." if wrong else "Here every implementation gives the engine's values.")
    return int(wrong)


def _writable(path: Path | None) -> None:
    """Refuse a file that could not be written, before the work that fills it."""
    if path is None:
        return
    if path.is_dir():
        reject(str(path), "a file to write", "a folder")
    if not path.parent.is_dir():
        reject(str(path), "a file in a folder that exists", f"no folder {path.parent}", fix=f"mkdir -p {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        reject(str(path), "a file that can be written", "no permission")
