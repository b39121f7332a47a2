"""The hooked methods: what happens at capture, inside a captured graph, at replay, and when something of ours fails.

At capture sglang makes its own metadata first; then a `Preparation` is made for that batch size. At replay it runs in
place of sglang's code, or has been recorded in the graph already and only points the backends at the right object. If
ours fails, sglang's per-backend code recomputes the same batch.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch

from nsa_plugin.adapters.base import Fallback, Host, Stage, Strategy
from nsa_plugin.adapters.sglang.attached import Attached
from nsa_plugin.adapters.sglang.capabilities import lacking, names
from nsa_plugin.adapters.sglang.compare import SpareBuffers, native_replay
from nsa_plugin.adapters.sglang.describe import batch_to_capture, batch_to_replay
from nsa_plugin.adapters.sglang.preparation import ENGINE, MODES, PATHS, Preparation
from nsa_plugin.core.metadata import same_buffer

logger = logging.getLogger("sglang.srt.plugins.nsa_plugin")
_recorded: Attached[list[Preparation]] = Attached("recorded")
"""What captured graphs of each backend may still run, after an undo too: its buffers must outlive them."""


def capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Path:
    """The hooks of one backend class. The subclasses say which backends and batches they are about."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._prepared: Attached[dict[Any, Preparation]] = Attached("prepared")
        self._spares = SpareBuffers()
        self._captured_off: set[str] = set()

    def hooks(self) -> dict[str, Callable[..., None]]:
        """Method of the class to the function that stands in for it; that gets the original method first."""
        return {method: getattr(self, ours) for method, ours in names().hooks.items()}

    def batch_to_capture(self, *arguments: Any, **keywords: Any) -> Any:
        """The batch in the arguments of `init_forward_metadata_capture_cuda_graph`."""
        raise NotImplementedError

    def batch_to_replay(self, *arguments: Any, **keywords: Any) -> Any:
        """The batch in the arguments of `init_forward_metadata_replay_cuda_graph`."""
        raise NotImplementedError

    def backends(self, owner: Any) -> Sequence[Any]:
        """The DSA backends that `owner`, the object whose method is hooked, prepares."""
        raise NotImplementedError

    def native_mode(self, owner: Any, batch: Any) -> Any:
        """sglang's ForwardMode for the metadata that `owner` makes of `batch`; None to leave it alone."""
        raise NotImplementedError

    def wide_table_is_unread(self, backend: Any) -> bool:
        """Whether nothing reads `page_table_1` in the forwards that the metadata is for."""
        return False

    def exact(self, owner: Any, batch: Any) -> bool:
        """Whether steps shall see the draft tokens before them."""
        return False

    def out_graph(
        self, original: Callable[..., None], owner: Any, forward_batch: Any, in_capture: bool = False
    ) -> None:
        """Stand in for `init_forward_metadata_out_graph`: before a capture, or before each replay."""
        if in_capture:
            original(owner, forward_batch, in_capture=True)
            self._captured(owner, forward_batch)
        elif not self._replayed(owner, forward_batch):
            original(owner, forward_batch, in_capture=False)

    def capture(self, original: Callable[..., None], owner: Any, *arguments: Any, **keywords: Any) -> None:
        """Stand in for `init_forward_metadata_capture_cuda_graph`: before a capture."""
        original(owner, *arguments, **keywords)
        self._captured(owner, self.batch_to_capture(*arguments, **keywords))

    def replay(self, original: Callable[..., None], owner: Any, *arguments: Any, **keywords: Any) -> None:
        """Stand in for `init_forward_metadata_replay_cuda_graph`: before each replay."""
        if not self._replayed(owner, self.batch_to_replay(*arguments, **keywords)):
            original(owner, *arguments, **keywords)

    def in_graph(self, original: Callable[..., None], owner: Any, forward_batch: Any) -> None:
        """Stand in for `init_forward_metadata_in_graph`: what is launched here becomes part of the captured graph."""
        original(owner, forward_batch)
        native_mode = self.native_mode(owner, forward_batch)
        preparation = self._find(owner, forward_batch, native_mode)
        if preparation is None or preparation.native or preparation.strategy != "graph":
            return
        try:
            preparation.record()
            if capturing():
                preparation.leave_to_graph()
                _recorded.setdefault(owner, []).append(preparation)
        except Exception as error:
            preparation.step_down()
            self._fell_back(native_mode, "capture", "graph", error)

    def switch(self, on: bool) -> list[str]:
        """Use sglang's own path from the next replay on, or ours again; returns what goes on as before."""
        stays: Counter[str] = Counter()
        for prepared in tuple(self._prepared.values()):
            for (native_mode, _), preparation in tuple(prepared.items()):
                if not preparation.switch(on):
                    stays[PATHS[MODES[native_mode.name]]] += 1
        lines = [
            f"{path}: {count} captured batch sizes keep the work that their CUDA graphs recorded; restart with "
            "NSA_PLUGIN_STRATEGY=off (share and copy can be switched at run time)"
            for path, count in sorted(stays.items())
            if not on
        ]
        if on:
            lines += [
                f"{path}: was captured while switched off; it takes a restart" for path in sorted(self._captured_off)
            ]
        return lines

    def undo(self) -> None:
        """Give every backend its own metadata back. Graphs that were captured go on with what they recorded."""
        for prepared in self._prepared.values():
            for preparation in prepared.values():
                preparation.undo()
        self._prepared.clear()

    def _find(self, owner: Any, batch: Any, native_mode: Any) -> Preparation | None:
        prepared = self._prepared.get(owner)
        return None if prepared is None else prepared.get((native_mode, batch.batch_size))

    def _replayed(self, owner: Any, batch: Any) -> bool:
        """Prepare the metadata of a live batch; False to leave it to sglang."""
        native_mode = self.native_mode(owner, batch)
        preparation = self._find(owner, batch, native_mode)
        if preparation is None:
            return False
        try:
            preparation.replay(batch)
        except Exception as error:
            preparation.fail()
            native_replay(self.backends(owner), batch, native_mode)  # raises what is sglang's own to raise
            self._fell_back(native_mode, "replay", preparation.strategy, error)
        return True

    def _captured(self, owner: Any, batch: Any) -> None:
        """Take over a batch size for which sglang has just made its own metadata."""
        native_mode = self.native_mode(owner, batch)
        if native_mode is not None:
            self._take_over(owner, batch, native_mode)

    def _take_over(self, owner: Any, batch: Any, native_mode: Any) -> None:
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
        strategies = usable(self._host)
        if not strategies:
            self._captured_off.add(path)
            if known is not None:
                known.undo()
                native_replay(backends, batch, native_mode)
        for strategy in strategies:
            if known is not None and known.strategy != strategy:
                continue  # what the backends hold now was made for another strategy
            preparation = known
            try:
                if preparation is None:
                    drop_wide_table = strategy != "copy" and self.wide_table_is_unread(backends[0])
                    exact = strategy != "copy" and self.exact(owner, batch)
                    spares = self._spares if self._host.verify else None
                    preparation = Preparation(
                        self._host, backends, batch, native_mode, strategy, drop_wide_table, exact, spares
                    )
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
                why = not_graph() if self._host.strategies[0] == "graph" and not self._host.verify else ""
                note = preparation.note + (f", not graph: {why}" if why else "")
                self._host.using(logger, ENGINE, path, strategy + note)
                if known is None:
                    self._host.buffers(ENGINE, path, strategy, preparation.size)
                return

    def _fell_back(self, native_mode: Any, stage: Stage, strategy: str, error: Exception) -> None:
        path = PATHS[MODES[native_mode.name]]
        self._host.fell_back(logger, Fallback(ENGINE, path, stage, strategy, error))


