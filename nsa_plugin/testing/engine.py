"""What a test of an adapter says about its engine: `Engine`, the `Case`s to try, and a `Session` of a running one."""

from __future__ import annotations

import contextlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from nsa_plugin.adapters.base import Strategy
from nsa_plugin.core import reference
from nsa_plugin.hookspec import hookimpl

Values = Mapping[str, torch.Tensor]
"""Name of a value to the value, for one consumer of metadata (a draft step, or the one of another pass)."""

SITUATIONS = (
    "decode", "target verify", "draft extend", "one step", "several steps", "padded rows", "batch size 0", "idle batch",
    "int32 lengths", "int64 lengths", "strided inputs", "several captured sizes",
)  # fmt: skip
"""What the cases of an engine cover between them, unless `Engine.never` says why the engine has no such thing."""


class Skipped(Exception):
    """A line of the contract that can't be checked here, and why."""


@dataclass(frozen=True)
class Case:
    """One thing to capture, and the batches to replay it with.

    Attributes
    ----------
    name : str
    path : str
        As the adapter names it to its host: "draft decode", …
    rounds : int >= 1
        Batches to replay, in turn; let lengths shrink as well as grow between them.
    covers : frozenset of SITUATIONS
    own_defects : frozenset of str
        Values that the engine's own code, when it serves alone, leaves different from `Engine.expected`.
    allocating : frozenset of strategies
        Those whose replay calls functions of the engine that allocate.
    """

    name: str
    path: str
    rounds: int
    covers: frozenset[str]
    own_defects: frozenset[str] = frozenset()
    allocating: frozenset[str] = frozenset()


class Session(ABC):
    """An instance of the engine that has captured a case under whatever is patched at that time."""

    @abstractmethod
    def prepare(self, round: int) -> None:
        """Do what the engine does with the batch of a round before its captured graph runs."""

    @abstractmethod
    def read(self) -> list[Values]:
        """Run the graph, if there is one, and return the defined values that each consumer reads in it.

        Set undefined entries (tails of page tables and the like) to a constant: values are compared whole.
        """

    @abstractmethod
    def buffers(self) -> list[Values]:
        """The tensors, by name, from which each consumer's captured kernels read: their addresses must not change."""

    def capture_again(self) -> None:
        """Capture the same sizes anew in this instance, as the engine does when weights change; old graphs are gone.

        Left out where `Engine.never` says why the engine does no such thing.
        """
        raise NotImplementedError(f"{type(self).__name__}.capture_again, or 'capture again' in Engine.never")

    def objects(self) -> Sequence[object]:
        """The engine's own objects that are its instance: nothing of the adapter's may keep them when they are let go."""
        raise NotImplementedError(f"{type(self).__name__}.objects")


@dataclass(frozen=True)
class Obstacle:
    """Something because of which the adapter must leave the engine alone.

    Attributes
    ----------
    name : str
        What it is; for `probed` ones a word that the problem must mention.
    context : context manager
        Within it the engine is like that. Used once.
    probed : bool
        Whether the probe must see it; False: something that makes the installation itself fail half-way.
    """

    name: str
    context: AbstractContextManager[object]
    probed: bool = True


@contextlib.contextmanager
def without(path: str) -> Iterator[None]:
    """Within it, what a dotted path names is not there (or, where it is inherited, is None)."""
    owner_path, _, name = path.rpartition(".")
    owner = pkgutil.resolve_name(owner_path)
    absent = object()
    own = vars(owner).get(name, absent)
    if own is not absent:
        delattr(owner, name)
    inherited = hasattr(owner, name)
    if inherited:
        setattr(owner, name, None)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        if own is not absent:
            setattr(owner, name, own)


@dataclass
class Fault:
    """An error in our own code, planted.

    Attributes
    ----------
    working : int
        Calls that succeed before the first failure.
    calls : int
        Calls so far.
    plugins : list of objects
        To be registered with the host for it to take effect.
    """

    working: int
    calls: int = 0
    plugins: list[object] = field(default_factory=list)

    def call(self) -> None:
        """Count a call; raise if it is one that fails."""
        self.calls += 1
        if self.calls > self.working:
            raise RuntimeError("planted")


class _FailingPrecompute:
    def __init__(self, fault: Fault) -> None:
        self._fault = fault

    @hookimpl(tryfirst=True)
    def nsa_plugin_bind_precompute(self, batch: Any, geometry: Any, out: Any, enabled: Any) -> Any:
        def run(live: Any) -> None:
            if enabled is not None and enabled.device.type == "cpu" and not enabled:
                return  # an emulated graph runs what it has recorded, and that finds that it is switched off
            lengths = out.steps[0].cache_seqlens
            lengths.masked_fill_(
                lengths == lengths if enabled is None else enabled != 0, -5
            )  # half-written results must not survive
            self._fault.call()
            reference.precompute(live, out, enabled)

        return run


class Engine(ABC):
    """An engine and its adapter, as the conformance kit sees them. Subclass it to test an adapter.

    Attributes
    ----------
    name : str
        Of engine and adapter.
    package : str
        The engine's top-level Python package.
    logger : str
        The engine's own logger, through which the adapter speaks.
    entry_point : str
        "module:function" that the engine calls to load the plugin.
    strategies : tuple of strategies
        Those that the adapter offers, best first.
    never : mapping of situation to reason
        What of `SITUATIONS`, "describe" or "capture again", this engine does not have.
    batch_types : tuple of types
        Every type of batch that the engine passes to the hooked code.
    """

    name: str
    package: str
    logger: str
    entry_point: str
    strategies: tuple[Strategy, ...]
    never: Mapping[str, str] = {}
    batch_types: tuple[type, ...] = ()

    def plugins(self) -> Sequence[object]:
        """Fresh plugins that offer the adapter; none are needed for the built-in ones."""
        return ()

    @abstractmethod
    def cases(self) -> Sequence[Case]:
        """What to try, with each strategy."""

    @abstractmethod
    def expected(self, case: Case) -> list[list[Values]]:
        """For each round, what the engine's own code computes for each consumer alone: the definition of faithful.

        Called while nothing is patched. Named as in `Session.read`.
        """

    @abstractmethod
    def start(self, case: Case) -> Session:
        """Make an instance of the engine that captures `case`."""

    @abstractmethod
    def patched(self) -> Sequence[object]:
        """The classes, modules and other objects whose attributes the adapter may replace."""

    def state(self) -> object:
        """What else an undo must restore, as something that can be compared by value."""
        return None

    @abstractmethod
    def obstacles(self) -> Sequence[Obstacle]:
        """Reasons to leave the engine alone; fresh at every call."""

    @contextlib.contextmanager
    def plant(self, working: int) -> Iterator[Fault]:
        """Plant an error in our code that comes after `working` calls.

        By default in the bound precompute, which adapters reach through `Host.plan`. It writes nonsense first.
        """
        fault = Fault(working)
        fault.plugins.append(_FailingPrecompute(fault))
        yield fault

    def pretend(self, release: str) -> AbstractContextManager[object]:
        """Within it the engine says that it is of this release."""
        return mock.patch("nsa_plugin.adapters.probe.version", lambda distribution: release)

    def running(self) -> AbstractContextManager[object]:
        """Everything happens within this: stand-ins for what the machine lacks, and the like."""
        return contextlib.nullcontext()

    @property
    def device(self) -> torch.device:
        """Where the cases' tensors are."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
