"""Contenders over the real vLLM: Model Runner V2's speculator as shipped, and with this plugin.

A preparation is everything that the host does, and everything that the GPU runs, for the K - 1 draft steps of a batch.
Besides metadata that is a stand-in for the model, its sampling, and the advance of the inputs; they are the same for every
contender.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from nsa_plugin.adapters.vllm.describe import DraftBatch, describe_draft, geometry
from nsa_plugin.bench.cell import PAGE_SIZE, Cell, Contender
from nsa_plugin.core import api
from nsa_plugin.core.batch import BatchDescriptor, TokenTable, multiprocessors
from nsa_plugin.core.metadata import PrecomputedMetadata, differing_fields
from nsa_plugin.rigs.vllm.v2_draft import Sizes
from nsa_plugin.rigs.vllm.v2_replay import STOCK, Batch, Comparison, ReplayedDraft, Step, ways

LAYOUT = "fp8 separate"
NO_METADATA = "no metadata"
"""A contender whose graph leaves the metadata as it was captured: the time of everything else. Its values are not compared."""
MAX_TOKENS = 2048
"""Tokens of the target's largest batch. No draft step has as many."""


class Vllm:
    """The contenders of one cell; its batch size is the captured one, its width the model's maximal length.

    Raises
    ------
    UnavailableError
        vLLM cannot be patched.
    """

    def __init__(self, cell: Cell, device: torch.device) -> None:
        self._batches = [_batch(batch) for batch in cell.batches(device)]
        requests, blocks = self._batches[0].table.shape
        sizes = Sizes(device, cell.batch_size, blocks * PAGE_SIZE, requests, max(MAX_TOKENS, requests))
        self.bytes = bytes_to_move(cell, device)
        self._stack = contextlib.ExitStack()
        self._drafts = self._stack.enter_context(ways(LAYOUT, cell.steps, sizes))
        self._drafts[NO_METADATA] = ReplayedDraft(LAYOUT, cell.steps, sizes)
        self._drafts[NO_METADATA].without_metadata()
        self._rebuilt: list[Sequence[Step]] = []
        first = self._batches[0]
        self.contenders = [
            Contender.of_calls(name, [partial(draft.run, first)], ()) for name, draft in self._drafts.items()
        ]

    def check(self, contender: Contender) -> list[str] | None:
        """Fields that differ from vLLM's rebuild; of the rebuild itself, from the reference; None for `NO_METADATA`.

        Afterwards the contender is captured for timing, and its buffers hold the first input.
        """
        draft, wrong = self._drafts[contender.name], None
        if contender.name != NO_METADATA:
            draft.capture(record=True)
            if contender.name == STOCK:
                self._rebuilt = [draft.steps(batch) for batch in self._batches]
                wrong = self._against_reference(draft)
            else:
                comparison = Comparison()
                for want, batch in zip(self._rebuilt, self._batches, strict=True):
                    comparison.add(want, draft.steps(batch))
                wrong = sorted(comparison.different)
        draft.capture(record=False)
        draft.prepare(self._batches[0])
        return wrong

    def close(self) -> None:
        """Leave vLLM as it was found."""
        self._stack.close()

    def _against_reference(self, draft: ReplayedDraft) -> list[str]:
        """Fields of vLLM's rebuild that differ from the reference, which computes all steps at once."""
        builder = next(builder for builder in draft.builders if hasattr(builder, "topk_tokens"))
        wrong: set[str] = set()
        for batch, steps in zip(self._batches, self._rebuilt, strict=True):
            draft.prepare(batch)
            described = describe_draft(
                DraftBatch(draft.speculator.input_buffers, draft.tables, len(batch.lengths), len(steps))
            )
            sizes = geometry(builder, described)
            expected = PrecomputedMetadata.allocate(described, sizes, tokens=True)
            api.precompute(described, sizes, out=expected, impl="reference")
            for index, seen in enumerate(steps):
                step = replace(
                    expected.step(index), cache_seqlens=seen["lengths"], positions=seen["positions"],
                    slot_mapping=seen["slots"], real_page_table=seen["blocks"],
                )  # fmt: skip
                wrong |= set(differing_fields(expected, step, index))
        return sorted(wrong)


def bytes_to_move(cell: Cell, device: torch.device) -> float:
    """Bytes that the metadata of the K - 1 steps must read and write at least.

    Per step and request: position (8), length (4) and one entry of the block table (4) are read; slot (8), request (4)
    and the indexer's length (4) are written. Per step: DeepGEMM's schedule, two int32 per SM and two more.
    """
    return (cell.steps - 1) * (32 * cell.batch_size + 8 * (multiprocessors(device) + 1))


def _batch(batch: BatchDescriptor) -> Batch:
    """A batch of the other engines as vLLM has it: a table of blocks in place of a table of token slots."""
    assert isinstance(batch.slots, TokenTable)
    table = batch.slots.req_to_token
    blocks = table[:, : table.shape[1] // PAGE_SIZE * PAGE_SIZE : PAGE_SIZE] // PAGE_SIZE
    return Batch(batch.seq_lens.cpu().to(torch.int32), batch.slots.req_pool_indices, blocks.contiguous())
