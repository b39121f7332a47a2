"""Host time, GPU time and kernels of a call. Without a GPU only the host is measured."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], object]
NAME = 120
"""Characters of a kernel's name that are kept: those of templates go on and on."""


@dataclass(frozen=True)
class Spread:
    """A median, and the least and the largest of what it is the median of, in microseconds."""

    median: float
    least: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of one value or more."""
        return cls(statistics.median(values), min(values), max(values))


def host_time(calls: Sequence[Call], repeats: int = 7, rounds: int = 12) -> float:
    """The median of `host_spread`."""
    return host_spread(calls, repeats, rounds).median


def host_spread(calls: Sequence[Call], repeats: int = 7, rounds: int = 12) -> Spread:
    """Host time of a call: the time for which the Python thread is busy, without a sync in between.

    The spread is over `repeats`, each the mean over `rounds`. `calls` take turns. Calls that take over 10 ms are measured
    once each.
    """
    start = time.perf_counter()
    for call in calls:
        call()
    if time.perf_counter() - start > 0.01 * len(calls):
        repeats = rounds = 1
    means = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        for _ in range(rounds):
            for call in calls:
                call()
        means.append((time.perf_counter() - start) / (rounds * len(calls)) * 1e6)
    synchronize()
    return Spread.of(means)


@dataclass(frozen=True)
class GpuTime:
    """Kernels of a call.

    Attributes
    ----------
    spread : of the sum of their times
    kernels : their number
    by_kernel : µs of all launches of a kernel by its name, the longest first
    """

    spread: Spread
    kernels: float
    by_kernel: dict[str, float]


def gpu_time(calls: Sequence[Call], rounds: int = 15) -> GpuTime | None:
    """Kernels of a call; None without a GPU.

    torch's profiler measures them. `calls` take turns. The spread is over `rounds`, each the mean over the calls; if rounds
    differ in their number of kernels, there is one mean over all.
    """
    if not torch.cuda.is_available():
        return None
    from torch.profiler import ProfilerActivity, profile

    for call in calls:
        call()
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(rounds):
            for call in calls:
                call()
        synchronize()
    events = [event for event in profiler.events() if event.device_type.name == "CUDA"]
    number = rounds * len(calls)
    in_order = sorted(events, key=lambda event: event.time_range.start)
    size, rest = divmod(len(events), rounds)
    parts = [in_order] if rest or not size else [in_order[at : at + size] for at in range(0, len(events), size)]
    times = [sum(event.device_time for event in part) * len(parts) / number for part in parts]
    return GpuTime(Spread.of(times), len(events) / number, by_kernel(events, number))


def by_kernel(events: Iterable[Any], calls: int) -> dict[str, float]:
    """µs of one of `calls` that the profiler's `events` took, by the first characters of a kernel's name."""
    found: Counter[str] = Counter()
    for event in events:
        found[event.name[:NAME]] += event.device_time / calls
    return dict(found.most_common())


def copy_rate(device: torch.device) -> float:
    """Bytes read plus bytes written per microsecond by a device-to-device copy of 256 MiB (64 MiB on a CPU)."""
    size = (64 if device.type == "cuda" else 16) << 20
    source = torch.randint(0, 1 << 20, (size,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    gpu = gpu_time([lambda: target.copy_(source)])
    elapsed = host_time([lambda: target.copy_(source)], rounds=3) if gpu is None else gpu.spread.median
    return 2 * source.numel() * source.element_size() / elapsed


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
