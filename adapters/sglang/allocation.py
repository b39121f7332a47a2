"""When CUDA-graph buffers are made: page tables that draft backends share, although each makes its own."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch

from nsa_plugin.adapters.sglang.reports import logger

METHOD = "init_cuda_graph_state"


def sharing(allocate: Callable[[], None], backends: Sequence[Any], share: Callable[[Any], int], path: str) -> None:
    """Let sglang allocate for each backend in turn, `share(backend)` after each; logs the bytes that `share` gives back.

    What a backend drops is thereby free before the next one allocates.
    """
    given_back = 0

    def shared(backend: Any) -> Callable[..., None]:
        own = getattr(backend, METHOD)

        def allocate_and_share(*arguments: Any, **keywords: Any) -> None:
            nonlocal given_back
            own(*arguments, **keywords)
            given_back += share(backend)

        return allocate_and_share

    for backend in backends:
        vars(backend)[METHOD] = shared(backend)
    try:
        allocate()
    finally:
        for backend in backends:
            vars(backend).pop(METHOD, None)
    if given_back:
        logger.info(
            "nsa-plugin: %s: %d draft backends share one page table; %.1f MiB given back",
            path,
            len(backends),
            given_back / 2**20,
        )


def adopt(tables: MutableMapping[str, Any], name: str, kept: Any) -> int:
    """Put `kept` in the place of a page table of its shape; returns the bytes that this gives back, 0 if nothing is replaced."""
    own = tables.get(name)
    if own is kept or not (isinstance(own, torch.Tensor) and isinstance(kept, torch.Tensor)) or own.shape != kept.shape:
        return 0
    tables[name] = kept
    return own.numel() * own.element_size()
