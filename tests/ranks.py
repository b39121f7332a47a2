"""Processes that stand for the ranks of an engine."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

Body = Callable[[int, int, str], Any]
"""What a rank does: its number, how many there are, and a `file://` address to meet at; returns what JSON can hold."""

ROOT = Path(__file__).resolve().parents[1]


HUNG = 600.0
"""Seconds after which processes are taken to hang: many times what they need, because other work may slow them down."""


def run(start: Literal["spawn", "fork"], world: int, body: Body) -> list[Any]:
    """Run `body` in `world` processes; returns what each of them returned.

    Raises
    ------
    RuntimeError
        A rank failed, or had not ended after `HUNG` seconds; then all are killed.
    """
    context: Any = multiprocessing.get_context(start)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(body, rank, world, folder), name=f"rank {rank}")
            for rank in range(world)
        ]  # fmt: skip
        for process in processes:
            process.start()
        deadline = time.monotonic() + HUNG
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0))
        hung = [process.name for process in processes if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        answers = [_answer(Path(folder, f"{rank}.json")) for rank in range(world)]
        failed = [f"rank {rank}: {answer['error']}" for rank, answer in enumerate(answers) if "error" in answer]
        if hung or failed:
            raise RuntimeError("\n".join([f"{start}: not ended after {HUNG} s: {hung}", *failed]))
        return [answer["value"] for answer in answers]


def script(module: str, **environment: str) -> Any:
    """Run a test module as a script in a fresh process, which prints JSON as its last line; returns that.

    Settings of the plugin and of which plugins an engine loads are not inherited.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("NSA_PLUGIN_") and name not in ("SGLANG_PLUGINS", "VLLM_PLUGINS")
    }
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": _paths()}
    done = subprocess.run(
        [sys.executable, "-m", module], env={**inherited, **own, **environment}, cwd=ROOT, capture_output=True,
        text=True, timeout=2 * HUNG,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-8000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def _paths() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def _rank(body: Body, rank: int, world: int, folder: str) -> None:
    try:
        answer = {"value": body(rank, world, f"file://{folder}/store")}
    except BaseException:
        answer = {"error": traceback.format_exc()}
    part = Path(folder, f"{rank}.part")
    part.write_text(json.dumps(answer))
    part.rename(part.with_suffix(".json"))


def _answer(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"error": "ended without an answer"}
