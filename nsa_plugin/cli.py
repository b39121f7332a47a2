"""The console script `nsa-plugin`: its arguments. What the commands do is in `commands`, imported when one runs."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from nsa_plugin import __doc__ as about
from nsa_plugin import launch_lines
from nsa_plugin.adapters.build import named
from nsa_plugin.core.errors import NsaPluginError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""
MOST = 1 << 20
"""Largest batch size, context and table width: beyond it no engine goes."""
MOST_STEPS = 64
SHELLS = ("bash", "zsh", "tcsh")
DECODE_KERNELS = ("flashmla_kv", "flashmla_sparse", "flashmla_auto", "fa3", "tilelang", "aiter", "trtllm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status: 0, 1 for a finding, 2 for a wrong input, 130 after Ctrl-C.

    What was asked for goes to stdout, errors go to stderr.
    """
    try:
        options = parser().parse_args(arguments)
        status: int = getattr(import_module("nsa_plugin.commands"), options.command.replace("-", "_"))(options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (NsaPluginError, OSError) as error:
        return _say(str(error), 2)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="nsa-plugin", description=about)
    top.add_argument(
        "--version",
        action=_Version,
        nargs=0,
        help="print the release and the hash of the sources, and the commit of a build",
    )
    top.add_argument(
        "--print-completion", action=_PrintCompletion, choices=SHELLS, help="print a completion script for this shell"
    )
    commands = top.add_subparsers(dest="command", required=True)
    _demo(commands.add_parser("demo", help="run a decode trace and check and time every way to prepare it"))
    _bench(commands.add_parser("bench", help="measure every way to prepare a replay, in one run on the same inputs"))
    draw = commands.add_parser("plot", help="draw a result file of bench, which may come from another machine")
    draw.add_argument("results", type=_path, help="what bench wrote with --json")
    draw.add_argument("picture", type=_path, help="the plot (PNG, SVG, PDF)")
    commands.add_parser("plugins", help="list who provides what")
    commands.add_parser("settings", help="list the settings, their values here, and where each came from")
    launch = commands.add_parser("launch", help="print the line that starts an engine with a draft")
    launch.add_argument("engine", choices=launch_lines.ENGINES)
    launch.add_argument("--model", default=launch_lines.MODEL, help="its name or folder (default: %(default)s)")
    _estimate(commands.add_parser("estimate", help="say what gain to expect of an engine, from what was measured"))
    doctor = commands.add_parser(
        "doctor", help="say what is installed, what each path would get, and what is in the way"
    )
    how = doctor.add_mutually_exclusive_group()
    how.add_argument("--all", action="store_true", help="defaults, other hardware, other models and patches too")
    how.add_argument("--patches", action="store_true", help="what is patched in the engines too, and why")
    how.add_argument("--json", action="store_true", help="everything, for machines")
    how.add_argument(
        "--check", action="store_true",
        help="one line, for init containers; exit status 1 if something that was asked for can't be had",
    )  # fmt: skip
    verify = commands.add_parser("verify", help="compute the batch of a repro file again, on any machine, and compare")
    verify.add_argument("file", type=_path, help="a file that NSA_PLUGIN_VERIFY left in NSA_PLUGIN_REPRO_DIR")
    return top


