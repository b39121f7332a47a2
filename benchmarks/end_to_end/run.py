#!/usr/bin/env python3
"""Complete engines generate the same prompts: without the plugin, with it switched off, and with it, in one run.

There is one engine per variant and number of steps, all on the same GPU. All stay up, and requests take turns, so that
whatever the machine does happens to all. An engine whose turn it is not is stopped (SIGSTOP) and takes nothing from the
others. Tokens and rounds (accept lengths) are compared. Measured are the wall time of a request and, by the probe inside the
engine's process, the time from round to round and the host time of each part.

    python run.py --plugin DIR --probe DIR --json results.json [--steps 4 8] [--batch 1 8 32] [--prompt 1024 16384]
        [--model model_glm5_next] [--variants "no plugin" graph]

A model's folder may have arguments of each engine beside its config.json (`sglang.json`, `vllm.json`). The first DIR has
what `pip install --target DIR` made of the plugin's wheel, with its dependencies; the second has the same of `probe/`. Both
go on PYTHONPATH. The variants differ in that and in NSA_PLUGIN_STRATEGY, in nothing else. A run that is stopped (SIGTERM)
writes what it has measured.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from report import reduce

HERE = Path(__file__).resolve().parent
NO_PLUGIN = "no plugin"
STRATEGIES = ("off", "auto", "graph", "share", "copy")
VARIANTS = (NO_PLUGIN, "off", "auto")
"""What a run compares if nothing else is said. `auto` leaves to the engine what has not run on a GPU; a named one takes it."""
RECORDING = "recording"
"""Variant of a further engine, with the plugin and the recorder, that is not measured."""
TRACED = ((1, 300, 40), (3, 1500, 60), (6, 700, 60), (11, 2500, 40))
"""Number of requests, tokens of the longest prompt, and new tokens, of each batch that is recorded."""
WARM_UP_TOKENS = 24
FIRSTS = 3
"""How often each engine reads the prompts of a cell before its turns; the median is the time until the first token."""
SAME_KERNELS = {"TRITON_CACHE_AUTOTUNING": "1"}
"""What one engine's autotuning finds is what the next one uses: else they might run kernels that round differently."""
LOG_LINES = re.compile(r"nsa-plugin|Capture .*graph|Graph capturing finished|mem usage|Traceback|Error")


class Engine:
    """A worker process with an engine in it, in a process group of its own. It is stopped while it has nothing to do."""

    def __init__(self, name: str, worker: Path, config: dict[str, Any], environment: dict[str, str], out: Path) -> None:
        self.name = name
        self.folder = out / name.replace(" ", "-")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ready: dict[str, Any] | None = None
        self._log = self.folder / "log.txt"
        self._process = subprocess.Popen(
            [sys.executable, str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log.open("w"),
            text=True, env={**environment, "E2E_CONFIG": json.dumps(config), "E2E_TIMES": str(self.folder)},
            start_new_session=True,
        )  # fmt: skip

    def wait(self, seconds: float) -> None:
        """Wait until it is up; raise RuntimeError with the end of its log if it does not come up."""
        with self._limit(seconds):
            self.ready = self._read()
        self._signal(signal.SIGSTOP)

    def ask(self, request: dict[str, Any], seconds: float = 300) -> dict[str, Any]:
        """Send a request and wait for the answer."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        with self._limit(seconds):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._read()
        self._signal(signal.SIGSTOP)
        return answer

    def idle(self, seconds: float) -> None:
        """Let it run without a request: its background threads look at files and write metrics."""
        self._signal(signal.SIGCONT)
        time.sleep(seconds)
        self._signal(signal.SIGSTOP)

    def pin(self, cores: Collection[int]) -> None:
        """Keep all of its threads on some CPU cores. Threads that come later inherit that."""
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if int(status.read_text().rpartition(")")[2].split()[2]) == self._process.pid:
                    for thread in (status.parent / "task").iterdir():
                        os.sched_setaffinity(int(thread.name), cores)

    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def quit(self) -> None:
        """Ask it to end; kill what is left of it."""
        self._signal(signal.SIGCONT)
        with contextlib.suppress(Exception):
            assert self._process.stdin is not None
            self._process.stdin.write('{"op": "quit"}\n')
            self._process.stdin.flush()
            self._process.wait(30)
        self._signal(signal.SIGKILL)

    def times(self) -> list[dict[str, list[list[float]]]]:
        """What the probe wrote, one entry per rank."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("times_*.json"))]

    def log_lines(self) -> list[str]:
        """Lines of its log that say what was loaded, captured and allocated."""
        lines = self._log.read_text(errors="replace").splitlines()
        return [line[-300:] for line in lines if LOG_LINES.search(line)]

    @contextlib.contextmanager
    def _limit(self, seconds: float) -> Iterator[None]:
        """Kill it if the block takes longer than `seconds`."""
        timer = threading.Timer(seconds, self._signal, [signal.SIGKILL])
        timer.daemon = True  # a run that is stopped right here does not wait for it
        try:
            timer.start()
            yield
        finally:
            timer.cancel()

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to all of its processes that are left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-40:])
        raise RuntimeError(f"engine {self.name} ended; the end of its log:\n{tail}")


