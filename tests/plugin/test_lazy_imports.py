"""What is done after an import of an engine disturbs no import, whoever makes it, in whatever thread."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

from nsa_plugin.adapters import lazy
from nsa_plugin.adapters.lazy import WhenImported

PROBE = Path(__file__).parents[2] / "benchmarks" / "end_to_end" / "probe"
NUMBERS = itertools.count()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Writes a module with a name that no other test has; returns the name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    known = set(sys.modules)

    def module(text: str = "", name: str = "") -> str:
        name = name or f"lazy_{next(NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return name

    yield module
    for watch in tuple(lazy._waiting):
        watch.cancel()
    for name in set(sys.modules) - known:
        if name.startswith("lazy_"):
            del sys.modules[name]


@pytest.fixture
def host_times(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the end-to-end example that waits for an engine's module, too."""
    monkeypatch.syspath_prepend(str(PROBE))
    monkeypatch.setenv("E2E_TIMES", "unused")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))  # put back after the test
    yield importlib.import_module("host_times")


def ours(name: str, _: Any) -> None:
    WhenImported(name, lambda: None)


def the_examples(name: str, host_times: Any) -> None:
    host_times.from_first_call(name, "Engine", "run", ())


ENGINE = "class Engine:\n    def run(self): ...\n"


@pytest.mark.parametrize("watch", [ours, the_examples])
def test_nobody_who_walks_along_the_finders_misses_one(
    write: Callable[..., str], host_times: Any, watch: Callable[[str, Any], None]
) -> None:
    """Whatever is done with watches, an iteration that has begun sees every finder that was there once, in order."""
    names = [write(ENGINE) for _ in range(4)]
    list_before, finders = sys.meta_path, list(sys.meta_path)
    walk = iter(sys.meta_path)
    met = [next(walk)]
    for name in names:
        watch(name, host_times)
        met += list(itertools.islice(walk, 1))
        importlib.import_module(name)
        met += list(itertools.islice(walk, 1))
    assert met + list(walk) == finders
    assert list_before == finders
    assert [finder for finder in sys.meta_path if finder in finders] == finders


@pytest.mark.parametrize("watch", [ours, the_examples])
def test_an_import_that_is_under_way_in_another_thread(
    write: Callable[..., str], host_times: Any, watch: Callable[[str, Any], None]
) -> None:
    """The other thread stands between two finders while this one imports what is waited for."""
    watched, bystander = write(ENGINE), write()
    for before in range(len(sys.meta_path) + 2):
        for name in (watched, bystander):
            sys.modules.pop(name, None)
        watch(watched, host_times)
        reached, go, outcome = threading.Event(), threading.Event(), []

        class Gate:
            """A finder that is slow for one module."""

            def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
                if fullname == bystander:
                    reached.set()  # noqa: B023
                    go.wait(20)  # noqa: B023

        def other() -> None:
            try:
                importlib.import_module(bystander)
                outcome.append("imported")  # noqa: B023
            except BaseException as error:
                outcome.append(repr(error))  # noqa: B023

        gated = list(sys.meta_path)
        gated.insert(before, Gate())
        # without the lock that the import system holds while a finder searches
        context = mock.MagicMock()
        with (
            mock.patch.object(sys, "meta_path", gated),
            mock.patch.object(importlib._bootstrap, "_ImportLockContext", mock.Mock(return_value=context)),
        ):
            thread = threading.Thread(target=other)
            thread.start()
            found_first = not reached.wait(0.5)
            importlib.import_module(watched)
            go.set()
            thread.join(20)
        assert outcome == ["imported"], (before, found_first)


STRESS = """
import importlib, sys, threading, time
sys.path.insert(0, sys.argv[1])
from nsa_plugin.adapters.lazy import WhenImported
sys.setswitchinterval(1e-6)
number, called, failed = int(sys.argv[2]), [], []
def importing(names):
    for name in names:
        try:
            importlib.import_module(name)
        except BaseException as error:
            failed.append(repr(error))
for i in range(6):
    WhenImported(f"never{i}", lambda: None)
for i in range(number):  # some of the watches, before the imports start; the others while they run
    if i % 2:
        WhenImported(f"w{i}", lambda i=i: called.append(i))
watched = [f"w{i}" for i in range(number)]
threads = [threading.Thread(target=importing, args=([f"b{j}_{i}" for i in range(number)],)) for j in range(2)]
threads += [threading.Thread(target=importing, args=(watched,)) for _ in range(2)]  # the same modules, at the same time
for thread in threads:
    thread.start()
for i in range(0, number, 2):
    WhenImported(f"w{i}", lambda i=i: called.append(i))
    WhenImported(f"w{i}", lambda: None).cancel()
for thread in threads:
    thread.join()
print(failed[:3], sorted(called) == list(range(number)), len(called))
"""


def test_many_imports_in_many_threads(tmp_path: Path) -> None:
    """None fails, and each watch calls once, whether it came before, during or after the import."""
    number = 600
    for name in [f"{kind}{i}" for kind in ("w", "b0_", "b1_") for i in range(number)]:
        (tmp_path / f"{name}.py").write_text("")
    command = [sys.executable, "-B", "-c", STRESS, str(tmp_path), str(number)]
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == f"[] True {number}", done.stdout + done.stderr


