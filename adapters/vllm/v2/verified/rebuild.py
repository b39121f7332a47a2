"""Runs only where drafts are verified: what vLLM's own unfused draft would build for each step, in spare buffers."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nsa_plugin.adapters.verification import SpareBuffers, shadow
from nsa_plugin.adapters.vllm.rebuilds import spare_group
from nsa_plugin.adapters.vllm.releases import GRAPHS, UPDATE_INPUTS


@dataclass(frozen=True)
class Draft:
    """The decode steps of a draft that is about to begin.

    Attributes
    ----------
    num_reqs : int
        Requests, without padding.
    descriptor : BatchExecutionDescriptor
        What vLLM dispatched it to.
    upper_bound : int32 tensor [>= num_reqs] on the CPU
        Of the lengths before the draft.
    steps : int
        K - 1: the first token was drafted by the prefill.
    dummy : bool
        Whether it takes part for the sake of other ranks only.
    """

    num_reqs: int
    descriptor: Any
    upper_bound: torch.Tensor
    steps: int
    dummy: bool = False

    @property
    def rows(self) -> int:
        """Requests with padding."""
        return self.descriptor.num_reqs or self.num_reqs


class Rebuild:
    """vLLM's own slot mapping, its builders, and its way from one step to the next, on spare buffers.

    Parameters
    ----------
    speculator : TargetDependentARSpeculator
    groups : sequence of AttentionGroup
        Those of the speculator that are to be built.
    """

    def __init__(self, speculator: Any, groups: Sequence[Any]) -> None:
        most, tables, device = speculator.max_num_reqs, speculator.block_tables, speculator.device
        self._source, spares = speculator.input_buffers, SpareBuffers()
        self._update_inputs = pkgutil.resolve_name(UPDATE_INPUTS)
        with torch.inference_mode(False):  # written in and outside of it
            moved_on = ("positions", "seq_lens", "input_ids")
            self._buffers = shadow(self._source, **{name: spares.own(getattr(self._source, name)) for name in moved_on})
            self._tables = shadow(tables, slot_mappings=spares.own(tables.slot_mappings))
            known = set(map(id, groups))
            spare = [
                [spare_group(group, most, spares) for group in own if id(group) in known]
                for own in speculator.attn_groups
            ]
            tokens = torch.zeros(most, dtype=torch.int64, device=device)
            self._step = torch.zeros((), dtype=torch.int64, device=device)
            self._ignored = torch.zeros(most, 1, device=device)  # instead of hidden states and drafted tokens
            self._drafted = torch.zeros(most, 1, dtype=torch.int64, device=device)
        self._tokens, self._sampled = tokens, tokens.clone()
        self._speculator = shadow(
            speculator,
            input_buffers=self._buffers,
            block_tables=self._tables,
            attn_groups=spare,
            **_no_graphs(speculator),
        )

    def steps(self, draft: Draft) -> Iterator[tuple[dict[str, Any], torch.Tensor, torch.Tensor]]:
        """Of each step: metadata by layer, slot mappings [KV-cache groups, capacity], lengths [rows]; gone at the next."""
        speculator, buffers, n = self._speculator, self._buffers, draft.num_reqs
        speculator.draft_max_seq_len = speculator.max_model_len
        for name in ("positions", "seq_lens"):
            getattr(buffers, name).copy_(getattr(self._source, name))
        mapping, starts = speculator.idx_mapping[:n], buffers.query_start_loc[: n + 1]
        for step in range(1, draft.steps + 1):
            if step > 1:
                self._advance(draft.rows)
            self._tables.compute_slot_mappings(mapping, starts, buffers.positions[:n], draft.descriptor.num_tokens)
            metadata = speculator._build_uniform_attn_metadata(
                num_reqs=n, batch_desc=draft.descriptor, num_query_per_req=1,
                seq_lens_cpu_upper_bound=draft.upper_bound, step=step,
            )  # fmt: skip
            yield metadata, self._tables.slot_mappings, buffers.seq_lens[: draft.rows]

    def _advance(self, rows: int) -> None:
        """As vLLM does after each step but the last, drafted tokens aside."""
        speculator = self._speculator
        self._update_inputs(
            self._tokens[:rows], self._step, self._ignored[:rows], self._drafted, self._ignored, self._buffers,
            self._sampled, rows, speculator.max_model_len, 2,
        )  # fmt: skip


def _no_graphs(speculator: Any) -> dict[str, None]:
    """None for each manager of graphs of a speculator. vLLM drops those of its profiling before it captures again.

    Graphs that something else keeps go later. When torch destroys a graph it frees cuBLAS' workspace of the stream that the
    graph was captured on, which graphs captured since may use.
    """
    kind = pkgutil.resolve_name(GRAPHS)
    return {name: None for name, value in vars(speculator).items() if isinstance(value, kind)}
