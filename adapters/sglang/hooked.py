"""At capture and at every replay: what the hooks of a backend class do.

At capture sglang makes its own metadata first. Then a `Preparation` is made for that batch size. At a replay it runs in
place of sglang's code. If a captured graph does the work, it only points the backends at the right object. If ours fails,
sglang's per-backend code recomputes the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from nsa_plugin.adapters.attached import Attached
from nsa_plugin.adapters.base import Host, Strategy
from nsa_plugin.adapters.reporting import PathReport, Stage
from nsa_plugin.adapters.sglang.glue import GlueGraphs
from nsa_plugin.adapters.sglang.own_path import native_replay
from nsa_plugin.adapters.sglang.preparation import Preparation
from nsa_plugin.adapters.sglang.refusals import not_graph, repairs, unsupported, usable
from nsa_plugin.adapters.sglang.reports import ENGINE, logger, path
from nsa_plugin.adapters.verification import Afterwards, SpareBuffers

_recorded: Attached[dict[Any, list[Preparation]]] = Attached("recorded")
"""Preparations that captured graphs may still run, for each backend by mode and batch size; an undo keeps them.

The graphs read their buffers. A preparation goes when sglang has captured its size anew over new buffers."""


def capturing() -> bool:
    """Whether the current stream of the device that torch runs on (CUDA, XPU, …) is being captured into a graph."""
    device: Any = torch.get_device_module()
    is_capturing: Callable[[], bool] = getattr(device, "is_current_stream_capturing", lambda: False)
    return bool(device.is_available()) and is_capturing()


class HookedBackend:
    """What the hooks of one backend class do. A subclass says which backends and batches they are about."""

    def __init__(self, host: Host, glue: GlueGraphs) -> None:
        self._host, self._glue = host, glue
        self._prepared: Attached[dict[Any, Preparation]] = Attached("prepared")
        self._captured_off: Attached[set[Any]] = Attached("captured_off")
        self._spares = SpareBuffers()
        self._afterwards: Attached[Afterwards] = Attached("afterwards")
        self._undone = False

    def backends(self, owner: Any) -> Sequence[Any]:
        """The backends that `owner` prepares. `owner` is the object whose method is hooked."""
        raise NotImplementedError

    def native_mode(self, owner: Any, batch: Any) -> Any:
        """sglang's ForwardMode of the metadata that `owner` makes for `batch`, or a row of a table that has it.

        None if the batch is left alone.
        """
        raise NotImplementedError

    def path(self, native_mode: Any) -> str:
        """The path that prepares such batches, as reports name it."""
        return path(native_mode)

    def report(self, native_mode: Any) -> PathReport:
        """The reports of that path."""
        return self._host.path(ENGINE, self.path(native_mode), logger)

    def unsupported(self, owner: Any, batch: Any, native_mode: Any) -> str:
        """Empty, or what about `owner` or the captured batch is not covered."""
        return unsupported(self.backends(owner)[0])

    def strategies(self) -> tuple[Strategy, ...]:
        """Strategies that the settings name, best first; empty while the plugin is off."""
        return self._host.strategies

    def by_sglang(self, owner: Any, batch: Any, native_mode: Any) -> None:
        """Let sglang's own code compute the metadata of a batch."""
        native_replay(self.backends(owner), batch, native_mode)

    def preparation(self, *arguments: Any) -> Preparation:
        """What prepares a captured batch size; takes what `Preparation` takes."""
        return Preparation(*arguments)

    def wide_table_is_unread(self, backend: Any) -> bool:
        """Whether nothing reads `page_table_1` in the forwards that the metadata is for."""
        return False

    def exact(self, owner: Any, batch: Any) -> bool:
        """Whether steps shall see the draft tokens before them."""
        return False

    def share_tables(self, backends: Sequence[Any], batch: Any) -> None:
        """Let the backends share page tables that sglang has just made for each of them."""

    def captured(self, owner: Any, batch: Any) -> None:
        """Take over a batch that is about to be captured, for which sglang has just made its own metadata."""
        native_mode = self.native_mode(owner, batch)
        self._settle(owner)
        if native_mode is not None and not self._undone:
            self._take_over(owner, batch, native_mode)

    def record(self, owner: Any, batch: Any) -> None:
        """Issue the work within a capture: what is launched here becomes part of the CUDA graph."""
        native_mode = self.native_mode(owner, batch)
        preparation = self._find(owner, batch, native_mode)
        if preparation is None or preparation.strategy != "graph":
            return
        if preparation.native:
            if capturing():
                preparation.leave_to_host()
            return
        try:
            if capturing():  # before: the graph also runs what was issued until an error
                self._keep(owner, (native_mode, batch.batch_size), preparation)
            preparation.record()
            if capturing():
                preparation.leave_to_graph()
        except Exception as error:
            preparation.step_down()
            self._fell_back(native_mode, "capture", "graph", error)

    def replayed(self, owner: Any, batch: Any) -> bool:
        """Prepare the metadata of a live batch before its replay; False if that is left to sglang."""
        native_mode = self.native_mode(owner, batch)
        self._settle(owner)
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
            self.by_sglang(owner, batch, native_mode)  # raises what is sglang's own to raise
            self._fell_back(native_mode, "replay", preparation.strategy, error)
            return True
        preparation.replay_natively(batch)
        return True

    def captured_off(self) -> list[str]:
        """One line for each path that was captured while switched off: it stays with sglang until it is captured anew."""
        off = {self.path(native_mode) for keys in self._captured_off.values() for native_mode, _ in tuple(keys)}
        return [f"{name}: was captured while switched off; it takes a new capture" for name in sorted(off)]

    def undo(self) -> list[str]:
        """Leave every backend to sglang. Returns the paths whose graphs have recorded our work and go on with it.

        A hook that stays, because another plugin has wrapped it, does nothing from now on.
        """
        self._undone = True
        stays = set()
        for prepared in self._prepared.values():
            for (native_mode, _), preparation in tuple(prepared.items()):
                preparation.undo()
                self._uncount(native_mode, preparation)
                if preparation.recorded:
                    stays.add(self.path(native_mode))
        self._prepared.clear()
        self._afterwards.clear()
        self._captured_off.clear()
        return sorted(stays)

    def _keep(self, owner: Any, key: Any, preparation: Preparation) -> None:
        """Let what a graph has just recorded live as long as that graph may."""
        kept = _recorded.setdefault(owner, {})
        alive = [before for before in kept.get(key, ()) if before is not preparation and not before.is_outdated()]
        kept[key] = [*alive, preparation]

    def _settle(self, owner: Any) -> None:
        """Compare what the graph that ran last has written, before anything writes there again."""
        afterwards = self._afterwards.get(owner)
        if afterwards is not None and not capturing():
            afterwards.settle()

    def _find(self, owner: Any, batch: Any, native_mode: Any) -> Preparation | None:
        prepared = self._prepared.get(owner)
        return None if prepared is None else prepared.get((native_mode, batch.batch_size))

    def _take_over(self, owner: Any, batch: Any, native_mode: Any) -> None:
        prepared = self._prepared.setdefault(owner, {})
        captured_off = self._captured_off.setdefault(owner, set())
        key = (native_mode, batch.batch_size)
        backends = self.backends(owner)
        said = self.report(native_mode)
        if problem := self.unsupported(owner, batch, native_mode):
            said.left_alone(problem)
            return
        asked = self.strategies()
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
                self.by_sglang(owner, batch, native_mode)
            return
        for strategy in usable(asked, self._host):
            if known is not None and known.strategy != strategy:
                continue  # what the backends hold now was made for another strategy
            preparation = known
            try:
                if preparation is None:
                    self.share_tables(backends, batch)
                    drop_wide_table = strategy != "copy" and self.wide_table_is_unread(backends[0])
                    exact = strategy != "copy" and self.exact(owner, batch)
                    afterwards = self._checks(owner) if self._host.verify else None
                    preparation = self.preparation(
                        self._host, backends, batch, native_mode, strategy, drop_wide_table, exact, afterwards
                    )
                    preparation.bind()
                preparation.capture(batch)
                if strategy == "graph":
                    preparation.rehearse()
            except Exception as error:
                if known is not None:
                    known.retire()  # not discard: other graphs of this size read its buffers
                    self._uncount(native_mode, known)
                    known = None
                elif preparation is not None:
                    preparation.discard()
                self.by_sglang(owner, batch, native_mode)
                self._fell_back(native_mode, "capture", strategy, error)
            else:
                prepared[key] = preparation
                why = not_graph() if asked[0] == "graph" and not repairs(self._host) else ""
                note = preparation.note + (f", not graph: {why}" if why else "")
                said.using(strategy + note)
                if known is None:
                    said.buffers(strategy, preparation.size)
                return

    def _checks(self, owner: Any) -> Afterwards:
        """Where the replays of `owner` are compared. What waits for a graph has buffers of its own."""
        spares = self._spares if repairs(self._host) else SpareBuffers()
        return self._afterwards.setdefault(owner, Afterwards(spares))

    def _uncount(self, native_mode: Any, preparation: Preparation) -> None:
        self.report(native_mode).buffers(preparation.bound_as, -preparation.size)

    def _fell_back(self, native_mode: Any, stage: Stage, strategy: str, error: Exception) -> None:
        self.report(native_mode).fell_back(stage, strategy, error)
