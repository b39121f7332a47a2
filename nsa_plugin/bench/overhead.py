"""What monitoring adds to the host time of a replay: `python -m nsa_plugin.bench.overhead [FILE.json]`.

Needs no GPU and no engine: a replay is a call of an empty function, as `Host.instrument` hands it to an adapter. With
everything off it is the function itself.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nsa_plugin.bench.run import where
from nsa_plugin.host import Host
from nsa_plugin.settings import Settings

CALLS = 200_000
REPEATS = 9


def _nothing(batch: Any) -> None:
    pass


def measure(metrics: frozenset[str]) -> dict[str, float]:
    """Nanoseconds per call that `metrics` add, and that a flush takes per replay in its own thread."""
    host = Host(Settings(metrics=metrics))
    monitored = host.instrument(_nothing, "sglang", "draft decode", "graph", 3)
    assert (monitored is _nothing) == (not metrics)
    plain, with_it, flush = [], [], []
    for _ in range(REPEATS):
        plain.append(_per_call(_nothing))
        with_it.append(_per_call(monitored))
        start = time.perf_counter()
        host.flush_metrics()
        flush.append((time.perf_counter() - start) / CALLS * 1e9)
    return {
        "added_ns": statistics.median(with_it) - statistics.median(plain),
        "flush_ns_in_background": statistics.median(flush) if "prometheus" in metrics else 0.0,
    }


def _per_call(call: Callable[[Any], None]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call(None)
    return (time.perf_counter() - start) / CALLS * 1e9


def main() -> None:
    """Measure off, Prometheus, and NVTX where there is a GPU."""
    results: dict[str, Any] = {**where(torch.device("cuda" if torch.cuda.is_available() else "cpu")), "settings": {}}
    choices = ["off", "prometheus"] + (["nvtx", "prometheus,nvtx"] if torch.cuda.is_available() else [])
    for choice in choices:
        metrics = frozenset(choice.split(",")) - {"off"}
        results["settings"][choice] = measure(metrics)
    text = json.dumps(results, indent=1)
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n")


if __name__ == "__main__":
    main()
