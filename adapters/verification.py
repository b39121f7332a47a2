"""Verification: what was prepared is compared with the engine's own values. Runs only where the settings ask for it.

An adapter has the engine's own code write into spare buffers, in objects that are shadows of the engine's, and hands both
sides to `Verification.settle`. On a difference the engine's values take the place of ours before anything reads them; what
a CUDA graph has computed is compared after its replay, and the engine's own path is used from the next batch on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from nsa_plugin.adapters.reporting import PathReport, differing
from nsa_plugin.core.batch import BatchDescriptor, BlockTable, Geometry, TokenTable
from nsa_plugin.core.draft_steps import DraftLimits

StepValues = tuple[int, Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]
"""Index of a draft step, the engine's defined values by field name, and ours."""
Described = tuple[BatchDescriptor, Geometry, DraftLimits | None]
"""The live batch, as `Mismatch` has it."""
Moment = Literal["before", "graph"]
"""When a replay is compared: before anything reads the values, or after the graph that computes them has run."""


def moment(mode: str, *can: Moment) -> Moment | None:
    """When a path is verified that can do `can`, the best first: as the setting `mode` says; None if it can't do that."""
    return next((one for one in can if mode in ("auto", one)), None)


def refusal(mode: str) -> str:
    """Why a path is not verified as `mode` asks."""
    return f"NSA_PLUGIN_VERIFY_MODE={mode} can't be had here"


class Verification:
    """Every n-th replay of one thing that is captured: the first, then one in `every`.

    Parameters
    ----------
    report : PathReport
    strategy : str
        How the replays are prepared.
    every : int
        At least 1.
    """

    def __init__(self, report: PathReport, strategy: str, every: int) -> None:
        self._report, self._strategy, self._every = report, strategy, every
        self._left = 1

    def is_due(self) -> bool:
        """Whether the replay that begins is verified; it counts as one."""
        self._left -= 1
        if self._left:
            return False
        self._left = self._every
        self._report.verified(self._strategy)
        return True

    def after(self, call: Callable[[Any], None], check: Callable[[Any], None]) -> Callable[[Any], None]:
        """`call`, which prepares a replay, with `check` of what it wrote when that is due."""

        def verified(batch: Any) -> None:
            call(batch)
            if self.is_due():
                check(batch)

        return verified

    def settle(
        self, steps: Iterable[StepValues], repair: Callable[[], None] | None, describe: Callable[[], Described]
    ) -> bool:
        """Whether all steps have the engine's own values; if not, `repair` puts these there, then the mismatch is reported.

        Parameters
        ----------
        steps : iterable of StepValues
            Copies of both sides. Steps that are equal may be left out.
        repair : callable, or None
            None where the batch has been computed with ours already.
        describe : callable
            The live batch; called only where something differs.
        """
        values = tuple((step, expected, got) for step, expected, got in steps if differing(expected, got))
        if not values:
            return True
        if repair is not None:
            repair()
        batch, geometry, limits = describe()
        self._report.mismatched(self._strategy, batch, geometry, values, limits, used=repair is None)
        return False


class Afterwards:
    """A comparison that waits for a graph to run: what begins next on the same stream makes it.

    Parameters
    ----------
    spares : SpareBuffers
        Where the engine's own values wait. Nothing else may write there meanwhile.
    """

    def __init__(self, spares: SpareBuffers) -> None:
        self.spares = spares
        self._check: Callable[[], None] | None = None

    def wait(self, check: Callable[[], None]) -> None:
        """Keep `check`, which handles its own errors."""
        self._check = check

    def settle(self) -> None:
        """Make the comparison that waits, if one does. The graph has been launched."""
        if self._check is not None:
            check, self._check = self._check, None
            check()


def snapshot(batch: BatchDescriptor, geometry: Geometry) -> BatchDescriptor:
    """`batch` with copies of what the next batch overwrites: lengths, and the pages of its own rows of the table in use."""
    size = batch.batch_size
    lengths = batch.seq_lens[:size].clone()
    unit = geometry.page_size
    if isinstance(batch.slots, BlockTable):
        unit = max(unit, batch.slots.block_size)
    longest = int(lengths.max()) + batch.added_tokens + max(batch.offsets)
    width = min(-(-longest // unit) * unit, geometry.table_width)
    slots: TokenTable | BlockTable
    if isinstance(batch.slots, TokenTable):
        rows = batch.slots.req_pool_indices[:size]
        slots = TokenTable(batch.slots.req_to_token[rows, :width], torch.arange(size, device=rows.device))
    else:
        block_size = batch.slots.block_size
        slots = BlockTable(batch.slots.block_table[:size, : -(-width // block_size)].clone(), block_size)
    return replace(
        batch,
        seq_lens=lengths,
        slots=slots,
        extend_lens=_copied(batch.extend_lens),
        accepted=_copied(batch.accepted),
        query_start_loc=_copied(batch.query_start_loc),
    )


def _copied(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else value.clone()


class SpareBuffers:
    """Buffers for the engine's own code to write into beside those that captured graphs read.

    Attributes
    ----------
    size : int
        Bytes allocated so far.
    """

    def __init__(self) -> None:
        self.size = 0
        self._shared: dict[str, torch.Tensor] = {}

    def own(self, value: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of `value`, to be written in inference mode and outside of it."""
        self.size += value.numel() * value.element_size()
        with torch.inference_mode(False):
            return torch.zeros_like(value, memory_format=torch.contiguous_format).copy_(value)

    def shared(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Rows like those of `value` [rows, columns] in one buffer of that name, which grows if it has too few."""
        rows, columns = value.shape
        buffer = self._shared.get(name)
        if buffer is None or buffer.shape[0] < rows or buffer.shape[1] != columns:
            buffer = self._shared[name] = self.own(value)
        return buffer[:rows]


def shadow(original: Any, **changes: Any) -> Any:
    """An object of the same class with the attributes of `original`, but for `changes`.

    A method of the engine's, called on it, does what it always does and writes into `changes`.
    """
    made: Any = object.__new__(type(original))
    vars(made).update(vars(original), **changes)
    return made