class MultiStepDraft(Path):
    """`DeepseekSparseAttnMultiStepBackend`: all draft backends at once, always as DECODE."""

    batch_to_capture = staticmethod(lambda forward_batch: forward_batch)
    batch_to_replay = staticmethod(lambda forward_batch, bs: forward_batch)  # its batch_size is bs

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

    def exact(self, owner: Any, batch: Any) -> bool:
        """If it was asked for, and every step has tokens of its own to see: a chain, with an indexer run per step.

        sglang has reserved the slots of the draft tokens, and its token table has their columns, before it drafts
        (`speculative.eagle_worker_common.prepare_for_draft` reads them there).
        """
        if not self._host.exact_step_lengths:
            return False
        problem = ""
        if getattr(owner, "topk", 1) != 1:
            problem = "the draft is a tree (--speculative-eagle-topk above 1)"
        elif getattr(batch.spec_info, "dsa_topk_indices", None) is not None:
            problem = "all steps use the top-k indices of one (index_share_for_mtp_iteration)"
        elif any(same_buffer(lengths, batch.seq_lens) for lengths in self._lengths(owner, batch.batch_size)):
            problem = "all steps read the lengths of the batch itself, of which there is one set"
        if problem:
            self._host.using(logger, ENGINE, PATHS[MODES["DECODE"]], f"with sglang's own step lengths: {problem}")
        return not problem

    def _lengths(self, owner: Any, batch_size: int) -> list[torch.Tensor]:
        """The lengths that each backend reads. Up to 0.5.14 they are the runner's own where those are int32."""
        held = [backend.decode_cuda_graph_metadata[batch_size] for backend in self.backends(owner)]
        return [metadata.cache_seqlens_int32 for metadata in held]

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

    batch_to_capture = staticmethod(batch_to_capture)
    batch_to_replay = staticmethod(batch_to_replay)

    def __init__(self, host: Host) -> None:
        super().__init__(host)
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


def usable(host: Host) -> tuple[Strategy, ...]:
    """Strategies to try. With verification not `graph`: recorded work runs when a difference can't be repaired any more."""
    no_graph = host.verify or not_graph()
    return tuple(strategy for strategy in host.strategies if strategy != "graph" or not no_graph)


def not_graph() -> str:
    """Empty, or why sglang gives no opportunity to record the work in its graphs."""
    return "" if "in_graph" in names().hooks.values() else lacking("graph")


def unsupported(backend: Any) -> str:
    """Empty, or what about the backend is not covered."""
    if getattr(backend, "dsa_index_kpool", 1) > 1:
        return "pooled index keys (index_kpool > 1) are not covered"
    if getattr(import_module(names().module), "_is_hip", False):
        return "ROCm is not covered"
    return ""
