"""The lines of the adapter contract: a function for each, which returns what is wrong."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING
from unittest import mock

from nsa_plugin import __version__
from nsa_plugin.adapters.base import Strategy
from nsa_plugin.settings import STRATEGIES
from nsa_plugin.testing import lasting, patches
from nsa_plugin.testing.engine import SITUATIONS, Case, Engine, Fault, Skipped
from nsa_plugin.testing.watching import (
    WatchedHost,
    allocations,
    attributes,
    changed,
    installed_adapter,
    logged,
    make_host,
    restored,
    synchronizes,
    unexcused,
)

if TYPE_CHECKING:
    from nsa_plugin.testing.conformance import Conformance

UNTESTED = "999.0.0"
MESSAGE = re.compile(r"looked for .+, found .+; .+", re.DOTALL)
FAULTY_ROUNDS = 4


def coverage(kit: Conformance) -> list[str]:
    """The cases of the fixture cover every situation that the engine can be in."""
    engine, problems = kit.engine, []
    cases = engine.cases()
    covered = {situation for case in cases for situation in case.covers}
    for situation in SITUATIONS:
        if situation not in covered and situation not in engine.never:
            problems.append(f"no case covers {situation!r}; add one, or say in Engine.never why there is none")
    problems += [f"unknown situation {situation!r}" for situation in sorted(covered - set(SITUATIONS))]
    problems += [f"case {case.name!r} has no rounds" for case in cases if case.rounds < 1]
    problems += [
        f"two cases are called {name!r}" for name, count in Counter(c.name for c in cases).items() if count > 1
    ]
    if not any(obstacle.probed for obstacle in engine.obstacles()):
        problems.append("Engine.obstacles() names nothing that the probe must see")
    for case in cases:
        rounds = kit.expected[case.name]
        if len(rounds) != case.rounds:
            problems.append(f"case {case.name!r}: Engine.expected() gave {len(rounds)} rounds, not {case.rounds}")
        if not any(values for consumers in rounds for values in consumers):
            problems.append(f"case {case.name!r}: Engine.expected() gave no values")
    return problems


def probe(kit: Conformance) -> list[str]:
    """The probe is clean, changes nothing, names what is missing, and does not go by the version."""
    engine = kit.engine
    before, problems = attributes(engine), []
    _, adapter = make_host(engine)
    problems += [f"not clean: {problem}" for problem in adapter.probe()]
    with engine.pretend(UNTESTED):
        refused = adapter.probe()
        problems += [f"it goes by the version ({UNTESTED}): {problem}" for problem in refused]
        with logged(engine.logger) as records, restored(engine):
            if not refused:
                with installed_adapter(engine):
                    pass
            warnings = [_text(record) for record in records if record.levelno == logging.WARNING]
            if len(warnings) != 1 or UNTESTED not in warnings[0]:
                problems.append(f"an untested release needs one warning that names it, {UNTESTED}; got {warnings}")
    problems += [f"the probe changed {name}" for name in changed(before, attributes(engine))]
    for obstacle in engine.obstacles():
        if not obstacle.probed:
            continue
        with obstacle.context:
            try:
                found = make_host(engine)[1].probe()
            except Exception as error:
                problems.append(f"{obstacle.name} missing: it raised {type(error).__name__}: {error}")
                continue
        if not any(obstacle.name in problem for problem in found):
            problems.append(f"{obstacle.name} missing: not named by {found}")
        problems += [
            f"expected 'looked for …, found …; what to do', got {problem!r}"
            for problem in found
            if not MESSAGE.fullmatch(problem)
        ]
    return problems


def install(kit: Conformance) -> list[str]:
    """Installed completely or not at all, and once."""
    engine, problems = kit.engine, []
    for obstacle in engine.obstacles():
        with restored(engine), obstacle.context:
            before, state = attributes(engine), engine.state()
            host, adapter = make_host(engine)
            try:
                found = adapter.install(host)
                if found and not adapter.install(host):
                    problems.append(f"{obstacle.name}: a second install() claims to have worked")
            except Exception as error:
                found = [] if obstacle.probed else [str(error)]
                if obstacle.probed:
                    problems.append(f"{obstacle.name} missing: it raised {type(error).__name__}: {error}")
            left = changed(before, attributes(engine))
            if not found and (obstacle.probed or left):
                problems.append(f"{obstacle.name}: install() returned no problem")
            if left or engine.state() != state:
                problems.append(f"{obstacle.name}: something is patched all the same: {left}")
                with suppress(Exception):
                    adapter.undo()
    before = attributes(engine)
    with installed_adapter(engine) as (host, adapter):
        once = attributes(engine)
        if not changed(before, once):
            problems.append("install() changed no attribute of Engine.patched()")
        state = engine.state()
        again = adapter.install(host)
        if again or changed(once, attributes(engine)) or engine.state() != state:
            problems.append(f"a second install() is not without effect: {again or changed(once, attributes(engine))}")
    return problems


def undo(kit: Conformance) -> list[str]:
    """Every attribute is the one that was there before, an engine in use goes on with its own code."""
    engine, problems = kit.engine, []
    case = engine.cases()[0]
    _ = kit.expected
    for strategy in engine.strategies:
        before, state = attributes(engine), engine.state()
        with restored(engine):
            host, adapter = make_host(engine, strategy)
            adapter.undo()
            for time in ("first", "second"):
                if found := adapter.install(host):
                    problems.append(f"{strategy}: {time} install() found {found}")
                    break
                session = engine.start(case)
                session.prepare(0)
                session.read()
                adapter.undo()
                adapter.undo()
                left = [*changed(before, attributes(engine)), *(["Engine.state()"] if engine.state() != state else [])]
                problems += [f"{strategy}: {name} is not what it was" for name in left]
                if left:
                    break
                try:
                    session.prepare(case.rounds - 1)
                    wrong = kit.differences(case, case.rounds - 1, session.read())
                except Exception as error:
                    wrong = [f"it raised {type(error).__name__}: {error}"]
                problems += [
                    f"{strategy}, {case.name}, after the undo: {line}" for line in unexcused(wrong, case.own_defects)
                ]
    return problems


def describe(kit: Conformance) -> list[str]:
    """Every type of batch that the engine passes is described, and no tensor is copied or read."""
    if reason := kit.engine.never.get("describe"):
        raise Skipped(reason)
    problems: dict[str, None] = {}
    seen: set[type] = set()
    for run in kit.runs:
        for kind, problem in run.described:
            seen.add(kind)
            if problem:
                problems[f"{run.strategy}, {run.case.name}, {kind.__name__}: {problem}"] = None
    missing = [kind.__name__ for kind in kit.engine.batch_types if kind not in seen]
    if missing or not kit.engine.batch_types:
        problems[f"PathReport.describe never saw a batch of {missing or 'any Engine.batch_types'}"] = None
    return list(problems)


def faithful(kit: Conformance) -> list[str]:
    """Every value that a consumer reads is what the engine's own code computes."""
    return [f"{run.strategy}, {run.case.name}: {line}" for run in kit.runs for line in run.wrong]


