"""The two contracts: `Adapter` is what an engine brings, `Host` is what the package that installs it offers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from nsa_plugin.adapters.ledger import LedgerRow
from nsa_plugin.adapters.reporting import PathReport
from nsa_plugin.core.batch import BatchDescriptor, Geometry
from nsa_plugin.core.draft_steps import DraftLimits, DraftStep, FillDraftSteps
from nsa_plugin.core.plan import Consumers, PlanStrategy
from nsa_plugin.core.step_update import DraftRows, IndexerRows, SlotGroups, StepUpdate, TailRows

Strategy = Literal["graph", "share", "copy"]
"""`graph` is `share` with the work recorded in the engine's own CUDA graph."""


UNPROVED = "it has only run on CPU tensors; NSA_PLUGIN_STRATEGY=graph takes it, auto does not"
"""What `unproved` answers."""


@dataclass(frozen=True)
class PathPlan:
    """What an adapter would do for one of its paths, as far as that is known before a capture.

    Attributes
    ----------
    path : str
    strategy : str
        The strategy that would be tried first; "off" if the engine's own path stays.
    why : str
        The reason why no better strategy is tried; empty if none is better.
    gpus : frozenset of str, or None
        Where an engine chooses this by itself: the major compute capabilities of GPUs ("9" is Hopper); None is everywhere.
        Empty for what it chooses on other hardware, for other models, or when asked by name.
    """

    path: str
    strategy: str
    why: str
    gpus: frozenset[str] | None = None


class Host(Protocol):
    """What the package offers to an adapter."""

    @property
    def on(self) -> bool:
        """Whether the plugin is switched on. While it is off, the engine's own path does everything.

        The read costs one attribute. Any thread may change the value at any time. Read it once for each capture, replay or
        draft, and go by what was read.
        """

    @property
    def reasons(self) -> tuple[str, ...]:
        """Who switched the plugin off, and why; empty while it is on."""

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """Strategies to try, best first; empty while the plugin is off. Read it once for each capture, see `on`."""

    @property
    def configured(self) -> tuple[Strategy, ...]:
        """Strategies that the settings name, best first, whether the plugin is on or off.

        `install` goes by these: an engine that is switched off at the start may be switched on later.
        """

    @property
    def takes_unproved(self) -> bool:
        """Whether a strategy was asked for by name. `auto` leaves to the engine what has only run on CPU tensors."""

    @property
    def verify(self) -> int:
        """One replay in how many is compared with the engine's own path; 0 is none."""

    @property
    def verify_mode(self) -> str:
        """When that is done: "before" use, after the "graph" has run, or "auto"; see `verification.moment`."""

    @property
    def exact_step_lengths(self) -> bool:
        """Whether draft steps shall see the draft tokens before them, even where the engine's own path hides them."""

    def with_exact_lengths(self, steps: int) -> str:
        """What that gave a trained model that drafts so many steps, in words."""

    def path(self, engine: str, path: str, logger: logging.Logger) -> PathReport:
        """The reports of a path of an engine. They go to counters, metrics, observers and the engine's own `logger`."""

    def plan(
        self,
        batch: BatchDescriptor,
        geometry: Geometry,
        consumers: Consumers,
        strategy: PlanStrategy,
        derive: Callable[[], None] | None,
        enabled: torch.Tensor | None = None,
    ) -> Callable[[BatchDescriptor], None]:
        """Make a `ReplayPlan` with the implementations that plugins provide; returns its `run`.

        Parameters
        ----------
        batch : BatchDescriptor
            The captured batch.
        geometry : Geometry
        consumers : sequence of StepMetadata
            The buffers that captured kernels read, one for each draft step or the one of another pass.
        strategy : "share" or "copy"
        derive : callable or None
            Refreshes planes that the engine's own functions compute, after the others are written.
        enabled : int32 tensor [1] on the batch's device, optional
            While it is 0, the work leaves every buffer as it is.

        Raises
        ------
        UnavailableError
            `enabled` is given and a plugin's implementation does not take it.
        """

    def step_update(
        self,
        rows: DraftRows,
        slots: SlotGroups,
        request_maps: Sequence[torch.Tensor],
        indexers: Sequence[IndexerRows],
        tails: Sequence[TailRows] = (),
    ) -> StepUpdate:
        """Make a `StepUpdate` with the implementation that a plugin provides, else the built-in one; raises as that."""

    def draft_steps(self, steps: Sequence[DraftStep], limits: DraftLimits) -> FillDraftSteps:
        """As `bind_draft_steps`, with the implementation that a plugin provides, else the built-in one."""


def unproved(proved: bool, host: Host) -> str:
    """Empty, or why a host leaves to the engine what no GPU has run yet. `proved`: whether one has; each row says so itself."""
    return "" if proved or host.takes_unproved else UNPROVED


class Adapter(Protocol):
    """What brings the plugin to one engine.

    Attributes
    ----------
    name : str
        The name of the engine.
    features : frozenset of str
        Fields of `Settings` that the adapter can honour beyond the strategy: "verify", "step_lengths".
    """

    name: str
    features: frozenset[str]

    def probe(self) -> list[str]:
        """What the installed engine lacks, a line each; empty if it fits.

        The probe looks at capabilities, never at the version alone. Each line says what was looked for, what was found and
        what to do. The probe imports the engine and changes nothing.
        """

    def untested(self) -> list[str]:
        """Hooked functions with parameters that no tested release has, a line each; to be asked before `install`."""

    def install(self, host: Host) -> list[str]:
        """Patch the engine, completely or not at all; returns the problems because of which it was left alone.

        A second call does nothing.
        """

    def ledger(self) -> Sequence[LedgerRow]:
        """Every attribute that `install` replaces in the installed engine, a row each."""

    def undo(self) -> None:
        """Put back every attribute that `install` or a later capture replaced, by identity."""

    def summary(self) -> str:
        """One line for the log: what is accelerated, and what is left to the engine."""

    def switch(self, on: bool) -> list[str]:
        """What goes on as before although the host was switched, a line each with the reason.

        That is work in CUDA graphs that can't be switched there, and what was captured while the plugin was off. The host
        calls this after the change, from any thread, one call at a time. Code acts on the change by reading `Host.on`.
        """

    def paths(self, host: Host) -> list[PathPlan]:
        """What would be done for each path with the host's settings. The question captures nothing and needs no GPU."""
