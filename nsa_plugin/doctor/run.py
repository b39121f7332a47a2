"""Runs the checks and prints what matters here, all of it, one line, or JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from nsa_plugin import __version__
from nsa_plugin.doctor.check import Check
from nsa_plugin.doctor.checks import Report, diagnose
from nsa_plugin.doctor.patches import FIELDS, Ledger

STYLES = {"ok": "green", "note": "yellow", "off": "yellow", "fail": "red"}


def doctor(console: Console, *, everything: bool = False, patches: bool = False) -> int:
    """Print the report; returns 1 if something that was asked for can't be had, or the switch file is there."""
    report = diagnose()
    shown = [check for check in report.checks if everything or not check.more or check.status == "fail"]
    for section in dict.fromkeys(check.section for check in shown):
        console.print(_table(section, [check for check in shown if check.section == section]))
    for engine, rows in report.patches.items() if everything or patches else ():
        console.print(_patches(engine, rows))
    if left := len(report.checks) - len(shown):
        console.print(f"{left} more lines, about defaults, other hardware and other models: nsa-plugin doctor --all")
    console.print(verdict(report.checks), style=STYLES[_worst(report.checks)], markup=False)
    return _status(report)


def as_json() -> int:
    """Print everything for machines; returns as `doctor`."""
    with _elsewhere(2):
        report = diagnose()
    status = _status(report)
    print(json.dumps({"ok": not status, **dataclasses.asdict(report)}, indent=1))
    return status


def check() -> int:
    """Print one line, for init containers; returns 1 if something that was asked for can't be had.

    A switch file is no failure: it is there on purpose, and it must not keep an engine from starting.
    """
    with open(os.devnull, "w") as nowhere, _elsewhere(nowhere.fileno(), stderr=True):
        report = diagnose()
    failed = [check for check in report.checks if check.status == "fail"]
    if failed:
        first, others = failed[0], len(failed) - 1
        line = f"{first.name}: {first.detail}" + (f"; {first.fix}" if first.fix else "")
        line += f" (and {others} more: nsa-plugin doctor)" if others else ""
    else:
        served = (f"{check.name}: {check.detail}" for check in report.checks if check.section == "path")
        line = "; ".join(
            [verdict(report.checks).removesuffix("."), *(text for text in served if "left to" not in text)]
        )
    print(f"nsa-plugin {__version__}: {' '.join(line.split())}")
    return int(bool(failed))


def verdict(checks: list[Check]) -> str:
    """The report in a sentence."""
    if _worst(checks) == "fail":
        return "Something that was asked for can't be had."
    if off := [check for check in checks if check.status == "off"]:
        return f"Switched off for now: {off[0].detail}."
    if any(check.name == "NSA_PLUGIN_STRATEGY" and check.detail.startswith("off,") for check in checks):
        return "Off, as NSA_PLUGIN_STRATEGY says: every engine runs as shipped."
    return "All that was asked for can be had."


def _worst(checks: list[Check]) -> str:
    found = {check.status for check in checks}
    return next((status for status in ("fail", "off") if status in found), "ok")


def _status(report: Report) -> int:
    return int(_worst(report.checks) != "ok")


def _table(title: str, checks: list[Check]) -> Table:
    table = Table(
        "", Column(overflow="fold"), Column(overflow="fold"), title=title, title_justify="left", show_header=False
    )
    for check in checks:
        text = Text(check.detail)
        if check.fix:
            text.append(f"\n→ {check.fix}", style="bold")
        table.add_row(Text(check.status, style=STYLES[check.status]), Text(check.name), text)
    return table


def _patches(engine: str, rows: Ledger) -> Table:
    table = Table("", Column(overflow="fold"), title=f"patches of {engine}", title_justify="left", show_header=False)
    for row in rows:
        for field in FIELDS:
            last = field == FIELDS[-1]
            style = "bold" if field == "target" else ""
            table.add_row(field.replace("_", " "), Text(row[field], style=style), end_section=last)
    return table


@contextlib.contextmanager
def _elsewhere(target: int, *, stderr: bool = False) -> Iterator[None]:
    """Send what engines print while they are imported to a file descriptor: stdout, and stderr too if asked."""
    kept, level = [], logging.root.manager.disable
    _flush()
    for number in (1, 2) if stderr else (1,):
        kept.append((number, os.dup(number)))
        os.dup2(target, number)
    if stderr:
        logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)
        _flush()
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
