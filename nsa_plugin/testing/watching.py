"""How the conformance kit looks at an adapter: a host that writes down what is asked of it, logs, attributes, copies."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_plugin import entry
from nsa_plugin.adapters.base import Adapter
from nsa_plugin.core.batch import BatchDescriptor
from nsa_plugin.core.errors import UnavailableError
from nsa_plugin.host import Host
from nsa_plugin.settings import Settings
from nsa_plugin.testing.engine import Engine


class Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names the operators, run within it, that make a tensor, write into one, or read one on the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        fresh = any(returned.alias_info is None for returned in func._schema.returns)
        if fresh or func._schema.is_mutable:
            self.operators.append(str(func))
        return func(*args, **(kwargs or {}))


class WatchedHost(Host):
    """The host that users get, which also writes down what an adapter asks of it.

    Attributes
    ----------
    described : list of (type of batch, problem or "")
    served : list of (path, strategy)
        What the adapter says that it serves.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.described: list[tuple[type, str]] = []
        self.served: list[tuple[str, str]] = []

    def describe(
        self, engine: str, batch: object, default: Callable[[object], BatchDescriptor]
    ) -> Callable[[object], BatchDescriptor]:
        """The describe function, watched."""
        bound = super().describe(engine, batch, default)

        def watched(live: object) -> BatchDescriptor:
            copies = Copies()
            try:
                with copies:
                    described = bound(live)
            except Exception as error:
                self.described.append((type(live), f"it raised {type(error).__name__}: {error}"))
                raise
            problem = f"it ran {', '.join(copies.operators)}" if copies.operators else ""
            if not isinstance(described, BatchDescriptor):
                problem = f"it returned a {type(described).__name__}, not a BatchDescriptor"
            self.described.append((type(live), problem))
            return described

        return watched

    def using(self, logger: logging.Logger, engine: str, path: str, strategy: str) -> None:
        """Note and log that a path is served."""
        self.served.append((path, strategy))
        super().using(logger, engine, path, strategy)


def make_host(engine: Engine, strategy: str = "auto", plugins: Sequence[object] = ()) -> tuple[WatchedHost, Adapter]:
    """A fresh host, and the adapter for `engine` that it finds.

    Raises
    ------
    UnavailableError
        Nobody offers one.
    """
    host = WatchedHost(Settings(strategy=strategy))
    for plugin in (*engine.plugins(), *plugins):
        host.manager.register(plugin)
    adapter = host.manager.adapter(engine.name)
    if adapter is None:
        raise UnavailableError(f"no plugin offers an adapter for {engine.name}; Engine.plugins() must return one")
    return host, adapter


@contextlib.contextmanager
def installed_adapter(
    engine: Engine, strategy: str = "auto", plugins: Sequence[object] = ()
) -> Iterator[tuple[WatchedHost, Adapter]]:
    """An installed adapter and its host. Undone afterwards.

    Raises
    ------
    AssertionError
        It could not be installed.
    """
    host, adapter = make_host(engine, strategy, plugins)
    if problems := adapter.install(host):
        raise AssertionError(f"install() found problems: {problems}")
    try:
        yield host, adapter
    finally:
        adapter.undo()


Attributes = dict[tuple[int, str], Any]


def attributes(engine: Engine) -> Attributes:
    """Every attribute of what the adapter may patch."""
    return {(index, name): value for index, owner in enumerate(engine.patched()) for name, value in vars(owner).items()}


def changed(before: Attributes, after: Attributes) -> list[str]:
    """Names of the attributes that are not the same object any more."""
    absent = object()
    return sorted(
        name
        for index, name in before.keys() | after.keys()
        if before.get((index, name), absent) is not after.get((index, name), absent)
    )


@contextlib.contextmanager
def restored(engine: Engine) -> Iterator[None]:
    """Put the engine back afterwards, whatever an adapter has left behind: one defect must not hide another."""
    before = attributes(engine)
    hosts = dict(entry._hosts)
    entry._hosts.clear()
    try:
        yield
    finally:
        for host in entry._hosts.values():
            if isinstance(host, Host) and (adapter := host.manager.adapter(engine.name)) is not None:
                with contextlib.suppress(Exception):
                    adapter.undo()
        entry._hosts.clear()
        entry._hosts.update(hosts)
        after = attributes(engine)
        owners = engine.patched()
        for index, name in after.keys() - before.keys():
            delattr(owners[index], name)
        for (index, name), value in before.items():
            if after.get((index, name)) is not value:
                setattr(owners[index], name, value)


def unexcused(lines: Sequence[str], excused: frozenset[str]) -> list[str]:
    """Differences but for those in the values that are named."""
    return [line for line in lines if line.rpartition(": ")[2] not in excused]


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextlib.contextmanager
def logged(name: str) -> Iterator[list[logging.LogRecord]]:
    """The records of INFO and above that go through a logger."""
    logger, handler = logging.getLogger(name), _Records()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler.records
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def synchronizes(call: Callable[[], None]) -> str:
    """Empty, or the host syncs that `call` makes on a CUDA device.

    They are warned of, not refused: an adapter takes an error for one of its own and goes on with the engine's values.
    """
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        caught.clear()  # the mode warns of itself
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    syncs = sorted({f"{entry.message} ({entry.filename}:{entry.lineno})" for entry in caught})
    return "; ".join(sync for sync in syncs if "synchroniz" in sync)


def allocations(call: Callable[[], None]) -> int:
    """Bytes that `call` takes from PyTorch's CUDA allocator."""
    before = torch.cuda.memory_stats()["allocated_bytes.all.allocated"]
    call()
    return int(torch.cuda.memory_stats()["allocated_bytes.all.allocated"] - before)