def test_the_loader_that_a_module_sees_is_its_own(write: Callable[..., str]) -> None:
    """So that whoever asks for the source or the type of the loader gets what there is without a watch."""
    text = "at_run = (type(__loader__), type(__spec__.loader))\ndef f():\n    return 1\n"
    name = write(text)
    WhenImported(name, lambda: None)
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None and spec.origin is not None and spec.origin.endswith(".py")
    assert spec.loader.get_source(name) == text  # type: ignore[attr-defined]
    module: Any = importlib.import_module(name)
    own = importlib.machinery.SourceFileLoader
    assert module.at_run == (own, own) == (type(module.__loader__), type(module.__spec__.loader))
    assert inspect.getsource(module.f) == "def f():\n    return 1\n"


def test_a_loader_that_serves_many_modules_stays_as_it_is(write: Callable[..., str]) -> None:
    """As that of pytest's rewritten assertions: a call must not follow the import of another module."""

    class Shared(importlib.machinery.SourceFileLoader):
        """One for all."""

        def __init__(self) -> None: ...

        def exec_module(self, module: ModuleType) -> None:
            module.ran = True  # type: ignore[attr-defined]

    shared, names, called = Shared(), [write() for _ in range(3)], []

    class Finder:
        def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
            return importlib.machinery.ModuleSpec(fullname, shared) if fullname in names else None

    with mock.patch.object(sys, "meta_path", [Finder(), *sys.meta_path]):
        for name in names[:2]:
            WhenImported(name, lambda name=name: called.append(name))  # type: ignore[misc]
        modules: list[Any] = [importlib.import_module(name) for name in names]
    assert called == names[:2]
    assert all(module.ran and module.__loader__ is shared for module in modules)
    assert "exec_module" not in vars(shared)


def test_a_first_import_that_fails_leaves_the_watch(write: Callable[..., str], tmp_path: Path) -> None:
    name, called = write("1 / 0"), []
    WhenImported(name, lambda: called.append(name))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            importlib.import_module(name)
    assert called == []
    (tmp_path / f"{name}.py").write_text("x = 1  # longer, so that it is compiled again")
    importlib.invalidate_caches()
    module = importlib.import_module(name)
    assert called == [name]
    importlib.reload(module)
    assert called == [name]


def test_the_order_of_calls_and_what_is_cancelled(write: Callable[..., str]) -> None:
    name, called = write(), []
    watches = [WhenImported(name, lambda i=i: called.append(i)) for i in range(4)]  # type: ignore[misc]
    assert watches[1].cancel() and not watches[1].cancel()
    importlib.import_module(name)
    assert called == [0, 2, 3] and not any(watch.cancel() for watch in watches)
    WhenImported(name, lambda: called.append("at once"))
    assert called[-1] == "at once"


def test_an_error_of_the_call_is_not_the_importers(write: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    name = write("x = 1")
    WhenImported(name, lambda: 1 / 0)  # type: ignore[arg-type]
    assert importlib.import_module(name).x == 1
    assert f"what was to be done after the import of {name} failed" in caplog.text


def test_a_watch_made_while_another_thread_imports_waits_for_it(write: Callable[..., str]) -> None:
    """A module is in `sys.modules` before it has anything in it."""
    name = write("import lazy_gate\nlazy_gate.reached.set()\nlazy_gate.go.wait(20)\nready = True\n")
    gate: Any = ModuleType("lazy_gate")
    gate.reached, gate.go = threading.Event(), threading.Event()
    sys.modules["lazy_gate"] = gate
    seen: list[bool] = []
    importer = threading.Thread(target=importlib.import_module, args=(name,))
    importer.start()
    assert gate.reached.wait(20)
    watcher = threading.Thread(
        target=WhenImported, args=(name, lambda: seen.append(hasattr(sys.modules[name], "ready")))
    )
    watcher.start()
    watcher.join(0.2)
    assert seen == []
    gate.go.set()
    for thread in (importer, watcher):
        thread.join(20)
    assert seen == [True]


def test_a_module_that_is_not_there(write: Callable[..., str]) -> None:
    WhenImported("lazy_absent", lambda: None)
    with pytest.raises(ModuleNotFoundError, match="No module named 'lazy_absent'"):
        importlib.import_module("lazy_absent")
    assert importlib.util.find_spec("lazy_absent") is None


def test_one_finder_is_enough_unless_somebody_gets_in_front(write: Callable[..., str]) -> None:
    for i in range(3):
        WhenImported(f"lazy_never_{i}", lambda: None).cancel()
    finders = list(sys.meta_path)
    WhenImported("lazy_never", lambda: None).cancel()
    assert sys.meta_path == finders and finders[0] is lazy._FINDER
    with mock.patch.object(sys, "meta_path", [importlib.machinery.PathFinder, *finders]):
        name, called = write(), []
        WhenImported(name, lambda: called.append(name))
        importlib.import_module(name)
        assert called == [name] and sys.meta_path[1:] == [importlib.machinery.PathFinder, *finders]
