"""One cell of the benchmark: a mode, a batch size, a context length and a number of steps, with fresh random inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from nsa_plugin.bench.measure import Call
from nsa_plugin.core.batch import BatchDescriptor, ForwardMode, Geometry, TokenTable, multiprocessors
from nsa_plugin.core.errors import reject
from nsa_plugin.core.metadata import StepMetadata
from nsa_plugin.trace import Round, SlotTable, sizes_of

INDEX_TOPK = 2048
PAGE_SIZE = 64
MAX_STEPS = 64
"""Columns of the table that every length leaves free for draft tokens, whatever the number of steps."""
INPUTS = 4
"""Number of inputs of a cell. They take turns, so that caches do not hold the next one."""

SPARE_ROWS = 8
"""Rows of the token table beyond the batch, so that requests are not simply all rows."""


@dataclass(frozen=True)
class Recorded:
    """Inputs from a recorded trace. Input i has `lengths[i]`, and the rows from `i * bs` on of `table` [inputs * bs, tokens]."""

    table: torch.Tensor
    lengths: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Cell:
    """What to prepare.

    Attributes
    ----------
    mode : ForwardMode
    batch_size, context : sequences of context / 2 to context tokens
    steps : speculative steps; DECODE has steps - 1 consumers, the other modes steps rows per request
    width : token positions per row of the token table
    seed : of the inputs; cells of the same batch size and context get the same
    recorded : inputs from a trace, in place of random ones
    index_kpool : tokens that share an index key
    page_size : tokens per page of the cache
    """

    mode: ForwardMode
    batch_size: int
    context: int
    steps: int
    width: int
    seed: int
    recorded: Recorded | None = None
    index_kpool: int = 1
    page_size: int = PAGE_SIZE

    def __post_init__(self) -> None:
        if self.width <= MAX_STEPS:
            reject("--width", f"more than {MAX_STEPS} columns, which draft tokens may take", self.width)
        if self.context > self.width - MAX_STEPS:
            reject(
                "--ctx" if self.recorded is None else "--trace",
                f"sequences of at most {self.width - MAX_STEPS} tokens (--width {self.width} less {MAX_STEPS} for drafts)",
                self.context, fix=f"take --width {self.context + MAX_STEPS} or more",
            )  # fmt: skip

    @property
    def consumers(self) -> int:
        """Sets of buffers to fill."""
        return self.steps - 1 if self.mode is ForwardMode.DECODE else 1

    @property
    def draft_tokens(self) -> int:
        """Rows per request outside DECODE."""
        return 1 if self.mode is ForwardMode.DECODE else self.steps

    def geometry(self, device: torch.device) -> Geometry:
        """Model and cache constants of DeepSeek V3.2; with pooled index keys those of GLM-5 Next."""
        return Geometry(
            INDEX_TOPK, self.page_size, self.width, num_sms=multiprocessors(device), index_kpool=self.index_kpool
        )

    def batches(self, device: torch.device) -> list[BatchDescriptor]:
        """Batches over one token table: the recorded ones, or `INPUTS` with random lengths, requests and pages."""
        if self.recorded is not None:
            source = self.recorded.table
            table = torch.zeros(len(source), self.width, dtype=torch.int32)
            table[:, : source.shape[1]] = source[:, : self.width]
            table = table.to(device)
            chosen = [
                (torch.tensor(lengths), torch.arange(self.batch_size) + index * self.batch_size)
                for index, lengths in enumerate(self.recorded.lengths)
            ]
        else:
            page = self.page_size * self.index_kpool
            shape = (self.batch_size + SPARE_ROWS, -(-self.width // page), 1)
            first = torch.randint(0, (1 << 30) // page, shape, dtype=torch.int32, device=device) * page
            within = torch.arange(page, dtype=torch.int32, device=device)
            table = (first + within).flatten(1)[:, : self.width].contiguous()
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.batch_size * 7919 + self.context)
            chosen = [
                (
                    torch.randint(
                        max(self.context // 2, 1), self.context + 1, (self.batch_size,), generator=generator
                    ).clamp_(min=self.draft_tokens if self.index_kpool > 1 else 1),
                    torch.randperm(table.shape[0], generator=generator)[: self.batch_size],
                )
                for _ in range(INPUTS)
            ]
        return [
            BatchDescriptor(
                self.mode, self.batch_size, lengths.to(device), TokenTable(table, requests.to(device)),
                self.consumers, (), self.draft_tokens, accepted=self._accepted(lengths, device),
            )
            for lengths, requests in chosen
        ]  # fmt: skip

    def _accepted(self, lengths: torch.Tensor, device: torch.device) -> torch.Tensor | None:
        """Of each request's rows in a draft extend the number that were accepted, which pooled index keys go by."""
        if self.index_kpool == 1 or self.mode is not ForwardMode.DRAFT_EXTEND:
            return None
        return (1 + lengths % self.draft_tokens).to(device, torch.int32)

    def bytes_to_move(self, batches: Sequence[BatchDescriptor]) -> float:
        """Bytes that one preparation must read and write at least, whatever the number of consumers.

        Each live slot is read once and written once per row of its request, each live page number written once, that of
        pooled index keys too.
        """
        tokens = sum(int(batch.seq_lens.sum()) + self.batch_size * batch.added_tokens for batch in batches) / len(
            batches
        )
        rows = batches[0].rows_per_request
        pooled = 0 if self.index_kpool == 1 else 1 / self.index_kpool
        return 4 * tokens * (1 + rows * (1 + (1 + pooled) / self.page_size))


