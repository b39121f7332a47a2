"""Round times from the metrics that the engines expose for Prometheus.

Neither engine exposes how long its host is busy in a round.

- sglang divides the time between two outputs of a request by the tokens that came, so that a round is that times the
  accepted length.
- vLLM does not: the tokens of a round come together, and `inter_token_latency` is the time from round to round.
"""

from __future__ import annotations

import math
import re
import statistics
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import NoReturn

from nsa_plugin.core.errors import reject

SAMPLE = re.compile(r"([A-Za-z_:][\w:]*)(?:\{.*\})?\s+(\S+)(?:\s+-?\d+)?")
LATENCY = "{}:inter_token_latency_seconds"
ACCEPTED = "sglang:spec_accept_length"
TURNED_ON = {"sglang": "start sglang with --enable-metrics", "vllm": "start vLLM without --disable-log-stats"}
MOST_BYTES = 1 << 25
TIMEOUT_S = 10


def read(source: str) -> str:
    """The text behind an http(s) URL or in a file.

    Raises
    ------
    InvalidValueError
        It is neither, or can't be read.
    """
    try:
        if source.startswith(("http://", "https://")):
            with urllib.request.urlopen(source, timeout=TIMEOUT_S) as answer:
                found: bytes = answer.read(MOST_BYTES)
        else:
            with Path(source).open("rb") as file:
                found = file.read(MOST_BYTES)
    except (OSError, ValueError, HTTPException) as error:  # the last two: no URL and no name of a file after all
        reject("metrics", "a URL of an engine's /metrics, or a file", f"{source[:80]!r} ({error})")
    return found.decode(errors="replace")


def round_ms(text: str, engine: str) -> float:
    """Mean time of a decode round since the engine's start, in ms; rounds in which a prompt was read count too.

    Raises
    ------
    InvalidValueError
        The text has no such metrics, or they have counted nothing yet.
    """
    found: dict[str, list[float]] = {}
    for line in text.splitlines():
        if sample := SAMPLE.fullmatch(line.strip()):
            try:
                found.setdefault(sample[1], []).append(float(sample[2]))
            except ValueError:
                continue
    latency = LATENCY.format(engine)
    total, count = (sum(found.get(latency + end, ())) for end in ("_sum", "_count"))
    if not (0 < total < math.inf and 0 < count < math.inf):
        _missing(f"{latency}_sum and _count above 0", engine)
    if engine == "vllm":
        return 1e3 * total / count
    accepted = [value for value in found.get(ACCEPTED, ()) if 1 <= value < math.inf]
    if not accepted:
        _missing(f"{ACCEPTED} of at least 1", engine)
    return 1e3 * total / count * statistics.fmean(accepted)


def _missing(expected: str, engine: str) -> NoReturn:
    reject("metrics", expected, "none", fix=f"{TURNED_ON[engine]}, and send requests to it first")
