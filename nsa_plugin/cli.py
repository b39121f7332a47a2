"""The console script `nsa-plugin`."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nsa_plugin.adapters.build import build
from nsa_plugin.core.errors import NsaPluginError, UnavailableError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="nsa-plugin", description=sys.modules["nsa_plugin"].__doc__)
    parser.add_argument("--version", action="version", version=f"nsa-plugin {build()}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="run a decode trace and check and time every way to prepare it")
    demo.add_argument("--engine", choices=("none", "sglang"), default="none", help="none: an embedded harness")
    demo.add_argument("--rounds", type=_positive, default=300, help="draft rounds to generate (default: %(default)s)")
    demo.add_argument("--steps", type=_steps, nargs="+", default=[4, 8], help="numbers of draft steps (default: 4 8)")
    demo.add_argument("--trace", type=Path, help="a recorded trace instead of a generated one (JSON lines)")
    demo.add_argument("--seed", type=int, default=0)
    bench = commands.add_parser("bench", help="measure every way to prepare a replay, in one run on the same inputs")
    bench.add_argument(
        "--engine", choices=("none", "sglang", "vllm"), default="none",
        help="none: this package alone; vllm: Model Runner V2's real speculator, whole drafts with a stand-in for the model "
        "(default: %(default)s)",
    )  # fmt: skip
    bench.add_argument(
        "--mode", choices=("decode", "verify", "extend"), nargs="+", default=["decode"],
        help="what to prepare (default: decode, all that vllm has)",
    )  # fmt: skip
    bench.add_argument(
        "--bs", type=_positive, nargs="+", default=[1, 8, 32, 128], help="batch sizes; vllm: captured ones, full"
    )
    bench.add_argument(
        "--ctx",
        type=_positive,
        nargs="+",
        default=[4096, 16384, 131072],
        help="context lengths: sequences of half to all of it",
    )
    bench.add_argument(
        "--steps",
        type=_steps,
        nargs="+",
        default=[4, 8],
        help="speculative steps (vllm: speculative tokens K), at least 2",
    )
    bench.add_argument(
        "--width", type=_positive, default=163840,
        help="columns of the token table (vllm: the model's maximal length), over 64 (default: %(default)s)",
    )  # fmt: skip
    bench.add_argument("--decode-impl", default="flashmla_kv", help="sglang's decode kernel (default: %(default)s)")
    bench.add_argument(
        "--seed-wheel",
        type=Path,
        help="sglang 0.5.6.post2's wheel, whose loop none and sglang are compared with (default: fetched with pip)",
    )
    bench.add_argument("--seed", type=int, help="of the random inputs (default: a fresh one, which the results name)")
    bench.add_argument(
        "--trace", type=Path, help="recorded batches (JSON lines) instead of random ones of --bs and --ctx"
    )
    bench.add_argument("--json", type=Path, help="write the results here")
    bench.add_argument("--plot", type=Path, help="draw the results here (PNG, SVG, PDF)")
    draw = commands.add_parser("plot", help="draw a result file of bench, which may come from another machine")
    draw.add_argument("results", type=Path, help="what bench wrote with --json")
    draw.add_argument("picture", type=Path, help="the plot (PNG, SVG, PDF)")
    commands.add_parser("plugins", help="list who provides what")
    doctor = commands.add_parser(
        "doctor", help="say what is installed, what each path would get, and what is in the way"
    )
    doctor.add_argument("--json", action="store_true", help="for machines")
    verify = commands.add_parser("verify", help="compute the batch of a repro file again, on any machine, and compare")
    verify.add_argument("file", type=Path, help="a file that NSA_PLUGIN_VERIFY left in NSA_PLUGIN_REPRO_DIR")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        if options.command == "plugins":
            console.print(_plugins())
            return 0
        if options.command == "doctor":
            from nsa_plugin.doctor.run import doctor as run_doctor

            return run_doctor(options.json, console)
        if options.command == "verify":
            return _verify(options.file, console)
        if options.command == "bench":
            return _bench(options, console)
        if options.command == "plot":
            from nsa_plugin.bench.report import plot

            plot(json.loads(options.results.read_text()), options.picture)
            return 0
        from nsa_plugin.demo.run import demo as run_demo

        return run_demo(options.engine, options.rounds, options.steps, options.trace, options.seed, console)
    except (NsaPluginError, OSError) as error:
        console.print(f"nsa-plugin: {error}", style="red", markup=False)
        return 2


def _bench(options: argparse.Namespace, console: Console) -> int:
    from nsa_plugin.bench.report import plot, terminal
    from nsa_plugin.bench.run import OURS, Options, bench

    def save(results: dict[str, Any]) -> None:
        if options.json is not None:
            options.json.write_text(json.dumps(results, indent=1) + "\n")

    results = bench(
        Options(
            options.engine, tuple(options.mode), tuple(options.bs), tuple(options.ctx), tuple(options.steps), options.width,
            options.decode_impl, options.seed_wheel, random.randrange(1 << 30) if options.seed is None else options.seed,
            options.trace,
        ),
        console, save,
    )  # fmt: skip
    console.print(terminal(results))
    if options.plot is not None:
        plot(results, options.plot)
    wrong = any(row["differs"] for cell in results["cells"] for name, row in cell["contenders"].items() if name in OURS)
    return 1 if wrong else 0


def _verify(path: Path, console: Console) -> int:
    """Compute a repro file's batch with each implementation; 1 if one of them differs from the engine's values."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    from nsa_plugin import repro

    recorded = repro.load(path)
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


def _plugins() -> Table:
    from nsa_plugin.host import Host
    from nsa_plugin.settings import Settings

    host = Host(Settings.from_environment())
    host.manager.load_third_parties()
    table = Table("hook", "plugins, in the order in which they are asked")
    for hook, names in host.manager.providers().items():
        table.add_row(hook, ", ".join(names) or "(built-in default)")
    return table


def _positive(text: str) -> int:
    return _at_least(text, 1)


def _steps(text: str) -> int:
    return _at_least(text, 2)


def _at_least(text: str, least: int) -> int:
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return int(text)
