"""What vLLM's releases do differently stands in one file, marked; and every file of the adapter says when it runs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from nsa_plugin.adapters.vllm import releases

ROOM = Path(__file__).resolve().parents[2] / "adapters" / "vllm"
FILES = {str(path.relative_to(ROOM)): ast.parse(path.read_text()) for path in sorted(ROOM.rglob("*.py"))}
RELEASES = "releases.py"
NOT_RELEASES = {
    ("builders.py", "_is_non_causal"): "a setting that not every builder has",
    ("builders.py", "_uses_pcp"): "a setting that not every builder has",
    ("builders.py", "_uses_data_parallelism"): "stand-ins of builders in tests have no config",
    ("builder_rows.py", "above_one"): "settings that not every builder has",
    ("builders.py", "_by_update"): "builders without an update in place",
    ("builders.py", "_has_hisparse"): "a setting that not every builder has",
    ("builders.py", "changes_of"): "metadata of builders that are not known",
    ("v1/kept.py", "keep_sparse"): "one builder of several has extra metadata for fp8 caches, and those a decode part",
    ("v1/verified/watch.py", "_defined"): "an indexer has a schedule, other builders have none",
    ("v2/target/refusals.py", "uncovered"): "a feature that a release does not have is not on",
    ("v2/unfused.py", "places"): "metadata of some builders have a decode part",
    ("v2/verified/staged.py", "described"): "sparse attention has a top-k, dense attention has none",
}
"""Functions that ask an object of vLLM's what it has, whatever the release; and why."""
MARK = re.compile(r"\bgoes with (\d+\.\d+)\b")
WHEN = re.compile(
    r"Runs (at start|at capture|at every (draft|batch|replay)|when vLLM imports|where vLLM (chooses|loads)|only where drafts|where asked)\b"
)


def ladders(tree: ast.AST, function: str = "") -> Iterator[str]:
    """The function of each `hasattr`, `getattr` with a default, and `except AttributeError`."""
    for node in ast.iter_child_nodes(tree):
        inside = node.name if isinstance(node, ast.FunctionDef) else function
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            asks = node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) > 2)
        else:
            asks = (
                isinstance(node, ast.ExceptHandler)
                and node.type is not None
                and "AttributeError" in ast.unparse(node.type)
            )
        if asks:
            yield inside
        yield from ladders(node, inside)


def test_only_one_file_asks_what_a_release_has() -> None:
    asking = {(file, function) for file, tree in FILES.items() for function in ladders(tree) if file != RELEASES}
    new, gone = asking - NOT_RELEASES.keys(), NOT_RELEASES.keys() - asking
    assert not new
    assert not gone


def test_what_a_release_does_differently_is_marked_with_the_release_that_it_goes_with() -> None:
    """The last release that needs the older way."""
    functions = {node.name: node for node in ast.walk(FILES[RELEASES]) if isinstance(node, ast.FunctionDef)}
    asking = set(ladders(FILES[RELEASES])) - OF_BUILDERS
    assert asking
    unmarked = {name for name in asking if not MARK.search(ast.get_docstring(functions[name]) or "")}
    assert not unmarked
    marks = set(MARK.findall((ROOM / RELEASES).read_text()))
    assert marks <= {release.rpartition(".")[0] for release in releases.TESTED}, "a release that is no longer tested"


OF_BUILDERS = {"not_vllms"}
"""Functions of that file that ask something else."""


def test_every_file_says_in_its_first_line_when_it_runs() -> None:
    silent = {
        file for file, tree in FILES.items() if not WHEN.match((ast.get_docstring(tree) or "").partition("\n")[0])
    }
    assert not silent
