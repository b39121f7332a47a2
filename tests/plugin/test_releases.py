"""What differs between sglang's releases stands in one file, each difference marked with a release that is still tested.

What only pooled index keys have stands in a file of its own.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsa_plugin.adapters.sglang import releases

FOLDER = Path(releases.__file__).parent
FILES = {"releases.py", "pools.py"}
NO_PART_OF_SGLANG = {"device": "torch's module for one kind of device"}
"""Names of variables in which something else is asked for its attributes."""
MARK = re.compile(r"\b(since|until) (0\.5\.\d+(?:\.post\d+)?)", re.IGNORECASE)


def questions(source: str) -> Iterator[str]:
    """Calls of `hasattr`, and of `getattr` with a default, on what may be a part of the engine.

    Names with two underscores on either side belong to Python.
    """
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        asks = (node.func.id, len(node.args)) in (("hasattr", 2), ("getattr", 3))
        if not asks or ast.unparse(node.args[0]) in NO_PART_OF_SGLANG:
            continue
        name = node.args[1]
        if not (isinstance(name, ast.Constant) and re.fullmatch(r"__\w+__", str(name.value))):
            yield ast.unparse(node)


def marks(source: str) -> list[tuple[str, str]]:
    """Every "since X" and "until X"."""
    return [(word.lower(), release) for word, release in MARK.findall(source)]


def wrong(found: list[tuple[str, str]], tested: tuple[str, ...]) -> list[str]:
    """Marks that say nothing among the tested releases: what they mark can go."""
    oldest, newest = tested[0], tested[-1]
    return [
        f"{word} {release}"
        for word, release in found
        if release not in tested or (word, release) in (("since", oldest), ("until", newest))
    ]


def test_nothing_but_the_files_of_releases_asks_what_an_engine_has() -> None:
    asked = {path.name: found for path in FOLDER.glob("*.py") if (found := list(questions(path.read_text())))}
    assert asked.keys() == FILES, asked


def test_releases_are_named_in_these_files_only() -> None:
    naming = {path.name for path in FOLDER.glob("*.py") if re.search(r"\b0\.5\.\d+", path.read_text())}
    assert naming == FILES


def test_every_mark_names_a_tested_release() -> None:
    found = [mark for name in FILES for mark in marks((FOLDER / name).read_text())]
    assert len(found) > 10 and wrong(found, releases.TESTED) == []


@pytest.mark.parametrize(
    ("tested", "left"),
    [
        (releases.TESTED[1:], "until 0.5.11"),
        (releases.TESTED[2:], "until 0.5.12"),
        (releases.TESTED[2:], "since 0.5.13"),
    ],
)
def test_a_release_that_is_dropped_leaves_marks_that_are_named(tested: tuple[str, ...], left: str) -> None:
    assert left in wrong(marks((FOLDER / "releases.py").read_text()), tested)


def test_a_question_is_seen() -> None:
    assert list(questions("hasattr(backend, 'plan')\ngetattr(backend, name, None)")) == [
        "hasattr(backend, 'plan')",
        "getattr(backend, name, None)",
    ]
    assert list(questions("getattr(backend, name)\nhasattr(device, 'x')\nhasattr(f, '__wrapped__')")) == []
