"""At capture and at every replay: metadata that sglang records in a CUDA graph and computes once more before each replay.

The second computation is left out. It writes what the graph writes at its start, over the whole width of the page table.
What it leaves on the host stays: `forward_metadata` and what belongs to it, as sglang's own `stage_draft_extend_metadata`
leaves them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from nsa_plugin.adapters.attached import Attached
from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.reporting import PathReport
from nsa_plugin.adapters.sglang import hooked
from nsa_plugin.adapters.sglang.needs import FLASH_ATTENTION
from nsa_plugin.adapters.sglang.refusals import FLASH_ATTENTION as FLASH_ATTENTION_REFUSALS
from nsa_plugin.adapters.sglang.refusals import UNRECORDED, uncovered
from nsa_plugin.adapters.sglang.registry import beneath_hooks
from nsa_plugin.adapters.sglang.releases import IN, OUT, argument
from nsa_plugin.adapters.sglang.reports import ENGINE, MODES, logger
from nsa_plugin.adapters.sglang.rows import BackendRow
from nsa_plugin.adapters.verification import SpareBuffers, StepValues, Verification, shadow
from nsa_plugin.core.batch import BatchDescriptor, Geometry, TokenTable, multiprocessors


@dataclass(frozen=True)
class RecordedRow(BackendRow):
    """A backend whose CUDA graphs compute all metadata of one forward mode, which no other row has.

    Attributes
    ----------
    store : str
        Attribute of a backend: captured metadata by batch size.
    vectors, tables, slots : tuples of str
        Fields of the metadata: of requests, page tables, and write slots of tokens. A field may be None.
    """

    store: str
    vectors: tuple[str, ...]
    tables: tuple[str, ...]
    slots: tuple[str, ...]


ROWS = (
    RecordedRow(
        path="draft extend (FlashAttention)",
        backend=FLASH_ATTENTION,
        mode="DRAFT_EXTEND_V2",
        part="recorded draft extend",
        store="draft_extend_metadata",
        vectors=("cache_seqlens_int32", "cu_seqlens_k", "cu_seqlens_q"),
        tables=("page_table", "swa_page_table"),
        slots=("swa_out_cache_loc",),
        unsupported=partial(uncovered, (*FLASH_ATTENTION_REFUSALS, UNRECORDED)),
        proved=True,
        gpus=frozenset({"9"}),
    ),
)


class RecordedBySglang:
    """What the hooks of the backends in `ROWS` do."""

    def __init__(self, host: Host) -> None:
        from sglang.srt.model_executor.forward_batch_info import ForwardMode as NativeMode

        self._host = host
        self._rows = {NativeMode[row.mode]: row for row in ROWS if row.is_taken(host)}
        self._graphs: Attached[dict[Any, RecordedGraph]] = Attached("recorded_by_sglang")
        self._spares = SpareBuffers()
        self._undone = False

    def out_graph(self, original: Callable[..., None], owner: Any, *arguments: Any, **keywords: Any) -> None:
        """Stand in for what sglang calls before each capture and each replay."""
        batch = argument("forward_batch", 0, arguments, keywords)
        row = self._row(owner, batch)
        if row is None:
            original(owner, *arguments, **keywords)
        elif argument("in_capture", 1, arguments, keywords):
            original(owner, *arguments, **keywords)
            self._graphs.setdefault(owner, {}).pop((row, batch.batch_size), None)
        elif not self._replayed(owner, batch, row):
            self._by_sglang(lambda: original(owner, *arguments, **keywords), owner, batch, row)

    def in_graph(self, original: Callable[..., None], owner: Any, *arguments: Any, **keywords: Any) -> None:
        """Stand in for what sglang calls within each capture: remember what it has recorded there."""
        original(owner, *arguments, **keywords)
        batch = argument("forward_batch", 0, arguments, keywords)
        row = self._row(owner, batch)
        if row is None or not hooked.capturing():
            return
        said = self._report(row)
        try:
            if problem := row.unsupported(owner):
                said.left_alone(problem)
                return
            graph = RecordedGraph(self._host, row, owner, batch, said, self._spares)
            self._graphs.setdefault(owner, {})[row, batch.batch_size] = graph
            verified = f", verified (every {self._host.verify} replays)" if self._host.verify else ""
            said.using(f"graph, as sglang records it, and not once more before a replay{verified}")
        except Exception as error:
            said.fell_back("capture", "graph", error)

    def captured_off(self) -> list[str]:
        """Nothing: sglang records the same while the plugin is off."""
        return []

    def undo(self) -> list[str]:
        """Leave every replay to sglang. Returns no path: what graphs have recorded is sglang's own."""
        self._undone = True
        self._graphs.clear()
        return []

    def _row(self, owner: Any, batch: Any) -> RecordedRow | None:
        row = self._rows.get(batch.forward_mode)
        return None if row is None or self._undone or not row.has(owner) else row

    def _report(self, row: RecordedRow) -> PathReport:
        return self._host.path(ENGINE, row.path, logger)

    def _replayed(self, owner: Any, batch: Any, row: RecordedRow) -> bool:
        """Leave to the graph what it computes; False if sglang has to compute it."""
        graph = self._find(owner, batch, row)
        if graph is None or not self._host.on:
            return False
        try:
            if not graph.reads(batch):
                return False
            graph.replay(batch)
        except Exception as error:
            self._graphs.setdefault(owner, {}).pop((row, batch.batch_size), None)
            self._report(row).fell_back("replay", "graph", error)
            return False
        return True

    def _by_sglang(self, compute: Callable[[], None], owner: Any, batch: Any, row: RecordedRow) -> None:
        graph = self._find(owner, batch, row)
        if graph is None:
            compute()
        else:
            graph.replay_natively(compute)

    def _find(self, owner: Any, batch: Any, row: RecordedRow) -> RecordedGraph | None:
        graphs = self._graphs.get(owner)
        return None if graphs is None else graphs.get((row, batch.batch_size))


