"""Runs at start: what the paths of this adapter report to."""

from __future__ import annotations

import logging

from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.reporting import PathReport

ENGINE = "vllm"
logger = logging.getLogger("vllm.plugins.nsa_plugin")


def report(host: Host, path: str) -> PathReport:
    """The reports of a path of vLLM's."""
    return host.path(ENGINE, path, logger)


def recorded(nothing: None) -> None:
    """What is left on the host of a replay whose metadata a CUDA graph computes: to be counted, it can be instrumented."""
