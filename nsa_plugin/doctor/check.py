"""One line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "off", "fail"]


@dataclass(frozen=True)
class Check:
    """What was looked at, what was found, and what to do about it.

    Attributes
    ----------
    section : "path", "engine", "setting", "plugin" or "environment"
    name : what was looked at
    status : "ok"; "note": worth knowing; "off": switched off for now, on purpose, and no reason not to start an engine;
        "fail": something that was asked for can't be had
    detail : what was found
    fix : what to do about it; empty if nothing is to be done
    more : whether it matters only to somebody who wants to see everything
    """

    section: str
    name: str
    status: Status
    detail: str
    fix: str = ""
    more: bool = False
