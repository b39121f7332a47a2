"""What an adapter is, and what it may ask of the package that installs it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, Protocol, TypeVar

import torch

from nsa_plugin.core.batch import BatchDescriptor, Geometry
from nsa_plugin.core.draft_steps import DraftLimits
from nsa_plugin.core.metadata import equal_in_pieces
from nsa_plugin.core.plan import Consumers, PlanStrategy

P = ParamSpec("P")
T = TypeVar("T")
Strategy = Literal["graph", "share", "copy"]
"""`graph` is `share` with the work recorded in the engine's own CUDA graph."""
Stage = Literal["capture", "replay"]
"""When something is handed back to the engine."""


@dataclass(frozen=True)
class Fallback:
    """Something was handed back to the engine's own path.

    Attributes
    ----------
    engine, path : str
        Whose, and which of the adapter's paths ("draft decode", "target verify", …).
    stage : "capture" or "replay"
    strategy : str
        What failed.
    error : Exception
    """

    engine: str
    path: str
    stage: Stage
    strategy: str
    error: Exception


@dataclass(frozen=True)
class Mismatch:
    """A verification found values other than those that the engine's own path computes.

    Attributes
    ----------
    engine, path, strategy : as in `Fallback`
    batch : BatchDescriptor
        The live batch.
    geometry : Geometry
    values : tuple of (int, mapping, mapping)
        For each draft step that differs its index, the engine's defined values by field name, and ours.
    limits : DraftLimits or None
        For engines that move positions on from step to step: how far. The fields of `values` are then named as the
        engine names them, a path of attributes.
    """

    engine: str
    path: str
    strategy: str
    batch: BatchDescriptor
    geometry: Geometry
    values: tuple[tuple[int, Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]], ...]
    limits: DraftLimits | None = None

    @property
    def fields(self) -> list[str]:
        """Names of the fields that differ in any step."""
        return sorted({name for _, expected, got in self.values for name in differing(expected, got)})


def differing(expected: Mapping[str, torch.Tensor], got: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of defined values that are not equal, or only there on one side."""
    return sorted(
        name
        for name in expected.keys() | got.keys()
        if name not in expected or name not in got or not equal_in_pieces(expected[name], got[name])
    )


@dataclass(frozen=True)
class PathPlan:
    """What an adapter would do for one of its paths; what is only known at capture is said so.

    Attributes
    ----------
    path : str
    strategy : str
        The first that would be tried; "off" if the engine's own path stays.
    why : str
        Why not a better one; empty if there is none.
    """

    path: str
    strategy: str
    why: str


class Host(Protocol):
    """The side of the package that an adapter talks to."""

    @property
    def on(self) -> bool:
        """Whether to do anything but the engine's own path: one attribute read.

        Any thread may change it at any time. Read it once when a capture, a replay or a draft is prepared, and decide
        everything by that.
        """

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it is off; empty while it is on."""

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """Strategies to try, best first; empty while switched off. Read it once per decision: see `on`."""

    @property
    def configured(self) -> tuple[Strategy, ...]:
        """Strategies that the settings name, best first, switched off or not.

        What `install` goes by: switched off at the start, an engine may be switched on later.
        """

    @property
    def verify(self) -> int:
        """Every how many replays to compare with the engine's own path; 0 is never."""

    @property
    def exact_step_lengths(self) -> bool:
        """Whether draft steps shall see the draft tokens before them, whatever the engine's own path does."""

    def describe(
        self, engine: str, batch: object, default: Callable[[object], BatchDescriptor]
    ) -> Callable[[object], BatchDescriptor]:
        """The describe function for batches like `batch`: a plugin's, else `default`."""

    def plan(
        self,
        batch: BatchDescriptor,
        geometry: Geometry,
        consumers: Consumers,
        strategy: PlanStrategy,
        derive: Callable[[], None] | None,
        enabled: torch.Tensor | None = None,
    ) -> Callable[[BatchDescriptor], None]:
        """Make a `ReplayPlan` with whatever implementations plugins provide; returns its `run`.

        Raises `UnavailableError` if `enabled` is given and a plugin's implementation does not take it.
        """

    def observer(
        self, engine: str, path: str, strategy: str, batch: BatchDescriptor
    ) -> Callable[[BatchDescriptor], None] | None:
        """What to call after each replay; None if nobody watches. It never raises."""

    def instrument(
        self, call: Callable[[Any], None], engine: str, path: str, strategy: str, steps: int
    ) -> Callable[[Any], None]:
        """`call`, which prepares one replay, reported about; `call` itself if nothing is. To be used when it is bound.

        `steps` is the number of draft steps that it serves, `strategy` "off" for the engine's own code.
        """

    def durations(self, engine: str, path: str, strategy: str, steps: int) -> Callable[[float], None] | None:
        """Where the seconds of a replay go whose preparation is spread over several calls; None if nobody wants them."""

    def ranged(self, call: Callable[P, T], engine: str, path: str, strategy: str) -> Callable[P, T]:
        """`call`, one of several that prepare a replay, in an NVTX range; `call` itself if nobody wants one."""

    def buffers(self, engine: str, path: str, strategy: str, size: int) -> None:
        """Report that buffers of `size` bytes hold the metadata of one more captured batch size."""

    def verified(self, engine: str, path: str, strategy: str) -> None:
        """Count a verification, whatever it finds; to be called before `mismatched`."""

    def mismatched(self, logger: logging.Logger, mismatch: Mismatch) -> None:
        """Count a mismatch, log it once, write a repro file, switch everything of this process to the engine's path."""

    def fell_back(self, logger: logging.Logger, fallback: Fallback) -> None:
        """Count a fall-back, log its cause once, tell observers."""

    def using(self, logger: logging.Logger, engine: str, path: str, strategy: str) -> None:
        """Log once that a path of an engine is served, and how."""


class Adapter(Protocol):
    """One engine. See the contract in each method.

    Attributes
    ----------
    name : str
        The engine's.
    features : frozenset of str
        Fields of `Settings` that it can honour beyond the strategy: "verify", "step_lengths".
    """

    name: str
    features: frozenset[str]

    def probe(self) -> list[str]:
        """What is missing in the installed engine: empty if it fits.

        Looks at capabilities, never at the version alone; each problem says what was looked for, what was found and
        what to do. Imports the engine, changes nothing.
        """

    def untested(self) -> list[str]:
        """Hooked functions with parameters that no tested release has, a line each; empty once installed."""

    def install(self, host: Host) -> list[str]:
        """Patch the engine, completely or not at all; returns the problems that kept it from doing so.

        Does nothing if it is installed already.
        """

    def undo(self) -> None:
        """Put back every attribute that `install` or a later capture replaced, by identity."""

    def summary(self) -> str:
        """What is accelerated and what is left alone, for one log line."""

    def switch(self, on: bool) -> list[str]:
        """Say what goes on as before although the host was switched, one line each with the reason.

        That is work recorded in CUDA graphs which can't be switched there, or what was captured while switched off. Called
        from any thread, after the change, one call at a time; what acts on the change is `Host.on`.
        """

    def paths(self, host: Host) -> list[PathPlan]:
        """What would be done for each path with the host's settings. Captures nothing, needs no GPU."""
