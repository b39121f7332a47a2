"""Bound at capture: where classes of dense backends have the metadata that their captured graphs read, and what derives from it."""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableMapping
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch

from nsa_plugin.adapters.attached import Attached
from nsa_plugin.adapters.sglang.allocation import adopt
from nsa_plugin.adapters.verification import SpareBuffers
from nsa_plugin.core.batch import SlotMap
from nsa_plugin.core.errors import reject

Tables = list[tuple[MutableMapping[str, Any], str]]
"""Page tables, each as the mapping that holds it and its name there."""


class Layout(Protocol):
    """Where one class of backends has its metadata.

    Attributes
    ----------
    vectors, page_tables : tuples of str
        Fields of the metadata: with one entry or more for each request, and with one row for each. A field may be None.
    """

    vectors: tuple[str, ...]
    page_tables: tuple[str, ...]

    def store(self, backend: Any, mode: str) -> dict[int, Any]:
        """Captured metadata of one forward mode by batch size."""

    def captured(self, backend: Any, mode: str, batch: Any) -> None:
        """Keep what belongs to the metadata that sglang has just made for the capture of a batch, and sglang does not keep."""

    def compute(self, backend: Any, batch: Any) -> None:
        """Let sglang's own code compute the metadata of a batch, by a method that is not hooked."""

    def page_size(self, backend: Any) -> int:
        """Tokens per page of the page table."""

    def seen(self, backend: Any, native_mode: Any, spec_info: Any) -> int:
        """Tokens that its kernels see beyond the batch's lengths."""

    def planes(
        self, backend: Any, mode: str, size: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
        """Lengths [size], their running sum [size + 1] and the page table [size, pages] that captured kernels read."""

    def mapped(self, backend: Any, mode: str, size: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Page table [size, pages] of the KV pool of sliding windows, and int64 slots there that a step writes; None without."""

    def slot_map(self, backend: Any, mode: str, batch: Any) -> SlotMap | None:
        """Where that pool has the tokens of a batch; None without."""

    def shared(self, first: Any, own: Any) -> Any:
        """Metadata of a further step over the page tables of the first."""

    def refresher(
        self, backend: Any, mode: str, size: int, lengths: torch.Tensor, enabled: torch.Tensor | None
    ) -> Callable[[], None] | None:
        """What refreshes planes that sglang's own functions derive from the lengths; None without any.

        It leaves them as they are while `enabled`, int32 [1] or None, is 0 on the device: sglang has written them then, and
        the lengths are of an earlier batch.
        """

    def tables(self, backend: Any) -> tuple[Tables, ...]:
        """The page tables that a draft backend has just made, those of one KV pool together. Steps read the first of each."""

    def spared(self, backend: Any, mode: str, size: int, spares: SpareBuffers) -> dict[str, Any]:
        """Attributes of a shadow of `backend` that writes into spare buffers."""


class OfCaptures:
    """What captures leave behind, as long as sglang's CUDA-graph buffers are those of the captures."""

    def __init__(self, name: str) -> None:
        self._kept: Attached[dict[str, tuple[Any, dict[Any, Any]]]] = Attached(name)

    def of(self, backend: Any, mode: str, buffers: Any) -> dict[Any, Any]:
        """That of one forward mode over `buffers`; empty if there are new ones."""
        known = self._kept.setdefault(backend, {})
        if mode not in known or known[mode][0] is not buffers:
            known[mode] = buffers, {}
        return known[mode][1]


class FlashAttention:
    """`FlashAttentionBackend` with top-k 1: metadata in a store for each forward mode, one page-table row per request."""

    vectors: tuple[str, ...] = ("cache_seqlens_int32", "cu_seqlens_k", "cu_seqlens_q", "swa_out_cache_loc")
    page_tables: tuple[str, ...] = ("page_table", "swa_page_table")
    _stores: ClassVar = {"DECODE": "decode_cuda_graph_metadata", "TARGET_VERIFY": "target_verify_metadata"}

    def __init__(self) -> None:
        self._written = OfCaptures("written")

    def store(self, backend: Any, mode: str) -> dict[int, Any]:
        """As sglang has it."""
        found: dict[int, Any] = getattr(backend, self._stores[mode])
        return found

    def captured(self, backend: Any, mode: str, batch: Any) -> None:
        """The slots that it writes, by its size and where its lengths are.

        With two-batch overlap batches of one size are captured that are different parts of the runner's buffers.
        """
        known = self._written.of(backend, mode, self.store(backend, mode))
        known[batch.batch_size, batch.seq_lens.data_ptr()] = batch.out_cache_loc

    def compute(self, backend: Any, batch: Any) -> None:
        """As its `init_forward_metadata_out_graph` does."""
        backend._init_full_cg_decode_metadata(batch, in_capture=False)

    def page_size(self, backend: Any) -> int:
        """That of the cache."""
        return int(backend.page_size)

    def seen(self, backend: Any, native_mode: Any, spec_info: Any) -> int:
        """What sglang says itself: i + 1 in draft step i, all draft tokens in a verification."""
        return int(backend._spec_read_seq_len_delta(native_mode, spec_info))

    def planes(
        self, backend: Any, mode: str, size: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
        """Fields of the metadata."""
        metadata = self.store(backend, mode)[size]
        return metadata.cache_seqlens_int32, metadata.cu_seqlens_k, metadata.page_table

    def mapped(self, backend: Any, mode: str, size: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Fields of the metadata."""
        metadata = self.store(backend, mode)[size]
        return metadata.swa_page_table, metadata.swa_out_cache_loc

    def slot_map(self, backend: Any, mode: str, batch: Any) -> SlotMap | None:
        """Of what a draft writes, which sglang lists by request, one row per step.

        sglang may pass the slots of the requests alone. The runner's own buffer then has them, and 0 for those that are padding.
        """
        if not backend.use_sliding_window_kv_pool:
            return None
        steps = backend.speculative_num_steps if mode == "DECODE" else 1
        written = batch.out_cache_loc
        if len(written) != batch.batch_size * (steps if mode == "DECODE" else backend.speculative_num_draft_tokens):
            written = self._written.of(backend, mode, self.store(backend, mode)).get(
                (batch.batch_size, batch.seq_lens.data_ptr())
            )
            if written is None:
                reject("batch.seq_lens", "the lengths of a captured batch", "others; its slots are not all there")
        return SlotMap(backend.token_to_kv_pool.full_to_swa_index_mapping, written.view(-1, steps).t())

    def shared(self, first: Any, own: Any) -> Any:
        """Vectors of its own, as steps see more and more tokens, and write others."""
        tables = {name: getattr(first, name) for name in self.page_tables}
        return own if all(getattr(own, name) is table for name, table in tables.items()) else replace(own, **tables)

    def refresher(
        self, backend: Any, mode: str, size: int, lengths: torch.Tensor, enabled: torch.Tensor | None
    ) -> Callable[[], None] | None:
        """None: the kernels get no schedule in these modes."""
        return None

    def tables(self, backend: Any) -> tuple[Tables, ...]:
        """Those of all forward modes: a draft backend has only its steps to serve."""
        stores = ("decode_cuda_graph_metadata", "target_verify_metadata", "draft_extend_metadata")
        full, windows = ([(getattr(backend, store), name) for store in stores] for name in self.page_tables)
        groups: tuple[Tables, ...] = ([(backend.decode_cuda_graph_metadata, "page_table_draft_decode"), *full],)
        return (*groups, windows) if backend.use_sliding_window_kv_pool else groups

    def spared(self, backend: Any, mode: str, size: int, spares: SpareBuffers) -> dict[str, Any]:
        """A store with one metadata, and the buffer that sglang fills besides."""
        metadata = self.store(backend, mode)[size]
        there = {name: value for name, value in vars(metadata).items() if value is not None}
        changes = {name: spares.own(there[name]) for name in self.vectors if name in there}
        changes |= {name: spares.shared(name, there[name]) for name in self.page_tables if name in there}
        return {
            self._stores[mode]: {size: replace(metadata, **changes)},
            "cuda_graph_swa_out_cache_loc": changes.get("swa_out_cache_loc"),
        }


class FlashMLA:
    """`FlashMLABackend`: one set of buffers for all forward modes and sizes, and metadata that sglang makes anew each time."""

    vectors: tuple[str, ...] = ("num_splits", "seq_lens_k")
    page_tables: tuple[str, ...] = ("block_kv_indices",)
    _page = 64
    _buffers = ("cuda_graph_mla_metadata", "cuda_graph_num_splits", "cuda_graph_draft_extend_seq_lens_k")
    _tables = "cuda_graph_kv_indices"
    _views = ("cuda_graph_mla_metadata_view", "cuda_graph_num_splits_view")

    def __init__(self) -> None:
        self._captured = OfCaptures("captured")

    def store(self, backend: Any, mode: str) -> dict[int, Any]:
        """The metadata of captures over the present buffers."""
        return self._captured.of(backend, mode, getattr(backend, self._tables))

    def captured(self, backend: Any, mode: str, batch: Any) -> None:
        """The metadata, in place of that of an earlier capture."""
        self.store(backend, mode)[batch.batch_size] = backend.forward_metadata

    def compute(self, backend: Any, batch: Any) -> None:
        """As its `init_forward_metadata_out_graph` does."""
        backend._apply_decode_target_verify_metadata(
            plan=batch.kv_loc_plan,
            bs=batch.batch_size,
            req_pool_indices=batch.req_pool_indices,
            seq_lens=batch.seq_lens,
            seq_lens_cpu=batch.seq_lens_cpu,
            forward_mode=batch.forward_mode,
        )

    def page_size(self, backend: Any) -> int:
        """That of the kernel."""
        return self._page

    def seen(self, backend: Any, native_mode: Any, spec_info: Any) -> int:
        """The draft tokens in a verification."""
        return int(backend.num_draft_tokens) if native_mode.is_target_verify() else 0

    def planes(
        self, backend: Any, mode: str, size: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
        """Parts of the backend's buffers; only a draft extend reads lengths there."""
        lengths = self.store(backend, mode)[size].seq_lens_k
        return lengths, None, getattr(backend, self._tables)[:size]

    def mapped(self, backend: Any, mode: str, size: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """None: it has no sliding windows."""
        return None, None

    def slot_map(self, backend: Any, mode: str, batch: Any) -> SlotMap | None:
        """None."""
        return None

    def shared(self, first: Any, own: Any) -> Any:
        """All of it: every step sees the same."""
        return first

    def refresher(
        self, backend: Any, mode: str, size: int, lengths: torch.Tensor, enabled: torch.Tensor | None
    ) -> Callable[[], None] | None:
        """FlashMLA's schedule and splits."""
        get_mla_metadata = vars(sys.modules[type(backend).__module__])["get_mla_metadata"]
        heads = backend.num_q_heads * (1 if mode == "DECODE" else backend.num_draft_tokens)
        fp8, schedule = backend.is_fp8_kvcache, self.store(backend, mode)[size].flashmla_metadata
        splits = backend.cuda_graph_num_splits[: size + 1]
        on = None if enabled is None else enabled.view(torch.bool)[:1]  # the lowest byte

        def put(plane: torch.Tensor, made: torch.Tensor) -> None:
            if on is None:
                plane.copy_(made)
            else:
                torch.where(on, made, plane, out=plane)

        def refresh() -> None:
            made, number = get_mla_metadata(lengths, heads, 1, is_fp8_kvcache=fp8)
            put(schedule, made)
            put(splits, number)

        return refresh

    def tables(self, backend: Any) -> tuple[Tables, ...]:
        """The table, and with it the buffers that hold equal values in all steps."""
        return ([(vars(backend), self._tables)],)

    def spared(self, backend: Any, mode: str, size: int, spares: SpareBuffers) -> dict[str, Any]:
        """Buffers of its own."""
        changes: dict[str, Any] = dict.fromkeys(self._views)
        for name in self._buffers:
            if (value := getattr(backend, name)) is not None:
                changes[name] = spares.own(value)
        return changes | {self._tables: spares.shared(self._tables, getattr(backend, self._tables))}


def share_tables(layout: Layout, first: Any, backend: Any) -> int:
    """Let the page tables of a draft backend be the first one's, for each KV pool; returns the bytes that this gives back."""
    given_back = 0
    for firsts, own in zip(layout.tables(first), layout.tables(backend), strict=True):
        holder, name = firsts[0]
        given_back += sum(adopt(tables, key, holder[name]) for tables, key in own)
    return given_back
