"""At capture: work is recorded in a graph that is thrown away, on a stream that nothing else runs on.

When torch destroys a CUDA graph it frees cuBLAS' workspace of the stream that the graph was captured on
(https://github.com/pytorch/pytorch/issues/193402). Other graphs may still use it: torch hands out the same 32 streams again
and again. The stream of rehearsals is therefore made by the driver, and is none of those.

Work that can't be captured invalidates the capture, and many releases of torch do not end such a one: the allocator keeps
memory that several streams have used, for ever, and random numbers fail. `_clean_up` ends it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import torch

from nsa_plugin.adapters.sglang.reports import logger

GRAPHS = ("CUDAGraph", "XPUGraph", "NPUGraph")
"""Names of the graph class in torch's modules for kinds of devices (`torch.cuda`, `torch.xpu`, …)."""
DRIVER, NON_BLOCKING = "libcuda.so.1", 1
_failed: list[Any] = []
"""Graphs whose capture failed. They are kept: torch's allocators may go on asking them whether a stream is theirs."""


def rehearse(work: Callable[[], object]) -> None:
    """Record `work` in a graph that is thrown away. It raises what a real capture would raise, before that begins.

    Nothing is recorded where there are no graphs, or no stream for it.
    """
    device: Any = torch.get_device_module()
    graph_type = next((getattr(device, name) for name in GRAPHS if hasattr(device, name)), None)
    if graph_type is None or not device.is_available():
        return
    on_cuda = device is torch.cuda
    stream = _own_stream(device.current_device()) if on_cuda else device.Stream()
    if stream is None:
        return
    stream.wait_stream(device.current_stream())
    with device.stream(stream):
        if on_cuda:
            _record_on_cuda(graph_type, work)
        else:
            _record(graph_type(), work)
    device.current_stream().wait_stream(stream)


def _record(graph: Any, work: Callable[[], object], **how: Any) -> None:
    graph.capture_begin(**how)
    try:
        work()
    finally:
        graph.capture_end()


def _record_on_cuda(graph_type: Callable[[], Any], work: Callable[[], object]) -> None:
    """As `_record`, in a pool of memory that is known if it fails."""
    graph, pool = graph_type(), torch.cuda.graph_pool_handle()
    try:
        _record(graph, work, pool=pool, capture_error_mode="thread_local")
    except Exception:
        _clean_up(graph, pool)
        with suppress(Exception):  # random numbers go on after a capture that succeeds
            _record(graph_type(), lambda: torch.zeros(1, device="cuda"), capture_error_mode="thread_local")
        raise


def _clean_up(graph: Any, pool: Any) -> None:
    """End what torch has begun for a capture that failed. Torch refuses to end what it has ended itself."""
    _failed.append(graph)
    internal: Any = torch._C
    with suppress(Exception):
        graph.reset()
    with suppress(Exception):
        index = torch.cuda.current_device()
        internal._cuda_endAllocateToPool(index, pool)
        internal._cuda_releasePool(index, pool)


@cache
def _own_stream(index: int) -> Any:
    """A CUDA stream of this package alone, for good; None, with a line in the log, if the driver makes none."""
    handle = ctypes.c_void_p()
    try:
        status = ctypes.CDLL(DRIVER).cuStreamCreate(ctypes.byref(handle), NON_BLOCKING)
    except (OSError, AttributeError) as error:
        status = error
    if status or handle.value is None:
        logger.info("nsa-plugin: captures are not rehearsed: expected a stream from %s, got %s", DRIVER, status)
        return None
    external: Any = torch.cuda.ExternalStream
    return external(handle.value, device=index)
