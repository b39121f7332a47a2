"""The hooked methods: what happens at capture, at replay, and when something of ours fails.

At capture sglang makes its own metadata first; then a `Preparation` is made for that batch size. At replay the
preparation runs in place of sglang's code. If ours fails, sglang's per-backend code recomputes the same batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from nsa_plugin.adapters.base import Fallback, Host
from nsa_plugin.adapters.sglang import derived
from nsa_plugin.adapters.sglang.describe import consumer, describe, geometry
from nsa_plugin.core.batch import ForwardMode
from nsa_plugin.core.plan import PlanStrategy

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


class Preparation:
    """How the metadata of one captured batch size of some DSA backends is prepared at each replay.

    Making one changes nothing; `bind` does.

    Parameters
    ----------
    host : Host
    backends : sequence of DeepseekSparseAttnBackend
        The draft backends, or the one of target verify or draft extend. Each holds sglang's own metadata for the batch.
    batch : ForwardBatch
        The captured batch.
    native_mode : sglang ForwardMode
        What sglang's own code takes the batch for.
    strategy : "copy" or "share"
    """

    def __init__(
        self, host: Host, backends: Sequence[Any], batch: Any, native_mode: Any, strategy: PlanStrategy
    ) -> None:
        first, mode = backends[0], MODES[native_mode.name]
        self.strategy = strategy
        self._backends = tuple(backends)
        self._batch_size = batch.batch_size
        self._own = tuple(backend.decode_cuda_graph_metadata[self._batch_size] for backend in backends)
        self._used = self._own if strategy == "copy" else self._own[:1] * len(backends)
        self._describe = host.describe(
            ENGINE, batch, lambda batch: describe(batch, backend=first, mode=mode, num_steps=len(backends))
        )
        self._run = host.plan(
            ENGINE,
            PATHS[mode],
            self._describe(batch),
            geometry(first, self._own[0]),
            [consumer(metadata) for metadata in self._used],
            strategy,
            derived.refresher(first, self._own[0], native_mode, self._batch_size),
        )

    def bind(self) -> None:
        """Point the backends at the buffers that the strategy uses."""
        self._point(self._used)

    def undo(self) -> None:
        """Point the backends at their own buffers again."""
        if self.is_current():
            self._point(self._own)

    def is_current(self) -> bool:
        """Whether the backends still hold the metadata that this was made for."""
        return all(
            backend.decode_cuda_graph_metadata.get(self._batch_size) is metadata
            for backend, metadata in zip(self._backends, self._used, strict=True)
        )

    def replay(self, batch: Any) -> None:
        """Prepare the metadata of a live batch."""
        self._run(self._describe(batch))
        for backend, metadata in zip(self._backends, self._used, strict=True):
            backend.set_dsa_prefill_impl(forward_batch=None)
            backend.forward_metadata = metadata

    def _point(self, used: Sequence[Any]) -> None:
        for backend, metadata in zip(self._backends, used, strict=True):
            backend.decode_cuda_graph_metadata[self._batch_size] = metadata
            backend.forward_metadata = metadata


class Path:
    """One hooked `init_forward_metadata_out_graph`. The subclasses say whose."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._prepared: WeakKeyDictionary[Any, dict[Any, Preparation]] = WeakKeyDictionary()
        self._failed: WeakKeyDictionary[Any, set[Any]] = WeakKeyDictionary()

    def backends(self, owner: Any) -> Sequence[Any]:
        """The DSA backends that `owner`, the object whose method is hooked, prepares."""
        raise NotImplementedError

    def native_mode(self, owner: Any, batch: Any) -> Any:
        """sglang's ForwardMode for the metadata that `owner` makes of `batch`; None to leave it alone."""
        raise NotImplementedError

    def __call__(self, original: Callable[..., None], owner: Any, forward_batch: Any, in_capture: bool = False) -> None:
        """Stand in for `init_forward_metadata_out_graph`."""
        native_mode = self.native_mode(owner, forward_batch)
        if native_mode is None:
            original(owner, forward_batch, in_capture=in_capture)
            return
        key = (native_mode, forward_batch.batch_size)
        if in_capture:
            original(owner, forward_batch, in_capture=True)
            self._capture(owner, forward_batch, native_mode, key)
            return
        preparation = self._prepared.get(owner, {}).get(key)
        if preparation is None:
            original(owner, forward_batch, in_capture=False)
        elif key in self._failed.get(owner, ()):
            native_replay(self.backends(owner), forward_batch, native_mode)
        else:
            try:
                preparation.replay(forward_batch)
            except Exception as error:
                self._failed.setdefault(owner, set()).add(key)
                native_replay(self.backends(owner), forward_batch, native_mode)
                self._fell_back(native_mode, "replay", preparation.strategy, error)

    def undo(self) -> None:
        """Give every backend its own metadata back."""
        for prepared in self._prepared.values():
            for preparation in prepared.values():
                preparation.undo()
        self._prepared.clear()
        self._failed.clear()

    def _capture(self, owner: Any, batch: Any, native_mode: Any, key: Any) -> None:
        prepared = self._prepared.setdefault(owner, {})
        if key in prepared and prepared[key].is_current():
            return
        prepared.pop(key, None)
        backends = self.backends(owner)
        path = PATHS[MODES[native_mode.name]]
        if problem := unsupported(backends[0]):
            self._host.using(logger, ENGINE, path, f"off ({problem})")
            return
        for strategy in self._host.strategies:
            preparation = None
            try:
                preparation = Preparation(self._host, backends, batch, native_mode, strategy)
                preparation.bind()
                preparation.replay(batch)
            except Exception as error:
                if preparation is not None:
                    preparation.undo()
                native_replay(backends, batch, native_mode)
                self._fell_back(native_mode, "capture", strategy, error)
            else:
                prepared[key] = preparation
                self._host.using(logger, ENGINE, path, strategy)
                return

    def _fell_back(self, native_mode: Any, stage: str, strategy: str, error: Exception) -> None:
        path = PATHS[MODES[native_mode.name]]
        self._host.fell_back(logger, Fallback(ENGINE, path, stage, strategy, error))


class MultiStepDraft(Path):
    """`DeepseekSparseAttnMultiStepBackend`: all draft backends at once, always as DECODE."""

    def backends(self, owner: Any) -> Sequence[Any]:
        """The draft backends."""
        backends: Sequence[Any] = owner.attn_backends
        return backends

    def native_mode(self, owner: Any, batch: Any) -> Any:
        """DECODE, if there is a draft backend at all."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode as NativeMode

        return NativeMode.DECODE if owner.attn_backends else None


class SingleBackend(Path):
    """`DeepseekSparseAttnBackend`: target verify and draft extend. Its decode belongs to no draft and is left alone."""

    def backends(self, owner: Any) -> Sequence[Any]:
        """The backend itself."""
        return (owner,)

    def native_mode(self, owner: Any, batch: Any) -> Any:
        """The batch's mode, if it is one of the two."""
        mode = batch.forward_mode
        return mode if mode.name in ("TARGET_VERIFY", "DRAFT_EXTEND_V2") else None


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
