"""Lines of the adapter contract about what lasts: new parameters of a later release, the switch, memory."""

from __future__ import annotations

import gc
import inspect
import logging
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch

from nsa_plugin.adapters.base import Strategy
from nsa_plugin.testing.engine import Case, Engine, Session
from nsa_plugin.testing.watching import (
    WatchedHost,
    attributes,
    installed_adapter,
    logged,
    make_host,
    restored,
    unexcused,
)

if TYPE_CHECKING:
    from nsa_plugin.testing.conformance import Conformance

NEW = "parameter_of_a_later_release"
VALUE = object()
CAPTURES = 4
STORM_ROUNDS = 2


def parameters(kit: Conformance) -> list[str]:
    """What a hooked function does not know reaches the engine's own, and a release that has it is said to be untested."""
    problems: list[str] = []
    _ = kit.expected
    for case in kit.one_of_each_path():
        for strategy in kit.engine.strategies:
            problems += [f"{strategy}, {case.name}: {line}" for line in _with_parameter(kit, case, strategy)]
    return list(dict.fromkeys(problems))


def _with_parameter(kit: Conformance, case: Case, strategy: Strategy) -> list[str]:
    engine, problems = kit.engine, []
    hooked = _hooked(engine, strategy)
    if not hooked:
        return ["no function of Engine.patched() is hooked"]
    calls = _Calls()
    with restored(engine):
        for owner, name in hooked:
            setattr(owner, name, calls.extend(vars(owner)[name]))
        with logged(engine.logger) as records, installed_adapter(engine, strategy) as (host, _):
            warnings = [record.getMessage() for record in records if record.levelno == logging.WARNING]
            problems += [
                f"{name}: no warning that names it and {NEW}"
                for _, name in hooked
                if not any(name in line and NEW in line for line in warnings)
            ]
            with calls.passing(hooked):
                try:
                    session = engine.start(case)
                    for round in range(case.rounds):
                        if round == 1:
                            host.switch(False, "the kit")
                        session.prepare(round)
                        wrong = kit.differences(case, round, session.read())
                        problems += unexcused(wrong, case.own_defects if round else frozenset())
                except Exception as error:
                    problems.append(f"it raised {type(error).__name__}: {error}")
            problems += [f"it fell back: {' '.join(cause)}" for cause in host.fallbacks]
    return problems + [f"{name}: the engine's own is called without the new parameter" for name in calls.lost]


def _hooked(engine: Engine, strategy: Strategy) -> list[tuple[Any, str]]:
    """The engine's own functions that an installation replaces."""
    before = attributes(engine)
    with restored(engine), installed_adapter(engine, strategy):
        after = attributes(engine)
    return [
        (engine.patched()[index], name)
        for (index, name), value in before.items()
        if after.get((index, name)) is not value and inspect.isfunction(value)
    ]


class _Calls:
    """What the engine passes to hooked functions, and what of it arrives.

    Attributes
    ----------
    lost : names of functions, as keys
        Those that were called on the engine's behalf without what the engine had passed.
    """

    def __init__(self) -> None:
        self.lost: dict[str, None] = {}
        self._open: list[tuple[str, list[bool]]] = []

    def extend(self, original: Any) -> Any:
        """`original`, as a release has it that takes one parameter more; still of the engine's own module."""
        opened, name, new, value = self._open, original.__name__, NEW, VALUE

        def extended(*arguments: Any, **keywords: Any) -> Any:
            arrived = keywords.pop(new, None) is value
            if opened and opened[-1][0] == name:
                opened[-1][1].append(arrived)
            return original(*arguments, **keywords)

        made: Any = FunctionType(extended.__code__, original.__globals__, name, None, extended.__closure__)
        vars(made).update(vars(original))
        made.__module__, made.__qualname__, made.__doc__ = original.__module__, original.__qualname__, original.__doc__
        signature = inspect.signature(original)
        listed = list(signature.parameters.values())
        place = len(listed) - (bool(listed) and listed[-1].kind is inspect.Parameter.VAR_KEYWORD)
        listed.insert(place, inspect.Parameter(NEW, inspect.Parameter.KEYWORD_ONLY, default=None))
        made.__signature__ = signature.replace(parameters=listed)
        return made

    @contextmanager
    def passing(self, hooked: list[tuple[Any, str]]) -> Iterator[None]:
        """Within it the engine passes the new parameter to what stands in for its functions."""
        standing = [(owner, name, vars(owner)[name]) for owner, name in hooked]
        for owner, name, function in standing:
            setattr(owner, name, self._passing(name, function))
        try:
            yield
        finally:
            for owner, name, function in standing:
                setattr(owner, name, function)

    def _passing(self, name: str, function: Any) -> Any:
        def passing(*arguments: Any, **keywords: Any) -> Any:
            arrived: list[bool] = []
            self._open.append((name, arrived))
            try:
                return function(*arguments, **{**keywords, NEW: VALUE})
            finally:
                self._open.pop()
                if arrived and not any(arrived):
                    self.lost[name] = None

        return passing