def _demo(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("--engine", choices=("none", "sglang"), default="none", help="none: an embedded harness")
    demo.add_argument("--rounds", type=_positive, default=300, help="draft rounds to generate (default: %(default)s)")
    demo.add_argument("--steps", type=_steps, nargs="+", default=[4, 8], help="numbers of draft steps (default: 4 8)")
    demo.add_argument("--trace", type=_path, help="a recorded trace instead of a generated one (JSON lines)")
    demo.add_argument("--seed", type=_seed, default=0, help="of the generated trace (default: %(default)s)")


def _bench(bench: argparse.ArgumentParser) -> None:
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
        "--bs", type=_positive, nargs="+", default=[1, 8, 32, 128],
        help="batch sizes (default: 1 8 32 128); vllm: captured ones, full",
    )  # fmt: skip
    bench.add_argument(
        "--ctx", type=_positive, nargs="+", default=[4096, 16384, 131072],
        help="context lengths: sequences of half to all of it (default: 4096 16384 131072)",
    )  # fmt: skip
    bench.add_argument(
        "--steps", type=_steps, nargs="+", default=[4, 8],
        help="speculative steps (vllm: speculative tokens K), at least 2 (default: 4 8)",
    )  # fmt: skip
    bench.add_argument(
        "--width", type=_positive, default=163840,
        help=f"columns of the token table (vllm: the model's maximal length), at least --ctx + {MOST_STEPS} "
        "(default: %(default)s)",
    )  # fmt: skip
    bench.add_argument(
        "--decode-impl", choices=DECODE_KERNELS, default="flashmla_kv", metavar="KERNEL",
        help=f"sglang's decode kernel: {', '.join(DECODE_KERNELS)} (default: %(default)s)",
    )  # fmt: skip
    bench.add_argument(
        "--backend", choices=("dsa", "fa3", "flashmla"), default="dsa",
        help="sglang's attention backend: sparse (dsa), or dense (fa3, flashmla) (sglang only; default: %(default)s)",
    )  # fmt: skip
    bench.add_argument(
        "--page-size", type=_positive, metavar="TOKENS",
        help="tokens per page of the cache: 1, 16, 32, 64 or 128 with fa3 (default: 1, as in sglang), 64 with the others",
    )  # fmt: skip
    bench.add_argument(
        "--index-kpool", type=int, choices=(1, 2, 4, 8, 16), default=1, metavar="K",
        help="tokens that share an index key: 1, 2, 4, 8 or 16 (sglang only; default: %(default)s)",
    )  # fmt: skip
    bench.add_argument(
        "--original-wheel", type=_path,
        help="sglang 0.5.6.post2's wheel, whose loop none and sglang are compared with (default: fetched with pip)",
    )  # fmt: skip
    bench.add_argument("--seed", type=_seed, help="of the random inputs (default: a fresh one, named in the results)")
    bench.add_argument(
        "--trace", type=_path, help="recorded batches (JSON lines) instead of random ones of --bs and --ctx"
    )
    bench.add_argument("--json", type=_path, help="write the results here")
    bench.add_argument("--plot", type=_path, help="draw the results here (PNG, SVG, PDF)")


def _estimate(estimate: argparse.ArgumentParser) -> None:
    estimate.add_argument("--engine", choices=launch_lines.ENGINES, required=True)
    how = estimate.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--round-ms", type=_milliseconds, help="from one decode round to the next, in ms, without the plugin"
    )
    how.add_argument(
        "--metrics",
        metavar="URL-OR-FILE",
        help="the engine's /metrics, or a file with its text, in place of --round-ms",
    )
    estimate.add_argument(
        "--host-ms", type=_milliseconds,
        help="for which the scheduler's process is busy in a round, in ms (default: unknown)",
    )  # fmt: skip
    estimate.add_argument(
        "--steps", type=_steps, default=4, help="draft steps; vllm: draft tokens (default: %(default)s)"
    )
    estimate.add_argument("--context", type=_positive, default=4096, help="tokens of a sequence (default: %(default)s)")
    estimate.add_argument("--batch", type=_positive, default=1, help="sequences (default: %(default)s)")
    estimate.add_argument(
        "--width", type=_positive, default=163840, help="columns of the page table (default: %(default)s)"
    )


class _Version(argparse.Action):
    """Prints the build, whose sources are hashed only then, and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> None:
        print(f"nsa-plugin {named()}")
        parser.exit()


class _PrintCompletion(argparse.Action):
    """Prints a shell's completion script and exits, as `--help` does."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, shell: Any, option: str | None = None
    ) -> None:
        try:
            import shtab
        except ImportError:
            parser.error(f"{option} needs shtab: pip install 'nsa-plugin[completion]'")
        _complete_files(parser, shtab.FILE)
        print(shtab.complete(parser, shell))
        parser.exit()


def _complete_files(parser: argparse.ArgumentParser, file: Any) -> None:
    for action in parser._actions:
        if action.type is _path:
            action.complete = file  # type: ignore[attr-defined]
        elif isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command, file)


def _say(message: str, status: int) -> int:
    print(f"nsa-plugin: {message}", file=sys.stderr)
    return status


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected the name of a file, got {text[:40]!r}")
    return Path(text)


def _positive(text: str) -> int:
    return _whole(text, 1, MOST)


def _steps(text: str) -> int:
    return _whole(text, 2, MOST_STEPS)


def _seed(text: str) -> int:
    return _whole(text, 0, 1 << 30)


def _milliseconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) or float(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a time in ms, above 0 and below a million, got {text[:40]!r}")
    return float(text)


def _whole(text: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) <= most):
        raise argparse.ArgumentTypeError(f"expected a whole number of {least} to {most}, got {text[:40]!r}")
    return int(text)
