"""At start, at capture and at every replay: backends of dense attention whose metadata is computed once, for all draft steps.

A row of `ROWS` is one class in one forward mode. How it is prepared, verified, switched and undone is that of the sparse
backends (`HookedBackend`, `Preparation`); a `Layout` says where the metadata is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from nsa_plugin.adapters.base import Host, Strategy
from nsa_plugin.adapters.reporting import PathReport
from nsa_plugin.adapters.sglang import needs
from nsa_plugin.adapters.sglang.allocation import sharing
from nsa_plugin.adapters.sglang.glue import GlueGraphs
from nsa_plugin.adapters.sglang.hooked import HookedBackend
from nsa_plugin.adapters.sglang.layouts import FlashAttention, FlashMLA, Layout, share_tables
from nsa_plugin.adapters.sglang.preparation import Preparation
from nsa_plugin.adapters.sglang.recorded import RecordedBySglang
from nsa_plugin.adapters.sglang.refusals import FLASH_ATTENTION, FLASHMLA, uncovered
from nsa_plugin.adapters.sglang.releases import in_graph, is_ragged, out_graph
from nsa_plugin.adapters.sglang.reports import ENGINE, logger
from nsa_plugin.adapters.sglang.rows import BackendRow
from nsa_plugin.adapters.verification import SpareBuffers, shadow
from nsa_plugin.core.batch import NO_LIMIT, BatchDescriptor, ForwardMode, Geometry, TokenTable, multiprocessors
from nsa_plugin.core.metadata import StepMetadata

HOPPER = frozenset({"9"})


@dataclass(frozen=True)
class DenseRow(BackendRow):
    """A class of dense backends in one forward mode.

    `unsupported` is asked of single backends.

    Attributes
    ----------
    layout : Layout
    draft : bool
        Whether the class has the backends of all draft steps in `attn_backends`, and prepares them as `mode`.
    """

    least: ClassVar[Strategy] = "share"

    layout: Layout
    draft: bool = False


def _flash_attention(path: str, backend: str, mode: str, draft: bool = False) -> DenseRow:
    return DenseRow(
        f"{path} (FlashAttention)", backend, mode, "dense FlashAttention",
        partial(uncovered, FLASH_ATTENTION), proved=True, gpus=HOPPER,
        layout=FLASH_ATTENTION_LAYOUT, draft=draft,
    )  # fmt: skip


def _flashmla(path: str, backend: str, mode: str, draft: bool = False) -> DenseRow:
    return DenseRow(
        f"{path} (FlashMLA)", backend, mode, "dense FlashMLA", partial(uncovered, FLASHMLA), proved=False,
        gpus=frozenset(), layout=FLASHMLA_LAYOUT, draft=draft,
    )  # fmt: skip


FLASH_ATTENTION_LAYOUT, FLASHMLA_LAYOUT = FlashAttention(), FlashMLA()
ROWS = (
    _flash_attention("draft decode", needs.FLASH_ATTENTION_DRAFT, "DECODE", draft=True),
    _flash_attention("target verify", needs.FLASH_ATTENTION, "TARGET_VERIFY"),
    _flashmla("draft decode", needs.FLASHMLA_DRAFT, "DECODE", draft=True),
    _flashmla("target verify", needs.FLASHMLA, "TARGET_VERIFY"),
    _flashmla("draft extend", needs.FLASHMLA, "DRAFT_EXTEND_V2"),
)
"""FlashAttention's draft extend is in `recorded.ROWS`: sglang's own graphs compute it."""


class DensePreparation(Preparation):
    """How the metadata of one captured batch size of some dense backends is prepared at each replay."""

    _native_mode: DenseRow
    _lengths: torch.Tensor

    def __init__(self, *arguments: Any) -> None:
        self._expected: dict[int, Any] = {}
        super().__init__(*arguments)

    def _store(self, backend: Any) -> dict[int, Any]:
        return self._native_mode.layout.store(backend, self._native_mode.mode)

    def _reports(self) -> PathReport:
        return self._host.path(ENGINE, self._native_mode.path, logger)

    def _noted(self, exact: bool) -> str:
        return ""

    def _buffers(self, drop_wide_table: bool, exact: bool) -> tuple[Any, ...]:
        first, *others = self._own
        return (first, *(self._native_mode.layout.shared(first, own) for own in others))

    def _length_offsets(self, batch: Any, exact: bool) -> tuple[int, ...]:
        row, mode = self._native_mode, native(self._native_mode)
        return tuple(row.layout.seen(backend, mode, batch.spec_info) for backend in self._backends)

    def _describer(self, exact: bool) -> Callable[[Any], BatchDescriptor]:
        first, steps, row = self._backends[0], len(self._backends), self._native_mode
        table, offsets = first.req_to_token, self._offsets if any(self._offsets) else ()

        return lambda batch: BatchDescriptor(
            ForwardMode.DECODE,
            batch.batch_size,
            batch.seq_lens,
            TokenTable(table, batch.req_pool_indices),
            steps,
            offsets,
            slot_map=row.layout.slot_map(first, row.mode, batch),
        )

    def _sizes(self) -> Geometry:
        first, row = self._backends[0], self._native_mode
        page, table = row.layout.page_size(first), row.layout.planes(first, row.mode, self._batch_size)[2]
        return Geometry(
            index_topk=1,
            page_size=page,
            table_width=min(table.shape[1] * page, first.req_to_token.shape[1]),
            num_sms=multiprocessors(table.device),
            wide_page_table=page == 1,
            max_length=NO_LIMIT,
        )

    def _consumer(self, index: int) -> StepMetadata:
        layout, mode, size = self._native_mode.layout, self._native_mode.mode, self._batch_size
        first, own = self._backends[0], self._backends[index]
        lengths, running, _ = layout.planes(own, mode, size)
        table, (windows, _) = layout.planes(first, mode, size)[2], layout.mapped(first, mode, size)
        if not index:
            self._lengths = table.new_zeros(size) if lengths is None else lengths
        return StepMetadata(
            self._lengths if lengths is None else lengths, running, None, None, None,
            table if self._geometry.page_size == 1 else None, table,
            mapped_page_table=windows, mapped_slots=layout.mapped(own, mode, size)[1],
        )  # fmt: skip

    def _refresher(self, exact: bool) -> Callable[[], None] | None:
        row = self._native_mode
        return row.layout.refresher(self._backends[0], row.mode, self._batch_size, self._lengths, self._enabled)

    def _point(self) -> None:
        for backend, metadata in zip(self._backends, self._used, strict=True):
            backend.forward_metadata = metadata

    def _natively(self, batch: Any) -> None:
        by_sglang(self._backends, batch, self._native_mode)

    def _make_spares(self, spares: SpareBuffers) -> None:
        for index, metadata in enumerate(self._used):
            if not index or metadata is not self._used[0]:
                self._spares[index] = self._native_mode.layout.spared(
                    self._backends[index], self._native_mode.mode, self._batch_size, spares
                )

    def _rebuild(self, batch: Any, offset: int) -> None:
        """Have sglang's own code write what the backend of that index makes of a batch into its spare buffers."""
        writer = shadow(self._backends[offset], **self._spares[offset])
        by_sglang([writer], batch, self._native_mode)
        self._expected[offset] = writer.forward_metadata

    def _differences(
        self, batch: Any, live: BatchDescriptor
    ) -> Iterator[tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
        for index in self._spares:
            if batch is not None:
                self._rebuild(batch, index)
            expected = self._values(self._expected[index], live, index)
            yield index, expected, self._values(self._used[index], live, index)

    def _values(self, metadata: Any, live: BatchDescriptor, index: int) -> dict[str, torch.Tensor]:
        """Copies of the defined values: vectors, and live pages."""
        layout, size, unit = self._native_mode.layout, self._batch_size, self._geometry.page_size
        values = {name: value.clone() for name in layout.vectors if (value := getattr(metadata, name)) is not None}
        lengths = live.seq_lens[:size] + self._offsets[index]
        pages = -(-int(lengths.max()) // unit)
        for name in layout.page_tables:
            if (whole := getattr(metadata, name)) is not None:
                table = whole[:size, :pages]
                unread = torch.arange(table.shape[1], device=table.device) * unit >= lengths[:, None]
                values[name] = table.masked_fill(unread, -1)
        return values


def native(row: DenseRow) -> Any:
    """sglang's ForwardMode of a row."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode as NativeMode

    return NativeMode[row.mode]


def by_sglang(backends: Sequence[Any], batch: Any, row: DenseRow) -> None:
    """Let sglang's own code compute the metadata of a batch for each backend, into the buffers that the backend holds."""
    from sglang.srt.model_executor.forward_batch_info import build_inner_fb_view

    seen = build_inner_fb_view(batch, bs=batch.batch_size, forward_mode=native(row))
    for backend in backends:
        row.layout.compute(backend, seen)


class DenseBackends(HookedBackend):
    """What the hooks of the classes in `ROWS` do; a subclass is about drafts, or about single backends."""

    draft = False

    def __init__(self, host: Host, glue: GlueGraphs) -> None:
        super().__init__(host, glue)
        self._rows = [row for row in ROWS if row.draft is self.draft and row.is_taken(host)]

    def path(self, native_mode: DenseRow) -> str:
        """The row's."""
        return native_mode.path

    def unsupported(self, owner: Any, batch: Any, native_mode: DenseRow) -> str:
        """As the row says; and batches whose requests have different numbers of tokens to verify."""
        if is_ragged(batch):
            return "not covered: ragged verification"
        return self.refusal(owner, native_mode)

    def refusal(self, owner: Any, row: DenseRow) -> str:
        """Empty, or what about `owner` is not covered."""
        return row.unsupported(self.backends(owner)[0])

    def strategies(self) -> tuple[Strategy, ...]:
        """All but copies: what steps can share, they share."""
        return tuple(strategy for strategy in self._host.strategies if strategy != "copy")

    def by_sglang(self, owner: Any, batch: Any, native_mode: DenseRow) -> None:
        """By its own method, in place."""
        by_sglang(self.backends(owner), batch, native_mode)

    def preparation(self, *arguments: Any) -> Preparation:
        """That of dense backends."""
        return DensePreparation(*arguments)

    def replayed(self, owner: Any, batch: Any) -> bool:
        """As in the base class. A batch that no captured size was made for leaves the size to sglang for good."""
        row = self.native_mode(owner, batch)
        preparation = self._find(owner, batch, row)
        if preparation is not None and is_ragged(batch):
            preparation.fail()
        return super().replayed(owner, batch)

    def captured(self, owner: Any, batch: Any) -> None:
        """As in the base class, once the metadata is kept."""
        row = self.native_mode(owner, batch)
        if row is not None and not self._undone:
            try:
                for backend in self.backends(owner):
                    row.layout.captured(backend, row.mode, batch)
            except Exception as error:
                self._fell_back(row, "capture", "graph", error)
                return
        super().captured(owner, batch)

    def out_graph(self, original: Callable[..., None], owner: Any, *arguments: Any, **keywords: Any) -> None:
        """Stand in for what sglang calls before each capture and each replay."""
        out_graph(self, original, owner, *arguments, **keywords)

    def in_graph(self, original: Callable[..., None], owner: Any, *arguments: Any, **keywords: Any) -> None:
        """Stand in for what sglang calls within each capture."""
        in_graph(self, original, owner, *arguments, **keywords)


class DenseDraft(DenseBackends):
    """Multi-step backends: all draft backends at once."""

    draft = True

    def backends(self, owner: Any) -> Sequence[Any]:
        """The draft backends."""
        backends: Sequence[Any] = owner.attn_backends
        return backends

    def native_mode(self, owner: Any, batch: Any) -> DenseRow | None:
        """The row of the class, if there is a draft backend at all and the batch is a draft's."""
        if not owner.attn_backends or batch.spec_info is None:
            return None
        return self._row(owner)

    def cuda_graph_state(self, original: Callable[..., None], owner: Any, *arguments: Any, **keywords: Any) -> None:
        """Stand in for `init_cuda_graph_state`: one page table for all draft backends.

        A step sees the pages of the step before it, and one more at times. All are live pages of the same requests.
        sglang's own code runs for each backend in turn. Its page tables are dropped before the next one's are made.
        """
        row, backends = self._row(owner), self.backends(owner)
        asked = row is not None and not self._undone and "share" in self._host.strategies and bool(backends)
        if row is None or not asked or self.refusal(owner, row):
            original(owner, *arguments, **keywords)
            return
        share = partial(self._share_tables, row, backends[0])
        sharing(lambda: original(owner, *arguments, **keywords), backends, share, row.path)

    def _share_tables(self, row: DenseRow, first: Any, backend: Any) -> int:
        try:
            return share_tables(row.layout, first, backend)
        except Exception as error:
            self._fell_back(row, "capture", "share", error)
            return 0

    def _row(self, owner: Any) -> DenseRow | None:
        return next((row for row in self._rows if row.has(owner)), None)


class DenseSingle(DenseBackends):
    """Single backends: target verify and draft extend, and what sglang records of it by itself."""

    def __init__(self, host: Host, glue: GlueGraphs, recorded: RecordedBySglang) -> None:
        super().__init__(host, glue)
        self._by_mode = [(native(row), row) for row in self._rows]
        self._recorded = recorded

    def backends(self, owner: Any) -> Sequence[Any]:
        """The backend itself."""
        return (owner,)

    def native_mode(self, owner: Any, batch: Any) -> DenseRow | None:
        """The row of the class and the batch's mode."""
        return next((row for mode, row in self._by_mode if mode is batch.forward_mode and row.has(owner)), None)

    def out_graph(self, original: Callable[..., None], owner: Any, *arguments: Any, **keywords: Any) -> None:
        """As in the base class; what no row serves may be recorded by sglang."""
        super().out_graph(partial(self._recorded.out_graph, original), owner, *arguments, **keywords)

    def in_graph(self, original: Callable[..., None], owner: Any, *arguments: Any, **keywords: Any) -> None:
        """As in the base class; what no row serves may be recorded by sglang."""
        super().in_graph(partial(self._recorded.in_graph, original), owner, *arguments, **keywords)
