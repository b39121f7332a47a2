"""The rooms of the package: which may import which, no circle between modules, no file that nobody reads to the end."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("core", "adapters", "nsa_plugin")
LONGEST = 400
"""Lines of a file."""
OUTSIDE = {
    "core": {"torch", "triton"},
    "adapters": {"torch", "packaging"},
    "nsa_plugin": {
        "triton",
        "torch",
        "packaging",
        "pluggy",
        "rich",
        "numpy",
        "matplotlib",
        "prometheus_client",
        "pytest",
        "shtab",
    },
}
"""Third-party packages that each room may import; engines are asked for separately."""
ENGINES = {"sglang", "vllm", "sgl_kernel", "deep_gemm"}
KIT_ADAPTERS = {"nsa_plugin.adapters.base", "nsa_plugin.adapters.ledger"}
"""All that the kit for third parties may import of the adapters' room."""
DRIVE_RIGS = ("nsa_plugin.demo.", "nsa_plugin.bench.", "nsa_plugin.rigs.")
"""Modules of the package that may import rigs; so may `tests` and `benchmarks`, which are not in it."""
DRIVE_ENGINES = ("nsa_plugin.rigs.vllm.",)
"""Modules that drive real engine parts, and are imported only where the engine is installed."""

GPU_OBJECTS = re.compile(
    r"\bStream\b\s*(?:\(|$)|\b(?:CUDA|XPU|NPU)Graph\b|\bcapture_begin\b|\bempty_cache\b", re.MULTILINE
)
OWN_GPU_OBJECTS = {"nsa_plugin.adapters.side_by_side", "nsa_plugin.adapters.sglang.rehearsal"}
"""Who may make streams and graphs in an engine's process: torch frees what engines use when one of them goes."""


def module(path: Path) -> str:
    """Dotted name under which a file of a room is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    named = parts if parts[0] == "nsa_plugin" else ("nsa_plugin", *parts)
    return ".".join(named[:-1] if named[-1] == "__init__" else named)


FILES = {
    module(path): path
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*.py"))
    if not any(part.is_symlink() for part in path.parents)
}


def room_of(name: str) -> str:
    """The room of a module."""
    second = name.split(".")[1] if "." in name else ""
    return second if second in ("core", "adapters") else "nsa_plugin"


def imports(tree: ast.Module, *, inside: bool) -> Iterator[str]:
    """Names that are imported at the top of a module; with `inside` in functions and for type checkers too."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        lazily = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if inside or not lazily:
            pending += ast.iter_child_nodes(node)


@functools.cache
def imported(name: str, *, inside: bool) -> set[str]:
    """What a module imports: modules of this package by their names, others by their top-level package."""
    found: set[str] = set()
    for target in imports(ast.parse(FILES[name].read_text()), inside=inside):
        if not target.startswith("nsa_plugin"):
            found.add(target.partition(".")[0])
        elif target in FILES:
            found.add(target)
    return found


def test_a_room_imports_only_what_it_may() -> None:
    may = {"core": {"core"}, "adapters": {"core", "adapters"}, "nsa_plugin": {"core", "adapters", "nsa_plugin"}}
    wrong = [
        f"{name} imports {target}"
        for name in FILES
        for target in imported(name, inside=True) & FILES.keys() - {"nsa_plugin"}
        if room_of(target) not in may[room_of(name)]
    ]
    assert not wrong


def test_the_kit_for_third_parties_needs_no_engine_and_no_rig() -> None:
    kit = [name for name in FILES if name.startswith("nsa_plugin.testing")]
    wrong = [
        f"{name} imports {target}"
        for name in kit
        for target in imported(name, inside=True)
        if target in ENGINES
        or target.startswith("nsa_plugin.rigs")
        or (room_of(target) == "adapters" and target not in KIT_ADAPTERS)
    ]
    assert len(kit) > 5 and not wrong


def test_only_demo_and_benchmark_of_the_package_drive_rigs() -> None:
    wrong = [
        f"{name} imports {target}"
        for name in FILES
        if not name.startswith(DRIVE_RIGS)
        for target in imported(name, inside=True)
        if target.startswith("nsa_plugin.rigs.")
    ]
    assert not wrong


def test_a_room_imports_only_the_packages_it_needs() -> None:
    wrong = [
        f"{name} imports {target}"
        for name in FILES
        for target in imported(name, inside=True) - FILES.keys() - set(sys.stdlib_module_names)
        if target not in OUTSIDE[room_of(name)] and not (target in ENGINES and room_of(name) != "core")
    ]
    assert not wrong


def test_engines_are_imported_within_functions() -> None:
    """Where that is not so, a file says that it drives real engine parts."""
    wrong = [
        f"{name} imports {sorted(found)}"
        for name in FILES
        if (found := imported(name, inside=False) & ENGINES) and not name.startswith(DRIVE_ENGINES)
    ]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: imported(name, inside=False) & FILES.keys() - {name} for name in FILES}
    order = tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert set(order) >= set(FILES)


def test_no_file_is_longer_than_one_reads() -> None:
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in ROOT.rglob("*.py")
        if not path.relative_to(ROOT).parts[0].startswith((".", "build"))
    }
    assert lines and not {name: count for name, count in lines.items() if count > LONGEST}


def test_streams_and_graphs_are_made_where_their_hazards_are_known() -> None:
    makers = {
        name for name, path in FILES.items()
        if room_of(name) != "nsa_plugin" and GPU_OBJECTS.search(path.read_text())
    }  # fmt: skip
    assert makers == OWN_GPU_OBJECTS
