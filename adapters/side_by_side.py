"""Several refreshes as one, side by side where a CUDA graph records them: what a plan takes as `derive`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Refresh = Callable[[], None]

_branches: dict[int, list[Any]] = {}
"""Streams for each device, that all captures use: torch has no more than 32, and hands them out to engines too."""


def side_by_side(refreshes: Sequence[Refresh]) -> Refresh | None:
    """What calls refreshes that do not depend on each other; None without any.

    In a CUDA graph that is being captured each gets a branch of its own: their kernels are small, and the graph takes as
    long as the longest branch. All branches are joined before it returns. Elsewhere they run one after the other.
    """
    if len(refreshes) < 2:
        return refreshes[0] if refreshes else None

    def derive() -> None:
        if not capturing():
            for refresh in refreshes:
                refresh()
            return
        trunk = torch.cuda.current_stream()
        branches = _streams(len(refreshes) - 1)
        for branch in branches:
            branch.wait_stream(trunk)
        try:
            for branch, refresh in zip((trunk, *branches), refreshes, strict=True):
                with torch.cuda.stream(branch):
                    refresh()
        finally:  # a capture with a branch that is not joined hides the error
            for branch in branches:
                trunk.wait_stream(branch)

    return derive


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _streams(number: int) -> list[Any]:
    """The first streams for branches on the current device."""
    new_stream: Any = torch.cuda.Stream
    made = _branches.setdefault(torch.cuda.current_device(), [])
    made.extend(new_stream() for _ in range(number - len(made)))
    return made[:number]
