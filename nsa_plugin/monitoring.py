"""Prometheus metrics and NVTX ranges for operators. Switched off, they add nothing to a replay.

A replay appends its duration to a list. A thread hands the list to `prometheus_client` once a second, because that takes
longer than a replay.

`prometheus_client` decides at its import whether it writes for several processes (`PROMETHEUS_MULTIPROC_DIR`). So it is
imported when the first plan is made: by then sglang (`--enable-metrics`) has set the variable, and its `/metrics` serves
what every process writes there. vLLM sets the variable for several API servers only; else an operator sets it before the
start.

`increase()` counts an event only if its series existed before. So labels of event counters come from fixed sets, and all
series start at 0 as soon as a path is known. The type of an error and the name of a field come from no fixed set: they
are labels of gauges, which hold the time of the last event.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar, get_args

import torch

from nsa_plugin import background
from nsa_plugin.adapters.build import source
from nsa_plugin.adapters.reporting import Stage
from nsa_plugin.settings import STRATEGIES, Settings

logger = logging.getLogger("nsa_plugin")
BUCKETS = (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 1e-1)
"""Upper bounds of the latency histogram, in seconds."""
P = ParamSpec("P")
T = TypeVar("T")
Call = Callable[[Any], None]
"""Prepares the metadata of one replay; takes the batch."""
CHUNK = 16
"""Durations that a flush hands over before it lets other threads run."""
SERVED_WITH = tuple(strategy for strategy in STRATEGIES if strategy != "auto")
"""Strategies that a path can be served with."""


class Labels(NamedTuple):
    """Labels of a replay: engine, path, and strategy ("off" is the engine's own code).

    The engine's label is `framework`, because vLLM's own metrics have a label `engine` for the number of an engine.
    """

    framework: str
    path: str
    strategy: str


class Metrics(NamedTuple):
    """The metrics of this process, as `prometheus_client` objects."""

    info: Any
    seconds: Any
    steps: Any
    buffer_bytes: Any
    fallbacks: Any
    last_fallback: Any
    verifications: Any
    mismatches: Any
    last_mismatch: Any


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
        client.Gauge(
            "nsa_plugin_info",
            "1; what runs here: this package, the engine, and the strategy that the settings ask for",
            ("framework", "version", "build", "engine_version", "strategy"),
            multiprocess_mode="max",
        ),
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
            "nsa_plugin_fallbacks", "Times that something was handed back to the engine's own path", (*which, "stage")
        ),
        client.Gauge(
            "nsa_plugin_last_fallback_timestamp_seconds",
            "When something was last handed back to the engine's own path, by the type of the error",
            (*which, "stage", "cause"),
            multiprocess_mode="max",
        ),
        client.Counter("nsa_plugin_verifications", "Replays compared with the engine's own path", which),
        client.Counter("nsa_plugin_mismatches", "Verifications that found values other than the engine's own", which),
        client.Gauge(
            "nsa_plugin_last_mismatch_timestamp_seconds",
            "When a verification last found values other than the engine's own, by field",
            (*which, "field"),
            multiprocess_mode="max",
        ),
    )


def _engine_version(framework: str) -> str:
    try:
        return importlib.metadata.version(framework)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def missing(settings: Settings) -> dict[str, str]:
    """Metrics that the settings ask for and that can't work here, each with what to do."""
    problems = {}
    if "prometheus" in settings.metrics and importlib.util.find_spec("prometheus_client") is None:
        problems["prometheus"] = "prometheus_client is not installed; pip install 'nsa-plugin[metrics]'"
    if "nvtx" in settings.metrics and not hasattr(torch._C, "_nvtx"):
        problems["nvtx"] = "this build of torch has no NVTX; install one for CUDA"
    return problems


class Monitor:
    """Reports to what the settings name. An error in a report is logged and ends the reports; no engine sees it."""

    def __init__(self, settings: Settings) -> None:
        problems = missing(settings)
        self._on = set(settings.metrics) - problems.keys()
        for name, problem in problems.items():
            logger.error("nsa-plugin: NSA_PLUGIN_METRICS=%s: %s", name, problem)
        self._strategy = settings.strategy
        self._known: set[tuple[str, str]] = set()
        self._pending: dict[tuple[Labels, int], list[float]] = {}
        self._flushing = threading.Lock()

    def instrument(self, call: Call, labels: Labels, steps: int) -> Call:
        """Wrap `call` so that it is timed and has an NVTX range; `call` itself if the settings ask for neither.

        `steps` is the number of draft steps that a call serves.
        """
        if (record := self.durations(labels, steps)) is not None:
            call = _timed(call, record)
        return self.ranged(call, labels)

    def durations(self, labels: Labels, steps: int) -> Callable[[float], None] | None:
        """A function that takes the seconds of one replay; None if the settings ask for none.

        It is for a replay whose work is spread over several calls. `steps` is as in `instrument`.
        """
        with self._reporting("prometheus") as on:
            if on:
                self._metrics(labels)
                background.every_second(self.flush)
                return self._pending.setdefault((labels, steps), []).append
        return None

    def ranged(self, call: Callable[P, T], labels: Labels) -> Callable[P, T]:
        """Wrap `call` in an NVTX range; `call` itself if the settings ask for none."""
        return _ranged(call, f"nsa-plugin {labels.path} {labels.strategy}") if "nvtx" in self._on else call

    def buffers(self, labels: Labels, size: int) -> None:
        """Report `size` more bytes of buffers in use; negative for freed ones."""
        with self._reporting("prometheus") as on:
            if on:
                self._metrics(labels).buffer_bytes.labels(*labels).inc(size)

    def fell_back(self, labels: Labels, stage: str, cause: str) -> None:
        """Report that something was handed back to the engine's own path."""
        with self._reporting("prometheus") as on:
            if on:
                metrics = self._metrics(labels)
                metrics.fallbacks.labels(*labels, stage).inc()
                metrics.last_fallback.labels(*labels, stage, cause).set_to_current_time()

    def verified(self, labels: Labels) -> None:
        """Report that a replay was compared with the engine's own path."""
        with self._reporting("prometheus") as on:
            if on:
                self._metrics(labels).verifications.labels(*labels).inc()

    def mismatched(self, labels: Labels, fields: list[str]) -> None:
        """Report that a verification found a difference in these fields."""
        with self._reporting("prometheus") as on:
            if on:
                metrics = self._metrics(labels)
                metrics.mismatches.labels(*labels).inc()
                for field in fields:
                    metrics.last_mismatch.labels(*labels, field).set_to_current_time()

    def _metrics(self, labels: Labels) -> Metrics:
        """The metrics, with all event counters of the path of `labels` created, at 0 and for every strategy."""
        metrics = prometheus()
        framework, path, _ = labels
        if (framework, path) not in self._known:
            from nsa_plugin import __version__

            metrics.info.labels(framework, __version__, source(), _engine_version(framework), self._strategy).set(1)
            for which in (Labels(framework, path, strategy) for strategy in SERVED_WITH):
                metrics.verifications.labels(*which)
                metrics.mismatches.labels(*which)
                for stage in get_args(Stage):
                    metrics.fallbacks.labels(*which, stage)
            self._known.add((framework, path))
        return metrics

    @contextlib.contextmanager
    def _reporting(self, name: str) -> Iterator[bool]:
        try:
            yield name in self._on
        except Exception:
            self._on.discard(name)
            logger.exception("nsa-plugin: NSA_PLUGIN_METRICS=%s failed: it is left out from now on", name)

    def flush(self) -> None:
        """Hand over all durations since the last flush."""
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