def start(
    options: argparse.Namespace, steps: int, variant: str, number: int, settings: dict[str, str] | None = None
) -> Engine:
    """Start an engine, with the plugin settings of its variant or with others; returns before it is up."""
    path = [options.probe] + ([] if variant == NO_PLUGIN else [options.plugin])
    if settings is None:
        settings = {"NSA_PLUGIN_STRATEGY": variant} if variant in STRATEGIES else {}
    environment = {**os.environ, **SAME_KERNELS, **options.environment, **settings}
    if variant == RECORDING:
        path.append(options.recorder)
        environment["RECORD_TRACE"] = str(options.out / "trace.jsonl")
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])])
    config = {
        "model": str(options.model), "steps": steps, "tp": options.tp, "dp_attention": options.dp_attention,
        "max_batch_size": max(options.batch), "port": options.first_port + 1000 * number,
        "max_tokens": max(options.batch) * (max(options.prompt) + options.new_tokens + 1024),
        "arguments": arguments(options.model, options.engine) | options.arguments,
    }  # fmt: skip
    return Engine(f"{steps} {variant}", HERE / f"{options.engine}_worker.py", config, environment, options.out)


def arguments(model: Path, engine: str) -> dict[str, Any]:
    """Arguments of an engine that a model needs, over those of the worker: `ENGINE.json` in the model's folder, if it is there."""
    file = model / f"{engine}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def start_all(options: argparse.Namespace) -> dict[str, Engine]:
    """Start every engine. The first starts alone: it compiles what the others then find in caches."""
    wanted = [(steps, variant) for steps in options.steps for variant in reversed(options.variants)]
    wanted += [(options.steps[0], RECORDING)] if options.recorder else []
    engines: dict[str, Engine] = {}
    waiting: list[Engine] = []
    for index, (steps, variant) in enumerate(wanted):
        engine = start(options, steps, variant, index)
        waiting.append(engine)
        if index not in (0, len(wanted) - 1):
            continue
        for engine in waiting:
            try:
                engine.wait(options.start_seconds)
                engines[engine.name] = engine
                say(f"{engine.name}: up after {engine.ready}")
            except RuntimeError as error:
                say(f"{engine.name}: {error}")
        waiting = []
    return engines


def random_prompts(model: Path, rng: random.Random, lengths: Sequence[int]) -> list[list[int]]:
    """Random prompts of the given lengths. The first and last ten tokens of the vocabulary are left out."""
    config = json.loads((model / "config.json").read_text())
    vocabulary = config.get("text_config", config)["vocab_size"]
    return [[rng.randrange(10, vocabulary - 10) for _ in range(length)] for length in lengths]


def measure(options: argparse.Namespace, engines: dict[str, Engine]) -> Iterator[dict[str, Any]]:
    """Measure cell by cell."""
    rng = random.Random(options.seed)
    begun = time.perf_counter()
    for batch, length, steps in itertools.product(options.batch, options.prompt, options.steps):
        if time.perf_counter() - begun > options.seconds:
            say(f"batch {batch}, prompt {length}, steps {steps}: left out, over {options.seconds:.0f} s")
            continue
        present = [name for name in options.variants if (engine := engines.get(f"{steps} {name}")) and engine.alive()]
        if not present:
            say(f"batch {batch}, prompt {length}, steps {steps}: left out, no engine for it is up")
            continue
        prompts = random_prompts(options.model, rng, [length] * batch)
        try:
            cell = take_turns(options, {variant: engines[f"{steps} {variant}"] for variant in present}, prompts)
        except (RuntimeError, OSError) as error:
            say(f"batch {batch}, prompt {length}, steps {steps}: left out, {error}")
            continue
        say(f"batch {batch}, prompt {length}, steps {steps}: {1 + cell['runs'][-1]['turn']} turns")
        yield {"steps": steps, "prompt": length, "batch": batch, **cell}


def take_turns(options: argparse.Namespace, engines: dict[str, Engine], prompts: list[list[int]]) -> dict[str, Any]:
    """Every variant generates the same prompts once a turn, in random order, until the cell's time is over."""
    order = random.Random(options.seed)
    cell: dict[str, Any] = {"runs": [], "first": {}}
    one = {"op": "generate", "prompts": prompts, "max_new_tokens": 1}
    many = one | {"max_new_tokens": options.new_tokens}
    firsts = []
    for engine in engines.values():
        engine.ask(one | {"max_new_tokens": WARM_UP_TOKENS})
        for _ in range(FIRSTS):
            answer = engine.ask(one)
            firsts.append(answer["end"] - answer["start"])
    # Prompts are read in the same way in all variants: with a time for each, its error would be in every pair of a variant.
    cell["first"] = dict.fromkeys(engines, statistics.median(firsts))
    started, turn = time.perf_counter(), 0
    while turn < options.most and (turn == 0 or time.perf_counter() - started < options.seconds_per_cell):
        for variant in order.sample(list(engines), len(engines)):
            cell["runs"].append({"variant": variant, "turn": turn, **engines[variant].ask(many)})
        turn += 1
    return cell


