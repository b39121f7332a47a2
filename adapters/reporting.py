"""What a path of an engine reports, and to whom: one object per path, which counts, logs and hands back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, Protocol, TypeVar

import torch

from nsa_plugin.core.batch import BatchDescriptor, Geometry
from nsa_plugin.core.draft_steps import DraftLimits
from nsa_plugin.core.metadata import equal_in_pieces

P = ParamSpec("P")
T = TypeVar("T")
Stage = Literal["capture", "replay"]
"""When something is handed back to the engine."""
Values = tuple[tuple[int, Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]], ...]
"""For each draft step that differs its index, the engine's defined values by field name, and ours."""


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
    used : bool
        Whether the batch was computed with ours: what a CUDA graph does can't be repaired before it is used.
    """

    engine: str
    path: str
    strategy: str
    batch: BatchDescriptor
    geometry: Geometry
    values: Values
    limits: DraftLimits | None = None
    used: bool = False

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


class Sink(Protocol):
    """Where the reports of all paths go: the host's counters, metrics, log lines and observers."""

    def describe(
        self, engine: str, batch: object, default: Callable[[object], BatchDescriptor]
    ) -> Callable[[object], BatchDescriptor]: ...

    def observer(
        self, engine: str, path: str, strategy: str, batch: BatchDescriptor
    ) -> Callable[[BatchDescriptor], None] | None: ...

    def instrument(
        self, call: Callable[[Any], None], engine: str, path: str, strategy: str, steps: int
    ) -> Callable[[Any], None]: ...

    def durations(self, engine: str, path: str, strategy: str, steps: int) -> Callable[[float], None] | None: ...

    def ranged(self, call: Callable[P, T], engine: str, path: str, strategy: str) -> Callable[P, T]: ...

    def buffers(self, engine: str, path: str, strategy: str, size: int) -> None: ...

    def verified(self, engine: str, path: str, strategy: str) -> None: ...

    def mismatched(self, logger: logging.Logger, mismatch: Mismatch) -> None: ...

    def fell_back(self, logger: logging.Logger, fallback: Fallback) -> None: ...

    def using(self, logger: logging.Logger, engine: str, path: str, strategy: str) -> None: ...


@dataclass(frozen=True)
class PathReport:
    """The reports of one path. `Host.path` makes it.

    Attributes
    ----------
    sink : Sink
    engine, path : str
        Whose, and which of the adapter's paths ("draft decode", "target verify", …).
    logger : Logger
        The engine's own.
    """

    sink: Sink
    engine: str
    path: str
    logger: logging.Logger

    def describe(
        self, batch: object, default: Callable[[object], BatchDescriptor]
    ) -> Callable[[object], BatchDescriptor]:
        """The describe function for batches like `batch`: a plugin's, else `default`."""
        return self.sink.describe(self.engine, batch, default)

    def observer(self, strategy: str, batch: BatchDescriptor) -> Callable[[BatchDescriptor], None] | None:
        """What to call after each replay; None if nobody watches. It never raises."""
        return self.sink.observer(self.engine, self.path, strategy, batch)

    def instrument(self, call: Callable[[Any], None], strategy: str, steps: int) -> Callable[[Any], None]:
        """`call`, which prepares one replay, counted and timed; `call` itself if the settings ask for neither.

        To be used when it is bound. `steps` is the number of draft steps that it serves, `strategy` "off" for the engine's
        own code.
        """
        return self.sink.instrument(call, self.engine, self.path, strategy, steps)

    def durations(self, strategy: str, steps: int) -> Callable[[float], None] | None:
        """Where the seconds of a replay go that several calls prepare; None if the settings ask for none."""
        return self.sink.durations(self.engine, self.path, strategy, steps)

    def ranged(self, call: Callable[P, T], strategy: str) -> Callable[P, T]:
        """`call`, one of several that prepare a replay, in an NVTX range; `call` itself if the settings ask for none."""
        return self.sink.ranged(call, self.engine, self.path, strategy)

    def buffers(self, strategy: str, size: int) -> None:
        """Count `size` more bytes of buffers that hold the metadata of captured batch sizes; fewer if it is negative."""
        self.sink.buffers(self.engine, self.path, strategy, size)

    def verified(self, strategy: str) -> None:
        """Count a verification, whatever it finds; to be called before `mismatched`."""
        self.sink.verified(self.engine, self.path, strategy)

    def mismatched(
        self,
        strategy: str,
        batch: BatchDescriptor,
        geometry: Geometry,
        values: Values,
        limits: DraftLimits | None = None,
        *,
        used: bool = False,
    ) -> None:
        """Count a mismatch, log it once, write a repro file, switch this process to the engine's own path.

        The parameters are the attributes of `Mismatch`.
        """
        mismatch = Mismatch(self.engine, self.path, strategy, batch, geometry, values, limits, used)
        self.sink.mismatched(self.logger, mismatch)

    def fell_back(self, stage: Stage, strategy: str, error: Exception) -> None:
        """Count that something was handed back to the engine's own path, log its cause once, tell observers."""
        self.sink.fell_back(self.logger, Fallback(self.engine, self.path, stage, strategy, error))

    def using(self, strategy: str) -> None:
        """Log once that the path is served, and how."""
        self.sink.using(self.logger, self.engine, self.path, strategy)

    def left_alone(self, reason: str) -> None:
        """Log once that the engine's own path stays, and why."""
        self.using(f"off ({reason})")