def switch(kit: Conformance) -> list[str]:
    """Off is off from the moment it is said: before the start, at a capture, at a replay; and on is on again."""
    problems: list[str] = []
    for case in kit.one_of_each_path():
        for strategy in kit.engine.strategies:
            for off in (_off_before_install, _off_before_capture, _off_after_capture, _storm):
                with restored(kit.engine):
                    problems += [f"{strategy}, {case.name}, {line}" for line in off(kit, case, strategy)]
    return list(dict.fromkeys(problems))


class _Switched:
    """A host with an adapter to be switched, and a count of what runs of ours."""

    def __init__(self, kit: Conformance, case: Case, strategy: Strategy, fault: Any) -> None:
        self._kit, self._case, self._fault = kit, case, fault
        self.host, self.adapter = make_host(kit.engine, strategy, fault.plugins)
        self.problems: list[str] = []

    def install(self) -> None:
        if found := self.adapter.install(self.host):
            raise AssertionError(f"install() found {found}")

    def replay(self, session: Session, when: str, ours: bool | None) -> None:
        """All rounds. `ours` says whether something of ours must run in them; None: it may."""
        before = self._fault.calls
        for round in range(self._case.rounds):
            session.prepare(round)
            wrong = self._kit.differences(self._case, round, session.read())
            self.problems += [f"{when}: {line}" for line in unexcused(wrong, self._case.own_defects)]
        self.ran(when, before, ours)

    def ran(self, when: str, before: int, ours: bool | None) -> None:
        """Note it if something of ours ran since there were `before` calls, and must not have, or the other way round."""
        if ours is not None and ours != (self._fault.calls > before):
            self.problems.append(f"{when}: ours {'does not run' if ours else 'runs'}")

    @property
    def calls(self) -> int:
        count: int = self._fault.calls
        return count


@contextmanager
def _switched(kit: Conformance, case: Case, strategy: Strategy, problems: list[str]) -> Iterator[_Switched]:
    _ = kit.expected
    with kit.engine.plant(sys.maxsize) as fault:
        switched = _Switched(kit, case, strategy, fault)
        try:
            yield switched
        except Exception as error:
            switched.problems.append(f"it raised {type(error).__name__}: {error}")
        finally:
            switched.adapter.undo()
    problems += switched.problems
    problems += [f"it fell back: {' '.join(cause)}" for cause in switched.host.fallbacks]


def _off_before_install(kit: Conformance, case: Case, strategy: Strategy) -> list[str]:
    problems: list[str] = []
    with _switched(kit, case, strategy, problems) as switched:
        switched.host.switch(False, "the kit")
        switched.install()
        session = kit.engine.start(case)
        switched.replay(session, "off before the install", False)
        switched.ran("off before the install", 0, False)
        switched.host.switch(True, "the kit")
        switched.replay(session, "on after an install while off", None)
        before, again = switched.calls, kit.engine.start(case)
        switched.replay(again, "on again after a new capture", None)
        switched.ran("on again after a new capture", before, True)
    return problems


