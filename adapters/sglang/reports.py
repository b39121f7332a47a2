"""At start, at capture and after errors: what the paths report to, and which path prepares which of sglang's forward modes."""

from __future__ import annotations

import logging
from typing import Any

from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.reporting import PathReport
from nsa_plugin.core.batch import ForwardMode

ENGINE = "sglang"
logger = logging.getLogger("sglang.srt.plugins.nsa_plugin")
MODES = {
    "DECODE": ForwardMode.DECODE,
    "TARGET_VERIFY": ForwardMode.TARGET_VERIFY,
    "DRAFT_EXTEND_V2": ForwardMode.DRAFT_EXTEND,
}
"""Name of sglang's forward mode to our mode."""
PATHS = {
    ForwardMode.DECODE: "draft decode",
    ForwardMode.TARGET_VERIFY: "target verify",
    ForwardMode.DRAFT_EXTEND: "draft extend",
}


def path(native_mode: Any) -> str:
    """The path that prepares batches of one of sglang's forward modes."""
    return PATHS[MODES[native_mode.name]]


def report(host: Host, native_mode: Any) -> PathReport:
    """The reports of that path."""
    return host.path(ENGINE, path(native_mode), logger)