def record(options: argparse.Namespace, engine: Engine) -> None:
    """Have the recording engine generate batches of unequal requests."""
    rng = random.Random(options.seed)
    for requests, longest, new_tokens in TRACED:
        lengths = [longest] + [rng.randrange(1, longest) for _ in range(requests - 1)]
        prompts = random_prompts(options.model, rng, lengths)
        engine.ask({"op": "generate", "prompts": prompts, "max_new_tokens": new_tokens})


def profiles(options: argparse.Namespace, engines: dict[str, Engine]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What torch's profiler sees in some rounds of one request, engine by engine. Of several ranks it sees one."""
    if options.tp > 1:
        return
    prompts = random_prompts(options.model, random.Random(options.seed), options.prompt[:1])
    for name, engine in engines.items():
        if name.endswith(RECORDING) or not engine.alive():
            continue
        request = {"op": "profile", "prompts": prompts, "max_new_tokens": 40, "folder": str(engine.folder / "trace")}
        try:
            yield name, engine.ask(request, 60)
        except (RuntimeError, OSError) as error:
            yield name, {"error": str(error)[:300]}


def up(number: int, options: argparse.Namespace) -> None:
    """Say how many engines are up, and wait for the file that says when to measure."""
    say(f"{number} engines are up")
    while options.wait_for is not None and not options.wait_for.exists():
        time.sleep(0.2)


def say(text: str) -> None:
    """Print at once, with the seconds since the start."""
    print(f"[{time.perf_counter() - STARTED:6.1f}] {text}", flush=True)


def command() -> str:
    """The command line, with the last part of each path."""
    return " ".join(Path(word).name if "/" in word else word for word in sys.argv)


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all runs have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("sglang", "vllm"), default="sglang")
    parser.add_argument("--plugin", type=Path, required=True, help="folder with the installed plugin")
    parser.add_argument("--probe", type=Path, required=True, help="folder with the installed probe")
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument(
        "--environment", type=_pair, nargs="*", default=[], metavar="NAME=VALUE", help="of every engine"
    )
    parser.add_argument(
        "--arguments", type=json.loads, default={}, metavar="JSON", help="of every engine, over those of its model"
    )
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel ranks, one GPU each")
    parser.add_argument("--dp-attention", action="store_true", help="sglang: the ranks share requests, not heads")
    parser.add_argument("--first-port", type=int, default=30000, help="the first engine's; each has a thousand")
    parser.add_argument("--start-seconds", type=float, default=300, help="how long an engine may take to come up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("end-to-end"), help="folder for logs and traces")
    parser.add_argument("--json", type=Path, required=True)
    return parser


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse and check the options. Afterwards the plugin can be imported here too: `report` asks it for versions."""
    options = parser.parse_args()
    options.environment = dict(options.environment)
    if options.dp_attention and options.engine != "sglang":
        parser.error(f"--dp-attention: for sglang only, not {options.engine}; leave it out")
    sys.path.append(str(options.plugin))
    return options


def main() -> None:
    """Run, and write one JSON file."""
    parser = parser_of(__doc__)
    parser.add_argument("--recorder", type=Path, help="folder with the installed recorder: record a trace too")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=VARIANTS,
        choices=(NO_PLUGIN, *STRATEGIES),
        help="default: no plugin, off, auto",
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, nargs="+", default=[1024, 16384])
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--most", type=int, default=3, help="turns per cell at most")
    parser.add_argument("--seconds", type=float, default=1800, help="no further cell after this time")
    parser.add_argument("--seconds-per-cell", type=float, default=30, help="no further turn after this time")
    parser.add_argument("--wait-for", type=Path, help="measure only when this file is there")
    options = parse(parser)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(f"stopped by signal {number}"))
    engines = start_all(options)
    up(len(engines), options)
    results: dict[str, Any] = {
        "engine": options.engine, "tp": options.tp, "dp_attention": options.dp_attention,
        "date": datetime.date.today().isoformat(), "command": command(),
        "start_s": {name: engine.ready["start_s"] for name, engine in engines.items() if engine.ready}, "cells": [],
    }  # fmt: skip
    raw = options.json.with_suffix(".raw.json")
    try:
        for cell in measure(options, engines):
            results["cells"].append(cell)
            raw.write_text(json.dumps(results))
        if recording := engines.get(f"{options.steps[0]} {RECORDING}"):
            record(options, recording)
        results["profiles"] = {}
        for name, profile in profiles(options, engines):
            results["profiles"][name] = profile
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what was measured is written, whoever loses patience
        time.sleep(1.5)
        results["logs"] = {name: engine.log_lines() for name, engine in engines.items()}
        for engine in engines.values():
            engine.quit()
        results["times"] = {name: engine.times() for name, engine in engines.items()}
        raw.write_text(json.dumps(results))
        options.json.write_text(json.dumps(reduce(results), indent=1) + "\n")
        say("done")


STARTED = time.perf_counter()
if __name__ == "__main__":
    main()
