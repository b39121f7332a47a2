"""What operators can watch: Prometheus metrics and NVTX ranges. Off, it adds nothing to a replay at all.

A replay only appends its duration to a list; a thread hands the list to `prometheus_client` once a second, because
that costs more than a replay. `prometheus_client` decides when it is imported whether it writes for several processes
(`PROMETHEUS_MULTIPROC_DIR`), so it is imported when the first plan is made: sglang (`--enable-metrics`) has set the
variable by then, and its `/metrics` serves what every process wrote there. vLLM sets it for several API servers only;
an operator sets it before the start otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

from nsa_plugin import background
from nsa_plugin.settings import Settings

logger = logging.getLogger("nsa_plugin")
BUCKETS = (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 1e-1)
"""Upper bounds of the latency histogram, in seconds."""
P = ParamSpec("P")
T = TypeVar("T")
Call = Callable[[Any], None]
"""Prepares the metadata of one replay of a batch."""
CHUNK = 16
"""Durations that are handed over before other threads get a turn."""


class Labels(NamedTuple):
    """Which replays: of which engine, of which of its paths, prepared how ("off": by the engine itself)."""

    engine: str
    mode: str
    strategy: str


class Metrics(NamedTuple):
    """The metrics of this process, as `prometheus_client` objects."""

    seconds: Any
    steps: Any
    buffer_bytes: Any
    fallbacks: Any
    mismatches: Any


@functools.cache
def prometheus() -> Metrics:
    """Make the metrics, once per process. Raises ImportError without `prometheus_client`."""
    import prometheus_client as client

    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        logger.warning(
            "nsa-plugin: PROMETHEUS_MULTIPROC_DIR is not set in this process: its metrics are kept, but the engine's "
            "/metrics can't serve them. sglang sets it with --enable-metrics; for vLLM set it before the start"
        )
    which = Labels._fields
    return Metrics(
        client.Histogram(
            "nsa_plugin_preparation_seconds",
            "Host time to prepare the attention metadata of one replay; its count is the number of replays",
            which,
            buckets=BUCKETS,
        ),
        client.Counter("nsa_plugin_steps", "Draft steps whose metadata was prepared", which),
        client.Gauge(
            "nsa_plugin_buffer_bytes",
            "Bytes of the buffers that hold the metadata of the captured batch sizes",
            which,
            multiprocess_mode="livesum",
        ),
        client.Counter(
            "nsa_plugin_fallbacks",
            "Times that something was handed back to the engine's own path",
            (*which, "stage", "cause"),
        ),
        client.Counter(
            "nsa_plugin_mismatches",
            "Verifications that found values other than the engine's own, by field",
            (*which, "field"),
        ),
    )


def missing(settings: Settings) -> dict[str, str]:
    """For each of the metrics that the settings ask for and that can't be had here: what to do."""
    problems = {}
    if "prometheus" in settings.metrics and importlib.util.find_spec("prometheus_client") is None:
        problems["prometheus"] = "prometheus_client is not installed; pip install 'nsa-plugin[metrics]'"
    if "nvtx" in settings.metrics and not hasattr(torch._C, "_nvtx"):
        problems["nvtx"] = "this build of torch has no NVTX; install one for CUDA"
    return problems


class Monitor:
    """Reports to wherever the settings say. What fails here is logged and left out; it reaches no engine."""

    def __init__(self, settings: Settings) -> None:
        problems = missing(settings)
        self._on = set(settings.metrics) - problems.keys()
        for name, problem in problems.items():
            logger.error("nsa-plugin: NSA_PLUGIN_METRICS=%s: %s", name, problem)
        self._pending: dict[tuple[Labels, int], list[float]] = {}
        self._flushing = threading.Lock()

    def instrument(self, call: Call, labels: Labels, steps: int) -> Call:
        """`call`, reported about; `call` itself if nothing is to be reported. `steps`: draft steps that it serves."""
        if (record := self.durations(labels, steps)) is not None:
            call = _timed(call, record)
        return self.ranged(call, labels)

    def durations(self, labels: Labels, steps: int) -> Callable[[float], None] | None:
        """Where the seconds of a replay go whose work is spread over several calls; None if nobody wants them."""
        with self._reporting("prometheus") as on:
            if on:
                prometheus()
                background.every_second(self.flush)
                return self._pending.setdefault((labels, steps), []).append
        return None

    def ranged(self, call: Callable[P, T], labels: Labels) -> Callable[P, T]:
        """`call` in an NVTX range of its own; `call` itself if nobody wants one."""
        return _ranged(call, f"nsa-plugin {labels.mode} {labels.strategy}") if "nvtx" in self._on else call

    def buffers(self, labels: Labels, size: int) -> None:
        """Buffers of `size` bytes are in use (negative: no longer)."""
        with self._reporting("prometheus") as on:
            if on:
                prometheus().buffer_bytes.labels(*labels).inc(size)

    def fell_back(self, labels: Labels, stage: str, cause: str) -> None:
        """Something was handed back to the engine."""
        with self._reporting("prometheus") as on:
            if on:
                prometheus().fallbacks.labels(*labels, stage, cause).inc()

    def mismatched(self, labels: Labels, fields: list[str]) -> None:
        """A verification found a difference."""
        with self._reporting("prometheus") as on:
            for field in fields if on else ():
                prometheus().mismatches.labels(*labels, field).inc()

    @contextlib.contextmanager
    def _reporting(self, name: str) -> Iterator[bool]:
        try:
            yield name in self._on
        except Exception:
            self._on.discard(name)
            logger.exception("nsa-plugin: NSA_PLUGIN_METRICS=%s failed: it is left out from now on", name)

    def flush(self) -> None:
        """Hand over what has been measured since the last time."""
        with self._flushing:
            self._flush()

    def _flush(self) -> None:
        for (labels, steps), durations in tuple(self._pending.items()):
            if not durations:
                continue
            metrics = prometheus()
            observe = metrics.seconds.labels(*labels).observe
            taken = durations[: len(durations)]
            del durations[: len(taken)]
            metrics.steps.labels(*labels).inc(steps * len(taken))
            for index, duration in enumerate(taken):
                observe(duration)
                if index % CHUNK == CHUNK - 1:
                    time.sleep(0)


def _timed(call: Call, record: Callable[[float], None]) -> Call:
    clock = time.perf_counter

    def timed(batch: Any) -> None:
        start = clock()
        call(batch)
        record(clock() - start)

    return timed


def _ranged(call: Callable[P, T], name: str) -> Callable[P, T]:
    from torch.cuda import nvtx

    push: Callable[[str], object] = nvtx.range_push
    pop: Callable[[], object] = nvtx.range_pop

    def ranged(*args: P.args, **kwargs: P.kwargs) -> T:
        push(name)
        try:
            return call(*args, **kwargs)
        finally:
            pop()

    return ranged
