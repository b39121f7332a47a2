"""At start and at capture: which strategies the installed sglang has a place for, and which backends are left to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nsa_plugin.adapters.base import Host, Strategy
from nsa_plugin.adapters.sglang.releases import is_rocm, keys_per_index_key, lacking, overlaps_plans
from nsa_plugin.adapters.verification import Moment, moment

VERIFIED: tuple[Moment, ...] = ("before", "graph")
"""When a path can be verified; the first is what NSA_PLUGIN_VERIFY_MODE=auto takes."""


def repairs(host: Host) -> bool:
    """Whether verification rules `graph` out, because what a graph computes can't be repaired before it is read."""
    return bool(host.verify) and moment(host.verify_mode, *VERIFIED) == "before"


def usable(asked: Sequence[Strategy], host: Host) -> tuple[Strategy, ...]:
    """Strategies to try."""
    no_graph = repairs(host) or not_graph()
    return tuple(strategy for strategy in asked if strategy != "graph" or not no_graph)


def not_graph() -> str:
    """Empty, or why the work can't be recorded in sglang's graphs."""
    if problem := lacking("graph"):
        return problem
    if overlaps_plans():
        return (
            "SGLANG_ENABLE_OVERLAP_PLAN_STREAM: sglang prepares on another stream, and may overwrite the lengths of a batch "
            "before its graph reads them"
        )
    return ""


def unsupported(backend: Any) -> str:
    """Empty, or what about the backend is not covered."""
    if keys_per_index_key(backend) > 1:
        return "pooled index keys (index_kpool > 1) are not covered"
    if is_rocm():
        return "ROCm is not covered"
    return ""
