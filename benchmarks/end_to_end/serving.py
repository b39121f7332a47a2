"""What both workers need: serving an engine over JSON lines, and the batch sizes that it captures."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

Answer = Callable[[Any, dict[str, Any]], dict[str, Any]]
"""Answers a request; the first argument is the engine."""


def captured_sizes(largest: int) -> list[int]:
    """Batch sizes with a CUDA graph: the powers of two, and the largest size."""
    return sorted({*(1 << exponent for exponent in range(largest.bit_length())), largest})


def serve(
    start: Callable[[dict[str, Any]], Any], operations: Mapping[str, Answer], shutdown: Callable[[Any], object]
) -> None:
    """Start the engine that `E2E_CONFIG` (environment, JSON) asks for; answer requests from stdin until "quit".

    What the engine itself prints goes to stderr. Ends the process.
    """
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    started = time.perf_counter()
    engine = start(json.loads(os.environ["E2E_CONFIG"]))
    print(json.dumps({"ready": True, "start_s": time.perf_counter() - started}), file=out)
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "quit":
            break
        print(json.dumps(operations[request["op"]](engine, request)), file=out)
    time.sleep(2)  # the probe writes when nothing happens
    threading.Timer(10, os._exit, [0]).start()
    shutdown(engine)
    os._exit(0)
