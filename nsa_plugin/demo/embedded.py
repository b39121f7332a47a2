"""A draft without an engine: N consumers, prepared step by step as engines once did, or by this package."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from nsa_plugin.bench.measure import synchronize
from nsa_plugin.core.batch import BatchDescriptor, ForwardMode, Geometry, TokenTable, multiprocessors
from nsa_plugin.core.metadata import PrecomputedMetadata, StepMetadata, differing_fields
from nsa_plugin.core.plan import PlanStrategy, ReplayPlan
from nsa_plugin.trace import Round, Sizes

OPERATIONS = ("cumsum", "top-k lengths", "page lookup", "table transform", "concatenation")
"""The operations of the original preparation, in the order of the table that the demo prints."""


def describe(entry: Round, table: torch.Tensor, num_steps: int) -> BatchDescriptor:
    """A round as a `BatchDescriptor`."""
    lengths = torch.tensor(entry.seq_lens, device=table.device)
    requests = torch.tensor(entry.requests, device=table.device)
    return BatchDescriptor(ForwardMode.DECODE, len(entry.seq_lens), lengths, TokenTable(table, requests), num_steps)


class Original:
    """Computes everything again for every draft step, as engines did before any precompute."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self.seconds: dict[str, list[float]] = defaultdict(list)
        """Time of each call, by operation."""

    def prepare(self, batch: BatchDescriptor, step: StepMetadata, measured: bool) -> None:
        """Prepare one draft step."""
        geometry, size = self._geometry, batch.batch_size
        timed = self._timed if measured else _untimed
        assert isinstance(batch.slots, TokenTable) and step.page_table_1 is not None
        table, requests = batch.slots.req_to_token, batch.slots.req_pool_indices
        lengths = batch.seq_lens.to(torch.int32)
        zero = lengths.new_zeros(1)
        width = min(int(lengths.max()), geometry.table_width)
        step.cache_seqlens[:size] = lengths
        sums = timed("cumsum", lambda: torch.cumsum(lengths, 0, dtype=torch.int32))
        step.cu_seqlens_k[: size + 1] = timed("concatenation", lambda: torch.cat([zero, sums]))
        clipped = timed("top-k lengths", lambda: lengths.clamp(max=geometry.index_topk))
        step.nsa_cache_seqlens[:size] = clipped
        clipped_sums = timed("cumsum", lambda: torch.cumsum(clipped, 0, dtype=torch.int32))
        step.nsa_cu_seqlens_k[: size + 1] = timed("concatenation", lambda: torch.cat([zero, clipped_sums]))
        slots = timed("page lookup", lambda: table[requests, :width])
        step.page_table_1[:size, :width] = slots
        pages = timed("table transform", lambda: slots[:, :: geometry.page_size] // geometry.page_size)
        step.real_page_table[:size, : pages.shape[1]] = pages

    def _timed(self, operation: str, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        synchronize()
        start = time.perf_counter()
        result = call()
        synchronize()
        self.seconds[operation].append(time.perf_counter() - start)
        return result


def _untimed(operation: str, call: Callable[[], torch.Tensor]) -> torch.Tensor:
    return call()


class Counter(TorchFunctionMode):
    """Counts the torch operations within it that compute or move something: no views, no attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_function__(self, call: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Called by torch for each operation."""
        result, name = call(*args, **(kwargs or {})), getattr(call, "__name__", "")
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or "out" in (kwargs or {})
        new = isinstance(result, torch.Tensor) and not result._is_view() and result is not args[0]
        self.operations += in_place or new
        return result


class Harness:
    """Three contenders over one trace. Each has its own buffers for each captured batch size.

    Attributes
    ----------
    seconds : contender to list of seconds, one per round
    operations : contender to torch operations of one round; 0 if a kernel of this package does it all
    """

    contenders: tuple[str, ...] = ("original, every step", "precompute + copy", "share")

    def __init__(self, sizes: Sizes, index_topk: int, num_steps: int, table: torch.Tensor) -> None:
        self._geometry = Geometry(index_topk, sizes.page_size, sizes.width, num_sms=multiprocessors(table.device))
        self._num_consumers = num_steps - 1
        self._table = table
        self.original = Original(self._geometry)
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.operations: dict[str, int] = {}
        self._buffers: dict[tuple[str, int], list[StepMetadata]] = {}
        self._plans: dict[tuple[str, int], ReplayPlan] = {}
        strategies: tuple[PlanStrategy, ...] = ("copy", "share")
        for size in sizes.captured:
            batch = describe(Round((1,) * size, (0,) * size, 0), table, self._num_consumers)
            for name in self.contenders:
                made = [
                    PrecomputedMetadata.allocate(batch, self._geometry).steps[0] for _ in range(self._num_consumers)
                ]
                if name == "share":
                    made = made[:1] * len(made)
                self._buffers[name, size] = made
            for name, strategy in zip(self.contenders[1:], strategies, strict=True):
                self._plans[name, size] = ReplayPlan(
                    batch, self._geometry, self._buffers[name, size], strategy=strategy
                )

    def run(self, entry: Round) -> list[str]:
        """Prepare a round with every contender; returns the values that differ from those of the first."""
        batch = describe(entry, self._table, self._num_consumers)
        size = batch.batch_size
        first, *others = self.contenders
        self._prepare_every_step(batch, measured=True)
        self._time(first, lambda: self._prepare_every_step(batch, measured=False))
        for name in others:
            plan = self._plans[name, size]
            self._time(name, lambda plan=plan: plan.run(batch))  # type: ignore[misc]
        if not self.operations:
            self._count(first, lambda: self._prepare_every_step(batch, measured=False))
            for name in others:
                self._count(name, lambda name=name: self._plans[name, size].run(batch))  # type: ignore[misc]
        return [
            f"{name}, draft step {index}: {field}"
            for name in others
            for index, step in enumerate(self._buffers[name, size])
            for field in differing_fields(
                PrecomputedMetadata((self._buffers[first, size][index],), batch, self._geometry), step
            )
        ]

    def close(self) -> None:
        """Nothing has to be undone."""

    def _prepare_every_step(self, batch: BatchDescriptor, measured: bool) -> None:
        for step in self._buffers[self.contenders[0], batch.batch_size]:
            self.original.prepare(batch, step, measured)

    def _time(self, name: str, call: Callable[[], object]) -> None:
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        self.seconds[name].append(time.perf_counter() - start)

    def _count(self, name: str, call: Callable[[], object]) -> None:
        with Counter() as counter:
            call()
        self.operations[name] = counter.operations
