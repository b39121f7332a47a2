"""The hooked methods: what happens at capture, inside a captured graph, at replay, and when something of ours fails.

At capture sglang makes its own metadata first; then a `Preparation` is made for that batch size. At replay it runs in
place of sglang's code, or has been recorded in the graph already and only points the backends at the right object. If
ours fails, sglang's per-backend code recomputes the same batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from nsa_plugin.adapters.base import Fallback, Host, Strategy
from nsa_plugin.adapters.sglang import derived
from nsa_plugin.adapters.sglang.attached import Attached
from nsa_plugin.adapters.sglang.describe import consumer, describe, geometry
from nsa_plugin.core.batch import ForwardMode

logger = logging.getLogger("sglang.srt.plugins.nsa_plugin")
ENGINE = "sglang"
MODES = {
    "DECODE": ForwardMode.DECODE,
    "TARGET_VERIFY": ForwardMode.TARGET_VERIFY,
    "DRAFT_EXTEND_V2": ForwardMode.DRAFT_EXTEND,
}
"""Ours for the name of sglang's forward mode."""
PATHS = {
    ForwardMode.DECODE: "draft decode",
    ForwardMode.TARGET_VERIFY: "target verify",
    ForwardMode.DRAFT_EXTEND: "draft extend",
}

_recorded: Attached[list[Preparation]] = Attached("recorded")
"""What captured graphs of each backend may still run, after an undo too: its buffers must outlive them."""


def capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Preparation:
    """How the metadata of one captured batch size of some DSA backends is prepared at each replay.

    Making one changes nothing; `bind` does.

    Parameters
    ----------
    host : Host
    backends : sequence of DeepseekSparseAttnBackend
        The draft backends, or the one of target verify or draft extend. Each holds sglang's own metadata for the batch.
    batch : ForwardBatch
        The captured batch: its tensors are the runner's static buffers.
    native_mode : sglang ForwardMode
        What sglang's own code takes the batch for.
    strategy : "graph", "share" or "copy"
    drop_wide_table : bool
        Leave `page_table_1` out of shared metadata, because nothing reads it.

    Attributes
    ----------
    strategy : str
    recorded : bool
        Whether a captured graph does the work.
    failed : bool
        Whether sglang's own code does it.
    note : str
        What else there is to say about the strategy.
    """

    def __init__(
        self,
        host: Host,
        backends: Sequence[Any],
        batch: Any,
        native_mode: Any,
        strategy: Strategy,
        drop_wide_table: bool,
    ) -> None:
        first, mode = backends[0], MODES[native_mode.name]
        self.strategy = strategy
        self.recorded = self.failed = False
        self._backends = tuple(backends)
        self._batch_size = batch.batch_size
        self._own = tuple(backend.decode_cuda_graph_metadata[self._batch_size] for backend in backends)
        shared = replace(self._own[0], page_table_1=None) if drop_wide_table else self._own[0]
        self._used = self._own if strategy == "copy" else (shared,) * len(backends)
        self.note = ", without the wide page table, which nothing reads" if self._used[0].page_table_1 is None else ""
        self._describe = host.describe(
            ENGINE, batch, lambda batch: describe(batch, backend=first, mode=mode, num_steps=len(backends))
        )
        self._static = self._describe(batch)
        self._run = host.plan(
            self._static,
            geometry(first, self._used[0]),
            [consumer(metadata) for metadata in self._used],
            "copy" if strategy == "copy" else "share",
            derived.refresher(first, self._used[0], native_mode, self._batch_size),
        )
        self._observe = host.observer(ENGINE, PATHS[mode], strategy, self._static)

    def bind(self) -> None:
        """Point the backends at the buffers that the strategy uses."""
        self._hand_out(self._used)

    def undo(self) -> None:
        """Point the backends at their own buffers again."""
        if self.is_current():
            self._hand_out(self._own)

    def is_current(self) -> bool:
        """Whether the backends still hold the metadata that this was made for."""
        return all(
            backend.decode_cuda_graph_metadata.get(self._batch_size) is metadata
            for backend, metadata in zip(self._backends, self._used, strict=True)
        )

    def capture(self, batch: Any) -> None:
        """Take the static buffers of a runner that is about to capture, and prepare its batch."""
        self._static = self._describe(batch)
        self._run(self._static)
        self._point()

    def record(self) -> None:
        """Issue the work; on a stream that is being captured, it is recorded."""
        self._run(self._static)
        self.recorded = self.recorded or capturing()

    def rehearse(self) -> None:
        """Record the work in a graph of no further use: raises what a capture would raise, before one is at stake."""
        if not torch.cuda.is_available():
            return
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._run(self._static)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def replay(self, batch: Any) -> None:
        """Prepare the metadata of a live batch."""
        if not self.recorded:
            self._run(self._describe(batch))
        if self._backends[0].forward_metadata is not self._used[0]:
            self._point()
        if self._observe is not None:
            self._observe(self._describe(batch))

    def _point(self) -> None:
        """Leave behind in Python what sglang's own replay leaves; only eager code looks at it."""
        for backend, metadata in zip(self._backends, self._used, strict=True):
            backend.set_dsa_prefill_impl(forward_batch=None)
            backend.forward_metadata = metadata

    def _hand_out(self, used: Sequence[Any]) -> None:
        for backend, metadata in zip(self._backends, used, strict=True):
            backend.decode_cuda_graph_metadata[self._batch_size] = metadata
            backend.forward_metadata = metadata