def addresses(kit: Conformance) -> list[str]:
    """Captured kernels find their buffers where they were at capture."""
    return [f"{run.strategy}, {run.case.name}: {line}" for run in kit.runs for line in run.moved]


def replays(kit: Conformance) -> list[str]:
    """A replay allocates nothing and does not wait for the device."""
    engine, problems = kit.engine, []
    if engine.device.type != "cuda":
        raise Skipped("allocations and host syncs are seen on a CUDA device only")
    for case in engine.cases():
        for strategy in engine.strategies:
            with restored(engine), installed_adapter(engine, strategy) as (host, _):
                session = engine.start(case)
                for round in range(case.rounds):  # everything is compiled
                    session.prepare(round)
                for round in range(case.rounds):
                    prepare = partial(session.prepare, round)
                    if error := synchronizes(prepare):
                        problems.append(f"{strategy}, {case.name}, round {round}: {error}")
                    elif strategy not in case.allocating and (size := allocations(prepare)):
                        problems.append(f"{strategy}, {case.name}, round {round}: {size} bytes are allocated")
                problems += [f"{strategy}, {case.name}: it fell back: {' '.join(cause)}" for cause in host.fallbacks]
    return problems


def errors(kit: Conformance) -> list[str]:
    """An error of ours: the engine's values stay right, the strategy steps down, one line and a count say why."""
    engine = kit.engine
    _ = kit.expected
    return [
        f"{strategy}, {case.name}, failing after {working} calls: {problem}"
        for case in kit.one_of_each_path()
        for strategy in engine.strategies
        for working in range(3)
        for problem in _with_fault(kit, case, strategy, working)
    ]


def _with_fault(kit: Conformance, case: Case, strategy: Strategy, working: int) -> list[str]:
    engine, problems = kit.engine, []
    with restored(engine), logged(engine.logger) as records, engine.plant(working) as fault:
        host, adapter = make_host(engine, strategy, fault.plugins)
        if found := adapter.install(host):
            return [f"install() found {found}"]
        try:
            problems += _replay_with(kit, case, fault, host)
        except Exception as error:
            problems.append(f"the engine saw it: {type(error).__name__}: {error}")
        finally:
            adapter.undo()
    if fault.calls <= working:
        problems.append("the planted error was never reached")
    lines = [_text(record) for record in records if record.levelno >= logging.ERROR]
    if len(lines) != len(host.fallbacks) or not lines or not all("planted" in line for line in lines):
        problems.append(f"one line with the cause for each of {list(host.fallbacks)}, got {lines}")
    if any(count > 1 for count in host.fallbacks.values()):
        problems.append(f"what failed was tried again: {dict(host.fallbacks)}")
    return problems


