"""The hooked methods: what happens at capture, inside a captured graph, at replay, and when something of ours fails.

At capture sglang makes its own metadata first; then a `Preparation` is made for that batch size. At replay it runs in
place of sglang's code, or has been recorded in the graph already and only points the backends at the right object. If
ours fails, sglang's per-backend code recomputes the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch

from nsa_plugin.adapters.attached import Attached
from nsa_plugin.adapters.base import Host, Strategy
from nsa_plugin.adapters.reporting import Stage
from nsa_plugin.adapters.sglang.compare import native_replay
from nsa_plugin.adapters.sglang.glue import GlueGraphs
from nsa_plugin.adapters.sglang.preparation import Preparation
from nsa_plugin.adapters.sglang.releases import lacking, names
from nsa_plugin.adapters.sglang.reports import path, report
from nsa_plugin.adapters.verification import SpareBuffers

_recorded: Attached[dict[Any, list[Preparation]]] = Attached("recorded")
"""What captured graphs of each backend may still run, by mode and batch size, after an undo too: its buffers must outlive
them. It goes when sglang has captured that size anew over new buffers."""


def capturing() -> bool:
    """Whether the current stream of the device that torch runs on (CUDA, XPU, …) is being captured into a graph."""
    device: Any = torch.get_device_module()
    is_capturing: Callable[[], bool] = getattr(device, "is_current_stream_capturing", lambda: False)
    return bool(device.is_available()) and is_capturing()


class Path:
    """The hooks of one backend class. The subclasses say which backends and batches they are about."""

    def __init__(self, host: Host, glue: GlueGraphs) -> None:
        self._host, self._glue = host, glue
        self._prepared: Attached[dict[Any, Preparation]] = Attached("prepared")
        self._captured_off: Attached[set[Any]] = Attached("captured_off")
        self._spares = SpareBuffers()
        self._undone = False

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

    def out_graph(self, original: Callable[..., None], owner: Any, *arguments: Any, **keywords: Any) -> None:
        """Stand in for `init_forward_metadata_out_graph`: before a capture, or before each replay."""
        batch = argument("forward_batch", 0, arguments, keywords)
        if argument("in_capture", 1, arguments, keywords):
            original(owner, *arguments, **keywords)
            self._captured(owner, batch)
        elif not self._replayed(owner, batch):
            original(owner, *arguments, **keywords)

    def capture(self, original: Callable[..., None], owner: Any, *arguments: Any, **keywords: Any) -> None:
        """Stand in for `init_forward_metadata_capture_cuda_graph`: before a capture."""
        original(owner, *arguments, **keywords)
        self._captured(owner, self.batch_to_capture(*arguments, **keywords))

    def replay(self, original: Callable[..., None], owner: Any, *arguments: Any, **keywords: Any) -> None:
        """Stand in for `init_forward_metadata_replay_cuda_graph`: before each replay."""
        if not self._replayed(owner, self.batch_to_replay(*arguments, **keywords)):
            original(owner, *arguments, **keywords)

    def in_graph(self, original: Callable[..., None], owner: Any, *arguments: Any, **keywords: Any) -> None:
        """Stand in for `init_forward_metadata_in_graph`: what is launched here becomes part of the captured graph."""
        original(owner, *arguments, **keywords)
        batch = argument("forward_batch", 0, arguments, keywords)
        native_mode = self.native_mode(owner, batch)
        preparation = self._find(owner, batch, native_mode)
        if preparation is None or preparation.native or preparation.strategy != "graph":
            return
        try:
            preparation.record()
            if capturing():
                preparation.leave_to_graph()
                self._keep(owner, (native_mode, batch.batch_size), preparation)
        except Exception as error:
            preparation.step_down()
            self._fell_back(native_mode, "capture", "graph", error)

    def captured_off(self) -> list[str]:
        """What was captured while switched off, and stays with sglang until it is captured anew; one line for each path."""
        off = {path(native_mode) for keys in self._captured_off.values() for native_mode, _ in tuple(keys)}
        return [f"{name}: was captured while switched off; it takes a new capture" for name in sorted(off)]

    def undo(self) -> list[str]:
        """Leave every backend to sglang, its captured graphs included; returns paths whose graphs have recorded our work.

        Those graphs go on with it. What does not go, because another plugin has wrapped it, does nothing from now on.
        """
        self._undone = True
        stays = set()
        for prepared in self._prepared.values():
            for (native_mode, _), preparation in tuple(prepared.items()):
                preparation.undo()
                self._uncount(native_mode, preparation)
                if preparation.recorded:
                    stays.add(path(native_mode))
        self._prepared.clear()
        self._captured_off.clear()
        return sorted(stays)

    def _keep(self, owner: Any, key: Any, preparation: Preparation) -> None:
        """Let what a graph has just recorded live as long as that graph may."""
        kept = _recorded.setdefault(owner, {})
        alive = [before for before in kept.get(key, ()) if before is not preparation and not before.is_outdated()]
        kept[key] = [*alive, preparation]

    def _find(self, owner: Any, batch: Any, native_mode: Any) -> Preparation | None:
        prepared = self._prepared.get(owner)
        return None if prepared is None else prepared.get((native_mode, batch.batch_size))

    def _replayed(self, owner: Any, batch: Any) -> bool:
        """Prepare the metadata of a live batch; False to leave it to sglang."""
        native_mode = self.native_mode(owner, batch)
        preparation = self._find(owner, batch, native_mode)
        if preparation is None:
            return False
        self._glue.serves(preparation)
        try:
            if not (self._glue.running() and capturing()) and preparation.look_at_switch():
                preparation.replay(batch)
                return True
        except Exception as error:
            preparation.fail()
            native_replay(self.backends(owner), batch, native_mode)  # raises what is sglang's own to raise
            self._fell_back(native_mode, "replay", preparation.strategy, error)
            return True
        preparation.replay_natively(batch)
        return True

    def _captured(self, owner: Any, batch: Any) -> None:
        """Take over a batch size for which sglang has just made its own metadata."""
        native_mode = self.native_mode(owner, batch)
        if native_mode is not None and not self._undone:
            self._take_over(owner, batch, native_mode)

    def _take_over(self, owner: Any, batch: Any, native_mode: Any) -> None:
        prepared = self._prepared.setdefault(owner, {})
        captured_off = self._captured_off.setdefault(owner, set())
        key = (native_mode, batch.batch_size)
        backends = self.backends(owner)
        said = report(self._host, native_mode)
        if problem := unsupported(backends[0]):
            said.left_alone(problem)
            return
        asked = self._host.strategies
        captured_off.discard(key)
        known = prepared.pop(key, None)
        if known is not None and not known.is_current():
            self._uncount(native_mode, known)
            known = None
        if not asked:
            captured_off.add(key)
            if known is not None:
                known.retire()
                self._uncount(native_mode, known)
                native_replay(backends, batch, native_mode)
            return
        for strategy in usable(asked, self._host.verify):
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
                    preparation.discard()
                if known is not None:
                    self._uncount(native_mode, known)
                    known = None
                native_replay(backends, batch, native_mode)
                self._fell_back(native_mode, "capture", strategy, error)
            else:
                prepared[key] = preparation
                why = not_graph() if asked[0] == "graph" and not self._host.verify else ""
                note = preparation.note + (f", not graph: {why}" if why else "")
                said.using(strategy + note)
                if known is None:
                    said.buffers(strategy, preparation.size)
                return

    def _uncount(self, native_mode: Any, preparation: Preparation) -> None:
        report(self._host, native_mode).buffers(preparation.bound_as, -preparation.size)

    def _fell_back(self, native_mode: Any, stage: Stage, strategy: str, error: Exception) -> None:
        report(self._host, native_mode).fell_back(stage, strategy, error)


def usable(asked: Sequence[Strategy], verify: int) -> tuple[Strategy, ...]:
    """Strategies to try. With verification not `graph`: recorded work runs when a difference can't be repaired any more."""
    no_graph = verify or not_graph()
    return tuple(strategy for strategy in asked if strategy != "graph" or not no_graph)


def not_graph() -> str:
    """Empty, or why sglang gives no opportunity to record the work in its graphs."""
    if "in_graph" not in names().hooks.values():
        return lacking("graph")
    from sglang.srt.environ import envs

    overlap = getattr(envs, "SGLANG_ENABLE_OVERLAP_PLAN_STREAM", None)
    if overlap is not None and overlap.get():
        return (
            "SGLANG_ENABLE_OVERLAP_PLAN_STREAM: sglang prepares on another stream, and may overwrite the lengths of a batch "
            "before its graph reads them"
        )
    return ""


def unsupported(backend: Any) -> str:
    """Empty, or what about the backend is not covered."""
    if getattr(backend, "dsa_index_kpool", 1) > 1:
        return "pooled index keys (index_kpool > 1) are not covered"
    if getattr(import_module(names().module), "_is_hip", False):
        return "ROCm is not covered"
    return ""


def argument(name: str, index: int, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """An argument of a hooked method, however it was passed; None if it was not."""
    return arguments[index] if index < len(arguments) else keywords.get(name)
