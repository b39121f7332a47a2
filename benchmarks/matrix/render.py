"""The release matrix as a table in Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

LOOKED_FOR = re.compile(
    r"unsupported: looked for (?P<path>[\w.]+)(?:\([^)]*\))? .*, found (?:it without (?P<names>\w+(?:, \w+)*))?",
    re.DOTALL,
)


def cell(strategies: dict[str, str]) -> str:
    """The state of each strategy of a path. Strategies with the same state stand together."""
    states: dict[str, list[str]] = {}
    for strategy, state in strategies.items():
        states.setdefault(_short(state), []).append(strategy)
    if len(states) == 1 and next(iter(states)).startswith("unsupported"):
        return next(iter(states))
    return "; ".join(f"{state}: {', '.join(names)}" for state, names in states.items())


def _short(state: str) -> str:
    found = LOOKED_FOR.match(state)
    if not found:
        return state.partition(": ")[0]
    what = f"`{'.'.join(found['path'].split('.')[-2:])}`"
    return f"unsupported: {what} without {found['names']}" if found["names"] else f"unsupported: no {what}"


def _kind(path: str) -> str:
    return path.partition(" (")[0]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The table: one line for each release, the newest of an engine first.

    Paths of the same name but for a runner in parentheses stand side by side. A path that a release was not tried on says
    so, if another release of the engine was. Paths that were run on another day than the rest of the line have their date.
    """
    found = list(dict.fromkeys(path for row in rows for path in row["paths"]))
    kinds = list(dict.fromkeys(map(_kind, found)))
    paths = sorted(found, key=lambda path: kinds.index(_kind(path)))
    lines = ["| release | " + " | ".join(paths) + " | tested with |", "|---|" + "---|" * (len(paths) + 1)]
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    newest_first = list(reversed(rows))
    newest_first.sort(key=lambda row: engines.index(row["engine"]))
    for row in newest_first:
        of_engine = {path for other in rows if other["engine"] == row["engine"] for path in other["paths"]}
        absent = {path: "not run" if path in of_engine else "–" for path in paths}
        cells = [cell(row["paths"][path]) if path in row["paths"] else absent[path] for path in paths]
        versions = row.get("environment", {})
        tested = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions)
        later: dict[str, list[str]] = {}
        for path, date in row.get("dates", {}).items():
            later.setdefault(date, []).append(path)
        dates = "; ".join([row["date"], *(f"{', '.join(names)}: {date}" for date, names in later.items())])
        lines.append(
            f"| {row['engine']} {row['release']} | " + " | ".join(cells) + f" | {tested or 'source only'}, {dates} |"
        )
    return "\n".join(lines)
