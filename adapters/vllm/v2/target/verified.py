"""Runs only where drafts are verified: vLLM builds, the graph refreshes and runs, and what is there is compared.

A refreshed graph can't be looked at before it has run: a difference is seen after that batch was computed with it. From the
next batch on vLLM's own values are used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from nsa_plugin.adapters.reporting import PathReport
from nsa_plugin.adapters.verification import Verification
from nsa_plugin.adapters.vllm.v2.target.refresh import STRATEGY, Refresh
from nsa_plugin.core.group_rows import live_pages

T = TypeVar("T")


def replay_verified(
    report: PathReport, refresh: Refresh, verification: Verification, build: Callable[[], None], replay: Callable[[], T]
) -> T:
    """Replay, and compare what the graph has written with what `build`, vLLM's own, writes for the batch.

    Before the replay the buffers get back what the batch before has left there: a plane that the graph does not write shows.
    """
    buffers = refresh.written()
    try:
        before = {name: plane.clone() for name, plane in buffers.items()}
        build()
        expected = defined(refresh)
        for name, plane in buffers.items():
            plane.copy_(before[name])
    except Exception as error:
        _give_up(report, refresh, error)
        build()
        return replay()
    result = replay()
    try:
        verification.settle([(0, expected, defined(refresh))], None, lambda: (refresh.batch, refresh.geometry, None))
    except Exception as error:
        _give_up(report, refresh, error)
    return result


def _give_up(report: PathReport, refresh: Refresh, error: Exception) -> None:
    refresh.verification = None
    report.fell_back("replay", STRATEGY, error)


def defined(refresh: Refresh) -> dict[str, torch.Tensor]:
    """Copies of all that a refresh writes, by name, with -1 in the columns of page tables that are not defined."""
    found: dict[str, torch.Tensor] = {}
    for name, plane in refresh.written().items():
        found[name] = plane.clone()
        if name.endswith("_pages"):
            live = live_pages(refresh.batch, refresh.geometry, plane.shape[1], by_row=name.endswith("row_pages"))
            found[name].masked_fill_(~live, -1)
    return found