class Path:
    """The hooks of one backend class. The subclasses say which backends and batches they are about."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._prepared: Attached[dict[Any, Preparation]] = Attached("prepared")

    def hooks(self) -> dict[str, Callable[..., None]]:
        """Method of the class to the function that stands in for it; that gets the original method first."""
        return {
            "init_forward_metadata_out_graph": self.out_graph,
            "init_forward_metadata_in_graph": self.in_graph,
        }

    def backends(self, owner: Any) -> Sequence[Any]:
        """The DSA backends that `owner`, the object whose method is hooked, prepares."""
        raise NotImplementedError

    def native_mode(self, owner: Any, batch: Any) -> Any:
        """sglang's ForwardMode for the metadata that `owner` makes of `batch`; None to leave it alone."""
        raise NotImplementedError

    def wide_table_is_unread(self, backend: Any) -> bool:
        """Whether nothing reads `page_table_1` in the forwards that the metadata is for."""
        return False

    def out_graph(
        self, original: Callable[..., None], owner: Any, forward_batch: Any, in_capture: bool = False
    ) -> None:
        """Stand in for `init_forward_metadata_out_graph`: before a capture, or before each replay."""
        native_mode = self.native_mode(owner, forward_batch)
        if in_capture:
            original(owner, forward_batch, in_capture=True)
            if native_mode is not None:
                self._capture(owner, forward_batch, native_mode)
            return
        preparation = self._find(owner, forward_batch, native_mode)
        if preparation is None:
            original(owner, forward_batch, in_capture=False)
        elif preparation.failed:
            native_replay(self.backends(owner), forward_batch, native_mode)
        else:
            try:
                preparation.replay(forward_batch)
            except Exception as error:
                preparation.failed = True
                native_replay(self.backends(owner), forward_batch, native_mode)
                self._fell_back(native_mode, "replay", preparation.strategy, error)

    def in_graph(self, original: Callable[..., None], owner: Any, forward_batch: Any) -> None:
        """Stand in for `init_forward_metadata_in_graph`: what is launched here becomes part of the captured graph."""
        original(owner, forward_batch)
        native_mode = self.native_mode(owner, forward_batch)
        preparation = self._find(owner, forward_batch, native_mode)
        if preparation is None or preparation.failed or preparation.strategy != "graph":
            return
        try:
            preparation.record()
            if preparation.recorded:
                _recorded.setdefault(owner, []).append(preparation)
        except Exception as error:
            preparation.strategy, preparation.recorded = "share", False
            self._fell_back(native_mode, "capture", "graph", error)

    def undo(self) -> None:
        """Give every backend its own metadata back. Graphs that were captured go on with what they recorded."""
        for prepared in self._prepared.values():
            for preparation in prepared.values():
                preparation.undo()
        self._prepared.clear()

    def _find(self, owner: Any, batch: Any, native_mode: Any) -> Preparation | None:
        prepared = self._prepared.get(owner)
        return None if prepared is None else prepared.get((native_mode, batch.batch_size))

    def _capture(self, owner: Any, batch: Any, native_mode: Any) -> None:
        prepared = self._prepared.setdefault(owner, {})
        key = (native_mode, batch.batch_size)
        backends = self.backends(owner)
        path = PATHS[MODES[native_mode.name]]
        if problem := unsupported(backends[0]):
            self._host.using(logger, ENGINE, path, f"off ({problem})")
            return
        known = prepared.pop(key, None)
        if known is not None and not known.is_current():
            known = None
        for strategy in self._host.strategies:
            if known is not None and known.strategy != strategy:
                continue  # what the backends hold now was made for another strategy
            preparation = known
            try:
                if preparation is None:
                    drop_wide_table = strategy != "copy" and self.wide_table_is_unread(backends[0])
                    preparation = Preparation(self._host, backends, batch, native_mode, strategy, drop_wide_table)
                    preparation.bind()
                preparation.capture(batch)
                if strategy == "graph":
                    preparation.rehearse()
            except Exception as error:
                if preparation is not None:
                    preparation.undo()
                known = None
                native_replay(backends, batch, native_mode)
                self._fell_back(native_mode, "capture", strategy, error)
            else:
                prepared[key] = preparation
                self._host.using(logger, ENGINE, path, strategy + preparation.note)
                return

    def _fell_back(self, native_mode: Any, stage: str, strategy: str, error: Exception) -> None:
        path = PATHS[MODES[native_mode.name]]
        self._host.fell_back(logger, Fallback(ENGINE, path, stage, strategy, error))