class RecordedGraph:
    """The metadata of one batch size that a graph of sglang's computes.

    Parameters
    ----------
    host : Host
    row : RecordedRow
    backend : FlashAttentionBackend
        It holds the metadata for the batch size.
    batch : ForwardBatch
        The captured batch: its tensors are the runner's static buffers, which the graph reads.
    report : PathReport
    spares : SpareBuffers
        Where a verification has the graph's computation written.

    Attributes
    ----------
    replay : callable(batch)
        Points the backend at the metadata; verifies if that is due.
    replay_natively : callable(compute)
        Calls sglang's own computation, which is counted as such.
    """

    def __init__(
        self, host: Host, row: RecordedRow, backend: Any, batch: Any, report: PathReport, spares: SpareBuffers
    ) -> None:
        self._row, self._backend, self._size = row, backend, batch.batch_size
        self._metadata = getattr(backend, row.store)[self._size]
        names = ("batch_size", "forward_mode", "seq_lens", "req_pool_indices", "extend_seq_lens", "out_cache_loc")
        self._static = SimpleNamespace(**{name: getattr(batch, name) for name in names})
        self._read = self._sources(batch, batch.extend_seq_lens)
        self._described = self._describe(batch)
        self._geometry = Geometry(
            index_topk=1,
            page_size=backend.page_size,
            table_width=min(backend.max_context_len, backend.req_to_token.shape[1]),
            num_sms=multiprocessors(backend.req_to_token.device),
            wide_page_table=False,
        )
        self._observe = report.observer("graph", self._described)
        call = report.instrument(self._point, "graph", 1)
        if host.verify:
            changes = {name: self._spare(name, spares) for name in (*row.vectors, *row.tables, *row.slots)}
            self._spares = replace(self._metadata, **changes)
            self._verification = Verification(report, "graph", host.verify)
            call = self._verification.after(call, self._verify)
        self.replay = call
        self.replay_natively = report.instrument(lambda compute: compute(), "off", 1)

    def reads(self, batch: Any) -> bool:
        """Whether the graph reads what a live batch brings, and writes what the backend holds."""
        lengths = vars(batch.spec_info).get("extend_seq_lens_tensor")
        return (
            lengths is not None
            and self._sources(batch, lengths) == self._read
            and getattr(self._backend, self._row.store).get(self._size) is self._metadata
        )

    def _sources(self, batch: Any, extend_lens: torch.Tensor) -> tuple[int, ...]:
        tensors = (batch.seq_lens, batch.req_pool_indices, batch.out_cache_loc, extend_lens)
        return tuple(tensor.data_ptr() for tensor in tensors)

    def _point(self, batch: Any) -> None:
        """Leave the Python state that sglang's own computation leaves."""
        self._metadata.max_seq_len_k = self._backend.max_context_len
        self._backend.forward_metadata = self._metadata
        self._backend.forward_metadata_spec_decode_expand = None
        if self._observe is not None:
            self._observe(self._described)

    def _describe(self, batch: Any) -> BatchDescriptor:
        """The batch in its static buffers, which hold the live one at a replay."""
        return BatchDescriptor(
            MODES[self._row.mode],
            self._size,
            batch.seq_lens,
            TokenTable(self._backend.req_to_token, batch.req_pool_indices),
            draft_tokens=batch.out_cache_loc.shape[0] // self._size,
            extend_lens=batch.extend_seq_lens,
        )

    def _spare(self, name: str, spares: SpareBuffers) -> torch.Tensor | None:
        value = getattr(self._metadata, name)
        if value is None:
            return None
        return spares.shared(name, value) if name in self._row.tables else spares.own(value)

    def _verify(self, batch: Any) -> None:
        """Compare sglang's two computations: the one before the replay, and the one that the graph makes.

        The first runs as sglang would have it. The graph's own runs here, from the same inputs into spare buffers.
        """
        kind = type(self._backend)
        beneath_hooks(getattr(kind, OUT))(self._backend, batch)
        held = {self._size: self._spares}
        beneath_hooks(getattr(kind, IN))(shadow(self._backend, **{self._row.store: held}), self._static)
        self._verification.settle(
            [self._both(batch.out_cache_loc.shape[0])], None, lambda: (self._described, self._geometry, None)
        )

    def _both(self, tokens: int) -> StepValues:
        """The defined values of both sides: live pages, and the slots of live tokens."""
        lengths = self._static.seq_lens[: self._size]
        longest = int(lengths.max()) if self._size else 0
        starts = torch.arange(0, longest, self._geometry.page_size, device=lengths.device)
        unread = starts >= lengths[:, None]
        sides = []
        for metadata in (self._metadata, self._spares):
            values = {name: getattr(metadata, name).clone() for name in self._row.vectors}
            for name in self._row.tables:
                if (table := getattr(metadata, name)) is not None:
                    values[name] = table[:, : len(starts)].masked_fill(unread[:, : table.shape[1]], -1)
            for name in self._row.slots:
                if (slots := getattr(metadata, name)) is not None:
                    values[name] = slots[:tokens].clone()
            sides.append(values)
        return 0, sides[0], sides[1]
