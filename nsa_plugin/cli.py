"""The console script `nsa-plugin`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nsa_plugin import __version__
from nsa_plugin.core.errors import NsaPluginError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="nsa-plugin", description=sys.modules["nsa_plugin"].__doc__)
    parser.add_argument("--version", action="version", version=f"nsa-plugin {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="run a decode trace and check and time every way to prepare it")
    demo.add_argument("--engine", choices=("none", "sglang"), default="none", help="none: an embedded harness")
    demo.add_argument("--rounds", type=_positive, default=300, help="draft rounds to generate (default: %(default)s)")
    demo.add_argument("--steps", type=_steps, nargs="+", default=[4, 8], help="numbers of draft steps (default: 4 8)")
    demo.add_argument("--trace", type=Path, help="a recorded trace instead of a generated one (JSON lines)")
    demo.add_argument("--seed", type=int, default=0)
    commands.add_parser("plugins", help="list who provides what")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        if options.command == "plugins":
            console.print(_plugins())
            return 0
        from nsa_plugin.demo.run import demo as run_demo

        return run_demo(options.engine, options.rounds, options.steps, options.trace, options.seed, console)
    except (NsaPluginError, OSError) as error:
        console.print(f"[red]nsa-plugin: {error}[/red]")
        return 2


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
