"""Reduces a trace of torch's profiler to a few figures."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any


def summarise(path: Path) -> dict[str, Any]:
    """Kernels, launches, graph launches and the busy share of the GPU between the first and the last kernel.

    `path` is a trace in Chrome's format, gzipped. Times in µs.
    """
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    kernels = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and "dur" in event
    )
    calls = [event["name"] for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    busy, reached = 0.0, float("-inf")
    for start, end in kernels:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    wall = reached - kernels[0][0] if kernels else 0.0
    return {
        "kernels": len(kernels),
        "launches": sum("LaunchKernel" in name for name in calls),
        "graph_launches": sum("GraphLaunch" in name for name in calls),
        "gpu_busy_us": busy,
        "wall_us": wall,
    }
