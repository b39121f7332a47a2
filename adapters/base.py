"""What an adapter is, and what it may ask of the package that installs it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from nsa_plugin.adapters.reporting import PathReport
from nsa_plugin.core.batch import BatchDescriptor, Geometry
from nsa_plugin.core.draft_steps import DraftLimits, DraftStep, FillDraftSteps
from nsa_plugin.core.plan import Consumers, PlanStrategy
from nsa_plugin.core.step_update import DraftRows, IndexerRows, SlotGroups, StepUpdate

Strategy = Literal["graph", "share", "copy"]
"""`graph` is `share` with the work recorded in the engine's own CUDA graph."""


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

    def path(self, engine: str, path: str, logger: logging.Logger) -> PathReport:
        """What a path of an engine reports to: counters, metrics, observers, and the engine's own `logger`."""

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

    def step_update(
        self, rows: DraftRows, slots: SlotGroups, request_maps: Sequence[torch.Tensor], indexers: Sequence[IndexerRows]
    ) -> StepUpdate:
        """Make a `StepUpdate` with the implementation that a plugin provides, else the built-in one; raises as that."""

    def draft_steps(self, steps: Sequence[DraftStep], limits: DraftLimits) -> FillDraftSteps:
        """As `bind_draft_steps`, with the implementation that a plugin provides, else the built-in one."""


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
