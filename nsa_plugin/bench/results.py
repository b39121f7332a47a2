"""Result files of the benchmark: read and checked, and written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nsa_plugin.core.errors import reject

Results = dict[str, Any]
LARGEST = 1e12
"""Beyond this a number is taken for damaged: a time of eleven days in µs."""


def load(path: Path) -> Results:
    """Read what `bench --json` wrote, here or on another machine.

    Raises
    ------
    InvalidValueError
        The file is of another kind, damaged, or has no cell; the entry is named.
    OSError
        It can't be read.
    """
    expected = "results that `nsa-plugin bench --json` wrote"
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError):  # neither text nor JSON
        reject(str(path), expected, "a file that is no JSON")
    _entries(str(path), found, RESULTS)
    if not found["cells"]:
        reject(str(path), "at least one cell", "none", fix="the run was stopped before it measured one")
    for index, cell in enumerate(found["cells"]):
        where = f"{path}: cells[{index}]"
        _entries(where, cell, CELL)
        for name, row in cell["contenders"].items():
            _entries(f"{where}.contenders[{name!r}]", row, CONTENDER)
    loaded: Results = found
    return loaded


def save(path: Path, results: Results) -> None:
    """Write results; a reader sees the old file or the new one."""
    text = json.dumps(results, indent=1) + "\n"
    if path.exists() and not path.is_file():  # a pipe or a device
        path.write_text(text)
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def _entries(where: str, found: object, kinds: Mapping[str, tuple[str, Callable[[Any], bool]]]) -> None:
    if not isinstance(found, dict):
        reject(where, f"an object with {', '.join(kinds)}", type(found).__name__)
    for name, (expected, fits) in kinds.items():
        if name in OPTIONAL and name not in found:
            continue
        if name not in found or not fits(found[name]):
            got = repr(found[name])[:60] if name in found else "nothing"
            reject(f"{where}: {name}", expected, got, fix="is it a result file of nsa-plugin bench?")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LARGEST  # NaN is neither


def _time(value: object) -> bool:
    return value is None or _number(value)


def _count(value: object) -> bool:
    return isinstance(value, int) and _number(value) and value >= 1


def _spread(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_number, value)) and value[0] <= value[1]


def _times_by_name(value: object) -> bool:
    return isinstance(value, dict) and _texts([*value]) and all(map(_number, value.values()))


def _text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable()


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_text, value))


TEXT = ("a text", _text)
COUNT = ("a whole number of at least 1", _count)
TIME = ("a time in µs, or null", _time)
SPREAD = ("the least and the largest time in µs", _spread)
RESULTS = {
    "machine": TEXT,
    "date": TEXT,
    "versions": ("an object of texts", lambda value: isinstance(value, dict) and _texts([*value, *value.values()])),
    "cells": ("a list", lambda value: isinstance(value, list)),
    "complete": ("true or false", lambda value: isinstance(value, bool)),
    "planned_cells": COUNT,
    "backend": TEXT,
    "page_size": COUNT,
    "schedule": TEXT,
}
CELL = {
    "mode": TEXT,
    "batch_size": COUNT,
    "context": COUNT,
    "steps": COUNT,
    "bytes": ("a number of bytes", lambda value: _time(value) and value is not None),
    "floor_us": ("a time in µs", lambda value: _time(value) and value is not None),
    "contenders": ("an object", lambda value: isinstance(value, dict) and bool(value) and _texts([*value])),
}
CONTENDER = {
    "host_us": TIME,
    "gpu_us": TIME,
    "host_spread_us": SPREAD,
    "gpu_spread_us": SPREAD,
    "kernels": ("a number, or null", _time),
    "launch_us": ("a time in µs", _number),
    "gpu_us_by_kernel": ("an object of times in µs", _times_by_name),
    "differs": ("a list of fields, or null", lambda value: value is None or _texts(value)),
}
OPTIONAL = frozenset((
    "complete", "planned_cells", "host_spread_us", "gpu_spread_us", "launch_us", "gpu_us_by_kernel",
    "backend", "page_size", "schedule",
))  # fmt: skip
"""Older files lack them, or those that they are not about."""
