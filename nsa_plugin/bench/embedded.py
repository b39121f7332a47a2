"""Contenders that need no engine: the original loop, and this package's strategies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from nsa_plugin.bench.cell import Cell, Contender, capture
from nsa_plugin.core import api
from nsa_plugin.core.batch import BatchDescriptor, Geometry, TokenTable
from nsa_plugin.core.metadata import PrecomputedMetadata, StepMetadata, differing_fields
from nsa_plugin.core.plan import PlanStrategy, ReplayPlan
from nsa_plugin.rigs.sglang import original_loop


def buffers(batch: BatchDescriptor, geometry: Geometry) -> StepMetadata:
    """Fresh buffers of one consumer."""
    return PrecomputedMetadata.allocate(batch, geometry).steps[0]


class Embedded:
    """The contenders of one cell: the original loop (if its wheel is at hand), then copy, share and graph."""

    def __init__(self, cell: Cell, device: torch.device, wheel: Path | None) -> None:
        self._geometry, self._batches = cell.geometry(device), cell.batches(device)
        self.bytes = cell.bytes_to_move(self._batches)
        self.contenders = contenders(cell, self._batches, self._geometry, wheel)

    def check(self, contender: Contender) -> list[str]:
        """Fields that differ from the reference after any of the inputs."""
        return differing_from_reference(self._batches, self._geometry, contender)

    def close(self) -> None:
        """Nothing to undo."""


def differing_from_reference(
    batches: Sequence[BatchDescriptor],
    geometry: Geometry,
    contender: Contender,
    also: Callable[[int], Sequence[str]] = lambda index: (),
) -> list[str]:
    """Run every input; returns the fields that differ from the reference, and those that `also` names after an input."""
    wrong: set[str] = set()
    for index, batch in enumerate(batches):
        contender.run(index)
        expected = api.precompute(batch, geometry, impl="reference")
        for step in contender.consumers:
            wrong |= set(differing_fields(expected, step))
        wrong |= set(also(index))
    return sorted(wrong)


def contenders(
    cell: Cell, batches: Sequence[BatchDescriptor], geometry: Geometry, wheel: Path | None
) -> list[Contender]:
    """All contenders, over the same inputs."""
    first = batches[0]
    found = [] if wheel is None else [original_loop_contender(cell, batches, geometry, wheel)]
    strategies: tuple[PlanStrategy, ...] = ("copy", "share")
    for strategy in strategies:
        count = cell.consumers if strategy == "copy" else 1
        steps = [buffers(first, geometry) for _ in range(count)]
        plan = ReplayPlan(first, geometry, steps, strategy=strategy)
        calls = [lambda batch=batch, plan=plan: plan.run(batch) for batch in batches]
        found.append(Contender.of_calls(strategy, calls, steps))
    if first.seq_lens.device.type == "cuda":
        found.append(graph(batches, geometry))
    return found


def graph(batches: Sequence[BatchDescriptor], geometry: Geometry) -> Contender:
    """`share`, recorded in a CUDA graph: the host has nothing to do."""
    first = batches[0]
    assert isinstance(first.slots, TokenTable)
    static = replace(
        first,
        seq_lens=first.seq_lens.clone(),
        slots=TokenTable(first.slots.req_to_token, first.slots.req_pool_indices.clone()),
    )
    step = buffers(first, geometry)
    plan = ReplayPlan(static, geometry, [step], strategy="share")
    plan.run(static)

    def load(index: int) -> None:
        live = batches[index]
        assert isinstance(live.slots, TokenTable) and isinstance(static.slots, TokenTable)
        static.seq_lens.copy_(live.seq_lens)
        static.slots.req_pool_indices.copy_(live.slots.req_pool_indices)

    return Contender.of_graph("graph", capture(lambda: plan.run(static)), load, None, [step], plan)


def original_loop_contender(
    cell: Cell, batches: Sequence[BatchDescriptor], geometry: Geometry, wheel: Path
) -> Contender:
    """sglang 0.5.6.post2's method, once per consumer."""
    methods = original_loop.load_methods(wheel)
    first = batches[0]
    assert isinstance(first.slots, TokenTable)
    steps = [buffers(first, geometry) for _ in range(cell.consumers)]
    table = first.slots.req_to_token
    backends = [
        original_loop.OriginalBackend(methods, step, table, geometry.index_topk, geometry.page_size, cell.draft_tokens)
        for step in steps
    ]
    widths = torch.full((cell.batch_size,), cell.draft_tokens, device=first.seq_lens.device)
    lengths_on_host = [batch.seq_lens.cpu() for batch in batches]

    def prepare(index: int) -> None:
        batch = batches[index]
        assert isinstance(batch.slots, TokenTable)
        for backend in backends:
            backend.replay(cell.mode, batch.seq_lens, batch.slots.req_pool_indices, widths, lengths_on_host[index])

    calls = [lambda index=index: prepare(index) for index in range(len(batches))]
    return Contender.of_calls("original loop (sglang 0.5.6.post2)", calls, steps)