class MultiStepDraft(Path):
    """`DeepseekSparseAttnMultiStepBackend`: all draft backends at once, always as DECODE."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        from sglang.srt.model_executor.forward_batch_info import ForwardMode as NativeMode

        self._decode = NativeMode.DECODE

    def hooks(self) -> dict[str, Callable[..., None]]:
        """Also the allocation of the CUDA-graph buffers."""
        return super().hooks() | {"init_cuda_graph_state": self.cuda_graph_state}

    def backends(self, owner: Any) -> Sequence[Any]:
        """The draft backends."""
        backends: Sequence[Any] = owner.attn_backends
        return backends

    def native_mode(self, owner: Any, batch: Any) -> Any:
        """DECODE, if there is a draft backend at all."""
        return self._decode if owner.attn_backends else None

    def wide_table_is_unread(self, backend: Any) -> bool:
        """What sglang's own `init_cuda_graph_state` decides for a decode without speculation.

        Its attention then reads top-k indices and its indexer the real page table; what sglang keeps the wide table for
        in a speculative run is its own multi-step preparation, and verify and extend, which other backends do.
        """
        probe: Any = object.__new__(type(backend))
        vars(probe).update(vars(backend), speculative_num_draft_tokens=None)
        probe.init_cuda_graph_state(1, 1)
        return bool(getattr(probe, "dsa_drop_wide_page_table", False))

    def cuda_graph_state(self, original: Callable[..., None], owner: Any, max_bs: int, max_num_tokens: int) -> None:
        """Stand in for `init_cuda_graph_state`: one page table for all draft backends, which hold equal values always.

        sglang's own code runs for each backend in turn, as it does in the original; its page table is then dropped.
        """
        backends = self.backends(owner)
        if "share" not in self._host.strategies or not backends or unsupported(backends[0]):
            original(owner, max_bs, max_num_tokens)
            return
        first, *others = backends
        first.init_cuda_graph_state(max_bs, max_num_tokens)
        given_back = 0
        for backend in others:
            backend.init_cuda_graph_state(max_bs, max_num_tokens)
            for name in ("page_table", "real_page_table"):
                table = backend.decode_cuda_graph_metadata.get(name)
                if isinstance(table, torch.Tensor):
                    given_back += table.numel() * table.element_size()
                    backend.decode_cuda_graph_metadata[name] = first.decode_cuda_graph_metadata[name]
        if given_back:
            logger.info(
                "nsa-plugin: draft decode: %d draft backends share one page table; %.1f MiB given back",
                len(backends),
                given_back / 2**20,
            )


class SingleBackend(Path):
    """`DeepseekSparseAttnBackend`: target verify and draft extend. Its decode belongs to no draft and is left alone."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        from sglang.srt.model_executor.forward_batch_info import ForwardMode as NativeMode

        self._modes = {NativeMode.TARGET_VERIFY, NativeMode.DRAFT_EXTEND_V2}

    def backends(self, owner: Any) -> Sequence[Any]:
        """The backend itself."""
        return (owner,)

    def native_mode(self, owner: Any, batch: Any) -> Any:
        """The batch's mode, if it is one of the two."""
        mode = batch.forward_mode
        return mode if mode in self._modes else None


def native_replay(backends: Sequence[Any], batch: Any, native_mode: Any) -> None:
    """Let sglang's per-backend code compute the metadata of a batch, into the buffers that the backends hold."""
    for backend in backends:
        backend._apply_cuda_graph_metadata(
            bs=batch.batch_size,
            req_pool_indices=batch.req_pool_indices,
            seq_lens=batch.seq_lens,
            seq_lens_cpu=batch.seq_lens_cpu,
            forward_mode=native_mode,
            spec_info=batch.spec_info,
        )


def unsupported(backend: Any) -> str:
    """Empty, or what about the backend is not covered."""
    from sglang.srt.layers.attention import dsa_backend

    if getattr(backend, "dsa_index_kpool", 1) > 1:
        return "pooled index keys (index_kpool > 1) are not covered"
    if getattr(dsa_backend, "_is_hip", False):
        return "ROCm is not covered"
    return ""
