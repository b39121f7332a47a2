"""Parts of an engine that are patched when it imports them: complete or not at all, undone by identity."""

from __future__ import annotations

import importlib
import itertools
import logging
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from nsa_plugin.adapters.ledger import LedgerRow
from nsa_plugin.adapters.patches import Part, PatchSet
from nsa_plugin.adapters.probe import Need
from nsa_plugin.host import Host

NUMBERS = itertools.count()
logger = logging.getLogger("test_patches")


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Writes an engine's module with a class `Engine`; returns the path of the class."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written: list[str] = []

    def module(methods: str = "run") -> str:
        name = f"patched_{next(NUMBERS)}"
        body = "".join(f"    def {method}(self):\n        return 'own'\n" for method in methods.split())
        (tmp_path / f"{name}.py").write_text(f"class Engine:\n{body}")
        importlib.invalidate_caches()
        written.append(name)
        return f"{name}.Engine"

    yield module
    for name in written:
        sys.modules.pop(name, None)


def made(host: Any, owner: type, live: Callable[[], bool]) -> Mapping[str, Callable[..., str]]:
    """In place of `run`."""
    return {"run": lambda engine: "ours" if live() else "theirs"}


def part(owner: str, *, essential: bool = True, needs: str = "run", make: Any = made, **others: Any) -> Part:
    row = LedgerRow(f"{owner}.run", "why", "not proposed", "gone", "at start")
    return Part(f"path of {owner}", owner, (Need(f"{owner}.{needs}", (), "run"),), make, (row,), essential, **others)


def run(owner: str) -> str:
    """Import the class and call it."""
    importlib.import_module(owner.partition(".")[0])
    return str(pkgutil.resolve_name(owner)().run())


def test_parts_are_patched_when_they_are_imported_and_put_back(write: Callable[..., str]) -> None:
    there, later, never = write(), write(), write()
    stock = vars(pkgutil.resolve_name(there))["run"]
    used: list[None] = []
    patches = PatchSet("engine", [part(there), part(later), part(never)], logger, lambda: used.append(None))
    assert patches.install(Host()) == [] and patches.install(Host()) == []
    assert run(there) == "ours" and later.partition(".")[0] not in sys.modules and len(used) == 1
    assert run(later) == "ours" and len(used) == 2
    patches.undo()
    assert vars(pkgutil.resolve_name(there))["run"] is stock
    assert [run(owner) for owner in (there, later, never)] == ["own"] * 3
    assert patches.install(Host()) == [] and run(never) == "ours"
    patches.undo()


@pytest.mark.parametrize("fault", ["lacks something", "fails", "makes something else"])
@pytest.mark.parametrize("late", [True, False])
def test_an_essential_part_that_can_not_be_patched_takes_back_the_others(
    write: Callable[..., str], caplog: pytest.LogCaptureFixture, fault: str, late: bool
) -> None:
    """What is known when the set is installed is returned; what comes out later is a warning."""
    first, other, last = write(), write(), write()
    broken = write("walk" if fault == "lacks something" else "run")
    make: dict[str, Any] = {
        "lacks something": made,
        "fails": lambda *arguments: 1 / 0,
        "makes something else": lambda *arguments: {"run": print, "stop": print},
    }
    run(first)
    if not late:
        importlib.import_module(broken.partition(".")[0])
    parts = [part(other, essential=False), part(first), part(broken, make=make[fault]), part(last)]
    patches = PatchSet("the engine's runner", parts, logger)
    with caplog.at_level(logging.WARNING, logger.name):
        problems = patches.install(Host())
        assert bool(problems) != late
        if late:
            assert run(first) == "ours"
            importlib.import_module(broken.partition(".")[0])
    said = {
        "lacks something": f"{broken}.run",
        "fails": "division by zero",
        "makes something else": "the ledger is wrong",
    }
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    (named,) = warnings if late else problems
    assert said[fault] in named and named.startswith("nsa-plugin: the engine's runner is left as it is: ") == late
    assert len(warnings) == late
    assert [run(owner) for owner in (first, other, last)] == ["own"] * 3


def test_a_part_that_is_patched_while_the_set_is_taken_back_goes_with_it(write: Callable[..., str]) -> None:
    """As by another thread, in the middle of an import."""
    owner = write()

    def make(host: Any, found: type, live: Callable[[], bool]) -> Mapping[str, Callable[..., str]]:
        patches.undo()
        return made(host, found, live)

    patches = PatchSet("engine", [part(owner, make=make)], logger)
    assert patches.install(Host()) == []
    assert run(owner) == "own"


def test_another_part_that_can_not_be_patched_concerns_its_own_path_alone(
    write: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    essential, lacking, other = write(), write("walk"), write()
    parts = [part(lacking, essential=False), part(other, essential=False), part(essential)]
    patches = PatchSet("engine", parts, logger)
    for owner in (essential, lacking, other):
        importlib.import_module(owner.partition(".")[0])
    with caplog.at_level(logging.INFO, logger.name):
        assert patches.install(Host()) == [] and patches.probe() == []
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert f"path of {lacking}: left as it is: looked for {lacking}.run" in record.getMessage()
    assert run(essential) == run(other) == "ours"
    assert [row.target for row in patches.ledger()] == [f"{essential}.run", f"{other}.run"]
    patches.undo()


def test_what_the_engine_has_by_itself_is_not_patched_and_not_listed(write: Callable[..., str]) -> None:
    owner = write()
    patches = PatchSet("engine", [part(owner, gone=lambda found: "run" in vars(found))], logger)
    run(owner)
    assert patches.install(Host()) == [] and run(owner) == "own" and patches.ledger() == []
    patches.undo()


def test_a_replacement_that_somebody_has_wrapped_since_is_left_to_them(
    write: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    owner = write()
    patches = PatchSet("engine", [part(owner)], logger)
    patches.install(Host())
    run(owner)
    engine: Any = pkgutil.resolve_name(owner)
    ours = engine.run
    engine.run = theirs = lambda self: ours(self) + ", wrapped"
    assert run(owner) == "ours, wrapped"
    with caplog.at_level(logging.WARNING, logger.name):
        patches.undo()
    assert engine.run is theirs and run(owner) == "theirs, wrapped"
    assert "Engine.run was patched by somebody else too" in caplog.text