def _replay_with(kit: Conformance, case: Case, fault: Fault, host: WatchedHost) -> list[str]:
    problems: list[str] = []
    session = kit.engine.start(case)
    served = any(path == case.path for path, _ in host.served)
    excused = frozenset() if served else case.own_defects
    calls = fault.calls
    for turn in range(FAULTY_ROUNDS):
        calls = fault.calls
        session.prepare(turn % case.rounds)
        problems += unexcused(kit.differences(case, turn % case.rounds, session.read()), excused)
    if fault.calls > calls:
        problems.append("what failed is still tried at every replay")
    return problems


def register(kit: Conformance) -> list[str]:
    """Loading the plugin never raises, says what it does in one line of the engine's log, imports no engine by itself."""
    engine = kit.engine
    module, _, function = engine.entry_point.partition(":")
    entry: Callable[[], None] = getattr(__import__(module, fromlist=[function]), function)
    with restored(engine), installed_adapter(engine) as (_, adapter):
        summary = adapter.summary()
    problems = _registering(engine, "by default", entry, {}, (__version__, "auto", summary), patches=True)
    problems += _registering(
        engine, "switched off", entry, {"NSA_PLUGIN_STRATEGY": "off"}, (__version__, "off"), patches=False
    )
    problems += _registering(
        engine,
        "unknown strategy",
        entry,
        {"NSA_PLUGIN_STRATEGY": "nonsense"},
        (__version__, *STRATEGIES),
        patches=False,
    )
    for obstacle in engine.obstacles():
        with obstacle.context:
            words = (__version__, obstacle.name) if obstacle.probed else (__version__,)
            problems += _registering(engine, obstacle.name, entry, {}, words, patches=False)
    with mock.patch.object(type(adapter), "install", side_effect=RuntimeError("planted")):
        problems += _registering(engine, "install() raises", entry, {}, (__version__, "planted"), patches=False)
    return problems + _in_a_fresh_process(engine)


def _registering(
    engine: Engine, name: str, entry: Callable[[], None], settings: dict[str, str], words: Sequence[str], patches: bool
) -> list[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("NSA_PLUGIN_")}
    problems = []
    with restored(engine), logged(engine.logger) as records, mock.patch.dict(os.environ, clean | settings, clear=True):
        before = attributes(engine)
        try:
            for _ in range(2 if patches else 1):  # engines may load plugins more than once per process
                entry()
        except Exception as error:
            return [f"{name}: it raised {type(error).__name__}: {error}"]
        lines = [_text(record) for record in records if __version__ in _text(record)]
        if patches != bool(changed(before, attributes(engine))):
            problems.append(f"{name}: the engine is {'not ' if patches else ''}patched")
    if len(lines) != 1 or not all(word in line for line in lines for word in words):
        problems.append(f"{name}: one line of the log {engine.logger!r} with {', '.join(words)}, got {lines}")
    return problems


FRESH = """
import importlib, logging, sys
package, point = sys.argv[1:]
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(name)s: %(message)s")
module, _, function = point.partition(":")
register = getattr(importlib.import_module(module), function)
heavy = [name for name in (package, "triton") if name in sys.modules]
if heavy:
    print("imported without being asked:", *heavy)
sys.modules[package] = None
register()
"""


def _in_a_fresh_process(engine: Engine) -> list[str]:
    """Without the engine: nothing of it is imported, nothing is raised, one line says what was not found."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("NSA_PLUGIN_")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", FRESH, engine.package, engine.entry_point]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return [f"without the engine: {done.stderr.strip().splitlines()[-1]}"]
    problems = [line for line in done.stdout.splitlines() if line.startswith("imported")]
    said = [line for line in done.stdout.splitlines() if line.startswith(f"{engine.logger}:") and __version__ in line]
    if len(said) != 1:
        problems.append(f"without the engine: one line of the log {engine.logger!r} that says so, got {done.stdout!r}")
    return problems


LINES: dict[str, Callable[[Conformance], list[str]]] = {
    "coverage": coverage,
    "probe": probe,
    "install": install,
    "undo": undo,
    "ledger": patches.ledger,
    "describe": describe,
    "faithful": faithful,
    "addresses": addresses,
    "replays": replays,
    "errors": errors,
    "parameters": lasting.parameters,
    "switch": lasting.switch,
    "memory": lasting.memory,
    "register": register,
}
"""Name of a line of the adapter contract to its check."""


def _text(record: logging.LogRecord) -> str:
    return record.getMessage()
