"""At capture: work is recorded in a graph that is thrown away, on a stream that nothing else runs on.

When torch destroys a CUDA graph it frees cuBLAS' workspace of the stream that the graph was captured on
(https://github.com/pytorch/pytorch/issues/193402). Other graphs may still use it: torch hands out the same 32 streams again
and again. The stream of rehearsals is therefore made by the driver, and is none of those.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from nsa_plugin.adapters.sglang.reports import logger

GRAPHS = ("CUDAGraph", "XPUGraph", "NPUGraph")
"""Names of the graph class in torch's modules for kinds of devices (`torch.cuda`, `torch.xpu`, …)."""
DRIVER, NON_BLOCKING = "libcuda.so.1", 1


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
    graph = graph_type()
    stream.wait_stream(device.current_stream())
    with device.stream(stream):
        graph.capture_begin(**({"capture_error_mode": "thread_local"} if on_cuda else {}))
        try:
            work()
        finally:
            graph.capture_end()
    device.current_stream().wait_stream(stream)


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
