"""What an adapter is, and what it may ask of the package that installs it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from nsa_plugin.core.batch import BatchDescriptor, Geometry
from nsa_plugin.core.metadata import StepMetadata
from nsa_plugin.core.plan import PlanStrategy

Strategy = Literal["graph", "share", "copy"]
"""`graph` is `share` with the work recorded in the engine's own CUDA graph."""


@dataclass(frozen=True)
class Fallback:
    """Something was handed back to the engine's own path.

    Attributes
    ----------
    engine, path : str
        Whose, and which of the adapter's paths ("draft decode", "target verify", …).
    stage : str
        "capture" or "replay".
    strategy : str
        What failed.
    error : Exception
    """

    engine: str
    path: str
    stage: str
    strategy: str
    error: Exception


class Host(Protocol):
    """The side of the package that an adapter talks to."""

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """Strategies to try, best first; empty when switched off."""

    def describe(
        self, engine: str, batch: object, default: Callable[[object], BatchDescriptor]
    ) -> Callable[[object], BatchDescriptor]:
        """The describe function for batches like `batch`: a plugin's, else `default`."""

    def plan(
        self,
        batch: BatchDescriptor,
        geometry: Geometry,
        consumers: Sequence[StepMetadata],
        strategy: PlanStrategy,
        derive: Callable[[], None] | None,
    ) -> Callable[[BatchDescriptor], None]:
        """Make a `ReplayPlan` with whatever implementations plugins provide; returns its `run`."""

    def observer(
        self, engine: str, path: str, strategy: str, batch: BatchDescriptor
    ) -> Callable[[BatchDescriptor], None] | None:
        """What to call after each replay; None if nobody watches. It never raises."""

    def fell_back(self, logger: logging.Logger, fallback: Fallback) -> None:
        """Count a fall-back, log its cause once, tell observers."""

    def using(self, logger: logging.Logger, engine: str, path: str, strategy: str) -> None:
        """Log once that a path of an engine is served, and how."""


class Adapter(Protocol):
    """One engine. See the contract in each method; `name` is the engine's."""

    name: str

    def probe(self) -> list[str]:
        """What is missing in the installed engine: empty if it fits.

        Looks at capabilities, never at the version alone; each problem says what was looked for, what was found and
        what to do. Imports the engine, changes nothing.
        """

    def install(self, host: Host) -> list[str]:
        """Patch the engine, completely or not at all; returns the problems that kept it from doing so.

        Does nothing if it is installed already.
        """

    def undo(self) -> None:
        """Put back every attribute that `install` or a later capture replaced, by identity."""

    def summary(self) -> str:
        """What is accelerated and what is left alone, for one log line."""