def recorded_cells(mode: ForwardMode, rounds: Sequence[Round], steps: Sequence[int], width: int) -> list[Cell]:
    """A cell for each captured batch size of a trace and each number of steps. Its inputs are spread over the trace."""
    sizes = sizes_of(rounds, MAX_STEPS)
    chosen: dict[int, list[int]] = {}
    for size in sizes.captured:
        numbers = [number for number, entry in enumerate(rounds) if len(entry.seq_lens) == size and entry.live]
        if numbers:
            chosen[size] = [numbers[index * len(numbers) // INPUTS] for index in range(INPUTS)]
    slots = SlotTable(sizes, torch.device("cpu"))
    rows: dict[int, torch.Tensor] = {}
    wanted = {number for numbers in chosen.values() for number in numbers}
    for number, entry in enumerate(rounds):
        slots.advance(entry)
        if number in wanted:
            rows[number] = slots.table[list(entry.requests)]
    cells = []
    for size, numbers in chosen.items():
        lengths = tuple(rounds[number].seq_lens for number in numbers)
        recorded = Recorded(torch.cat([rows[number] for number in numbers]), lengths)
        cells += [Cell(mode, size, max(map(max, lengths)), count, width, 0, recorded) for count in steps]
    return cells


@dataclass(frozen=True)
class Contender:
    """A way to prepare a cell.

    Attributes
    ----------
    name : str
    host : calls whose host time is measured, one per input; None if the host has nothing to do
    gpu : calls whose kernels are measured
    run : prepares input i completely
    consumers : the buffers that it fills, if the reference knows them
    """

    name: str
    host: Sequence[Call] | None
    gpu: Sequence[Call]
    run: Callable[[int], object]
    consumers: Sequence[StepMetadata]

    @classmethod
    def of_calls(cls, name: str, calls: Sequence[Call], consumers: Sequence[StepMetadata]) -> Contender:
        """A contender whose calls are both its host work and its GPU work."""
        return cls(name, calls, calls, lambda index: calls[index](), consumers)

    @classmethod
    def of_graph(
        cls,
        name: str,
        graph: torch.cuda.CUDAGraph,
        load: Callable[[int], object],
        before: Sequence[Call] | None,
        consumers: Sequence[StepMetadata],
        keep: object,
    ) -> Contender:
        """A contender whose work is recorded in a graph.

        `load` writes input i to where the graph reads. `before` is what the host still has to call before a replay, one call
        for each input or one for all; its kernels count with the graph's. `keep` holds what the graph's kernels read, for as
        long as the contender lives.
        """

        def run(index: int, keep: object = keep) -> None:
            load(index)
            replay(None if before is None else before[index % len(before)])

        def replay(prepare: Call | None) -> None:
            if prepare is not None:
                prepare()
            graph.replay()

        return cls(name, before, [partial(replay, call) for call in before or (None,)], run, consumers)


def capture(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Record `work` in a CUDA graph. It must have run before, so that its kernels are compiled."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph
