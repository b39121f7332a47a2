"""At start, at capture and at every replay: the two backend classes that are hooked, and which of their batches are served.

A draft's backends also share one page table, and a draft may have exact step lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from nsa_plugin.adapters.attached import Attached
from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.sglang.allocation import adopt, sharing
from nsa_plugin.adapters.sglang.glue import GlueGraphs
from nsa_plugin.adapters.sglang.hooked import HookedBackend
from nsa_plugin.adapters.sglang.pools import POOLED_TABLE, keys_per_index_key, pooled_table
from nsa_plugin.adapters.sglang.refusals import unsupported
from nsa_plugin.adapters.sglang.releases import (
    argument,
    drops_wide_table,
    has_shared_topk,
    lacking,
    reads_lengths_of,
    shares_topk,
)
from nsa_plugin.adapters.sglang.reports import logger, report

PAYS_FROM = 4
"""Number of steps from which on exact step lengths are worth a line in the log."""


class MultiStepDraft(HookedBackend):
    """`DeepseekSparseAttnMultiStepBackend`: all draft backends at once, always as DECODE."""

    def __init__(self, host: Host, glue: GlueGraphs) -> None:
        super().__init__(host, glue)
        from sglang.srt.model_executor.forward_batch_info import ForwardMode as NativeMode

        self._decode = NativeMode.DECODE
        self._shares_topk: Attached[bool] = Attached("shares_topk")
        self._has_told = False

    def backends(self, owner: Any) -> Sequence[Any]:
        """The draft backends."""
        backends: Sequence[Any] = owner.attn_backends
        return backends

    def native_mode(self, owner: Any, batch: Any) -> Any:
        """DECODE, if there is a draft backend at all."""
        return self._decode if owner.attn_backends else None

    def wide_table_is_unread(self, backend: Any) -> bool:
        """Whether sglang's own `init_cuda_graph_state` leaves it out for a decode without speculation.

        There the attention reads top-k indices, and the indexer the real page table. In a speculative run sglang keeps the
        wide page table for its own multi-step preparation, and for verify and extend, which other backends do.
        """
        probe: Any = object.__new__(type(backend))
        vars(probe).update(vars(backend), speculative_num_draft_tokens=None)
        probe.init_cuda_graph_state(1, 1)
        return drops_wide_table(probe)

    def exact(self, owner: Any, batch: Any) -> bool:
        """Whether it was asked for and every step has tokens of its own to see: a chain, with an indexer run per step.

        sglang has reserved the slots of the draft tokens before it drafts, and its token table has their columns
        (`speculative.eagle_worker_common.prepare_for_draft` reads them there).
        """
        if not self._host.exact_step_lengths:
            self._say_what_they_give(owner, batch)
            return False
        problem = self._why_not_exact(owner, batch)
        if problem:
            report(self._host, self._decode).using(f"with sglang's own step lengths: {problem}")
        return not problem

    def _why_not_exact(self, owner: Any, batch: Any) -> str:
        if keys_per_index_key(self.backends(owner)[0]) > 1:
            return "pools of index keys are completed at the lengths of the batch itself (index_kpool above 1)"
        if owner.topk != 1:
            return "the draft is a tree (--speculative-eagle-topk above 1)"
        known = self._shares_topk.get(owner)
        if has_shared_topk(batch) or known:
            return "all steps use the top-k indices of one (index_share_for_mtp_iteration)"
        if known is None:
            return (
                "whether its steps share top-k indices is not known: the draft was made before the plugin was installed"
            )
        captured = (backend.decode_cuda_graph_metadata[batch.batch_size] for backend in self.backends(owner))
        if any(reads_lengths_of(batch, metadata) for metadata in captured):
            return "all steps read the lengths of the batch itself, of which there is one set"
        return ""

    def _say_what_they_give(self, owner: Any, batch: Any) -> None:
        """Once, where they pay and can be had. Nothing depends on it, so that no error of it counts."""
        steps = len(self.backends(owner)) + 1
        if self._has_told or steps < PAYS_FROM:
            return
        self._has_told = True
        with suppress(Exception):
            if not self._why_not_exact(owner, batch):
                said = self._host.with_exact_lengths(steps)
                logger.info("nsa-plugin: draft decode: NSA_PLUGIN_STEP_LENGTHS=exact is not set; %s", said)

    def made(self, original: Callable[..., None], owner: Any, *arguments: Any, **keywords: Any) -> None:
        """Stand in for `__init__`: keep what the draft model's configuration says of shared top-k indices."""
        original(owner, *arguments, **keywords)
        known = shares_topk(argument("model_runner", 0, arguments, keywords))
        if known is not None:
            self._shares_topk.setdefault(owner, known)

    def share_tables(self, backends: Sequence[Any], batch: Any) -> None:
        """Give all draft backends the first one's pooled page table of a captured size, of which sglang makes one for each.

        They always hold equal values.
        """
        shared = pooled_table(backends[0].decode_cuda_graph_metadata[batch.batch_size])
        if shared is None or "share" not in self._host.strategies:
            return
        given_back = 0
        for backend in backends[1:]:
            metadata = backend.decode_cuda_graph_metadata[batch.batch_size]
            table = getattr(metadata, POOLED_TABLE)
            given_back += 0 if table is shared else table.numel() * table.element_size()
            backend.decode_cuda_graph_metadata[batch.batch_size] = dataclasses.replace(
                metadata, **{POOLED_TABLE: shared}
            )
        if given_back:
            logger.info(
                "nsa-plugin: draft decode: %d draft backends share one pooled page table for %d requests; %.1f MiB given back",
                len(backends),
                batch.batch_size,
                given_back / 2**20,
            )

    def undo(self) -> list[str]:
        """As in the base class; what is known of drafts is forgotten, too."""
        self._shares_topk.clear()
        return super().undo()

    def cuda_graph_state(self, original: Callable[..., None], owner: Any, *arguments: Any, **keywords: Any) -> None:
        """Stand in for `init_cuda_graph_state`: one page table for all draft backends, which always hold equal values.

        sglang's own code runs for each backend in turn. The page table of each but the first is dropped before the next
        one is made.
        """
        backends = self.backends(owner)
        if self._undone or "share" not in self._host.strategies or not backends or unsupported(backends[0]):
            original(owner, *arguments, **keywords)
            return
        share = partial(_share_tables, backends[0])
        sharing(lambda: original(owner, *arguments, **keywords), backends, share, "draft decode")


class SingleBackend(HookedBackend):
    """`DeepseekSparseAttnBackend`: target verify and draft extend. Its decode belongs to no draft and is left alone."""

    def __init__(self, host: Host, glue: GlueGraphs) -> None:
        super().__init__(host, glue)
        from sglang.srt.model_executor.forward_batch_info import ForwardMode as NativeMode

        self._modes = {NativeMode.TARGET_VERIFY}
        if not lacking("draft extend"):
            self._modes.add(NativeMode.DRAFT_EXTEND_V2)

    def backends(self, owner: Any) -> Sequence[Any]:
        """The backend itself."""
        return (owner,)

    def native_mode(self, owner: Any, batch: Any) -> Any:
        """The batch's mode, if it is one of the two."""
        mode = batch.forward_mode
        return mode if mode in self._modes else None


def _share_tables(first: Any, backend: Any) -> int:
    """Drop the page tables that a draft backend has just made for those of `first`; returns the bytes that this gives back."""
    theirs, shared = backend.decode_cuda_graph_metadata, first.decode_cuda_graph_metadata
    return sum(adopt(theirs, name, shared.get(name)) for name in ("page_table", "real_page_table"))
