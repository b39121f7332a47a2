"""Runs the checks and prints a table per section, or JSON."""

from __future__ import annotations

import dataclasses
import json

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nsa_plugin.doctor.checks import Check, diagnose

STYLES = {"ok": "green", "note": "yellow", "fail": "red"}


def doctor(as_json: bool, console: Console) -> int:
    """Print the report; returns 1 if something that was asked for can't be had."""
    checks = diagnose()
    failed = any(check.status == "fail" for check in checks)
    if as_json:
        print(json.dumps({"ok": not failed, "checks": [dataclasses.asdict(check) for check in checks]}, indent=1))
    else:
        for section in dict.fromkeys(check.section for check in checks):
            console.print(_table(section, [check for check in checks if check.section == section]))
        console.print("Something that was asked for can't be had." if failed else "All that was asked for can be had.")
    return int(failed)


def _table(title: str, checks: list[Check]) -> Table:
    table = Table("", "", "", title=title, title_justify="left", show_header=False)
    for check in checks:
        text = Text(check.detail)
        if check.fix:
            text.append(f"\n→ {check.fix}", style="bold")
        table.add_row(Text(check.status, style=STYLES[check.status]), Text(check.name), text)
    return table