def _off_before_capture(kit: Conformance, case: Case, strategy: Strategy) -> list[str]:
    problems: list[str] = []
    with _switched(kit, case, strategy, problems) as switched:
        switched.install()
        switched.host.switch(False, "the kit")
        session = kit.engine.start(case)
        switched.replay(session, "off before the capture", False)
        switched.ran("off before the capture", 0, False)
        switched.host.switch(True, "the kit")
        switched.replay(session, "on after a capture while off", None)
    return problems


def _off_after_capture(kit: Conformance, case: Case, strategy: Strategy) -> list[str]:
    problems: list[str] = []
    with _switched(kit, case, strategy, problems) as switched:
        switched.install()
        session = kit.engine.start(case)
        goes_on = bool(switched.host.switch(False, "the kit"))
        switched.replay(session, "off after the capture", None if goes_on else False)
        switched.host.switch(True, "the kit")
        on_device = kit.engine.device.type == "cuda" and strategy == "graph"
        switched.replay(session, "on again", None if on_device else True)
        if "capture again" not in kit.engine.never:
            switched.host.switch(False, "the kit")
            before = switched.calls
            session.capture_again()
            switched.replay(session, "off before a new capture", False)
            switched.ran("off before a new capture", before, False)
    return problems


def _storm(kit: Conformance, case: Case, strategy: Strategy) -> list[str]:
    """A thread switches all the time, through start, capture, replay and a new capture."""
    problems: list[str] = []
    stop = threading.Event()
    level, interval = logging.getLogger("nsa_plugin").level, sys.getswitchinterval()
    with _switched(kit, case, strategy, problems) as switched:
        host: WatchedHost = switched.host

        def toggle() -> None:
            on = True
            while not stop.is_set():
                on = not on
                host.switch(on, "the kit")
                stop.wait(0.001)

        thread = threading.Thread(target=toggle)
        logging.getLogger("nsa_plugin").setLevel(logging.ERROR)
        sys.setswitchinterval(1e-5)
        thread.start()
        try:
            switched.install()
            session = kit.engine.start(case)
            for turn in range(STORM_ROUNDS):
                switched.replay(session, "in a storm", None)
                if not turn and "capture again" not in kit.engine.never:
                    session.capture_again()
        except Exception as error:
            switched.problems.append(f"in a storm: it raised {type(error).__name__}: {error}")
        finally:
            stop.set()
            thread.join()
            sys.setswitchinterval(interval)
            logging.getLogger("nsa_plugin").setLevel(level)
    return problems


def memory(kit: Conformance) -> list[str]:
    """Live memory is flat over captures in one instance, and what belongs to an instance goes with it."""
    engine, problems = kit.engine, []
    _ = kit.expected
    for case in kit.one_of_each_path():
        for strategy in engine.strategies:
            with restored(engine), installed_adapter(engine, strategy):
                problems += [f"{strategy}, {case.name}: {line}" for line in _memory(kit, case)]
    return problems


def _memory(kit: Conformance, case: Case) -> list[str]:
    engine, problems = kit.engine, []
    session = engine.start(case)
    sizes: list[int] = []
    for turn in range(1 if "capture again" in engine.never else CAPTURES):
        if turn:
            session.capture_again()
        for round in range(case.rounds):
            session.prepare(round)
            wrong = kit.differences(case, round, session.read())
            problems += [f"captured {turn + 1} times: {line}" for line in wrong]
        sizes.append(live_bytes())
    if len(sizes) > 2 and sizes[-1] > sizes[1]:
        problems.append(f"{sizes[-1] - sizes[1]} bytes more are live after {len(sizes)} captures than after 2")
    alive = list(map(weakref.ref, session.objects()))
    del session
    gc.collect()
    kept = Counter(type(part).__name__ for reference in alive if (part := reference()) is not None)
    return problems + [f"{count} {name} is kept after its instance is gone" for name, count in kept.items()]


def live_bytes() -> int:
    """Bytes of all tensors that Python code can reach, and of what PyTorch's CUDA allocator has given out."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type != "meta":
            try:
                storage = thing.untyped_storage()
            except Exception:  # a tensor without a storage: sparse, functorch's
                continue
            storages[storage.data_ptr()] = storage.nbytes() if storage.device.type == "cpu" else 0
    return sum(storages.values()) + (torch.cuda.memory_allocated() if torch.cuda.is_available() else 0)
