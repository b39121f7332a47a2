"""Made at capture, runs at every replay: how the metadata of one captured batch size is prepared, verified, switched off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch

from nsa_plugin.adapters.base import Host, Strategy
from nsa_plugin.adapters.reporting import PathReport
from nsa_plugin.adapters.sglang import derived
from nsa_plugin.adapters.sglang.compare import differing_values, spare_metadata
from nsa_plugin.adapters.sglang.describe import consumer, describe, geometry
from nsa_plugin.adapters.sglang.own_path import native_replay
from nsa_plugin.adapters.sglang.refusals import repairs
from nsa_plugin.adapters.sglang.rehearsal import rehearse
from nsa_plugin.adapters.sglang.releases import generation
from nsa_plugin.adapters.sglang.reports import MODES, report
from nsa_plugin.adapters.side_by_side import Refresh, side_by_side
from nsa_plugin.adapters.verification import Afterwards, SpareBuffers, Verification, shadow, snapshot
from nsa_plugin.core.batch import BatchDescriptor, Geometry
from nsa_plugin.core.metadata import StepMetadata, planes_of


class Preparation:
    """How the metadata of one captured batch size of some DSA backends is prepared at each replay.

    The constructor changes nothing in sglang; `bind` does.

    Parameters
    ----------
    host : Host
    backends : sequence of DeepseekSparseAttnBackend
        The draft backends, or the one of target verify or draft extend. Each holds sglang's own metadata for the batch.
    batch : ForwardBatch
        The captured batch: its tensors are the runner's static buffers.
    native_mode : sglang ForwardMode
        The mode that sglang's own code prepares the batch in.
    strategy : "graph", "share" or "copy"
    drop_wide_table : bool
        Whether shared metadata goes without `page_table_1`, because nothing reads it.
    exact : bool
        Whether draft step i sees i + 1 tokens more than sglang's own: itself and the draft tokens before it.
    afterwards : Afterwards or None
        Buffers that sglang's own code writes into when a replay is verified; None: no replay is verified.

    Attributes
    ----------
    strategy : str
    bound_as : str
        The strategy before any step down: its buffers are counted under that.
    recorded : bool
        Whether a captured graph does the work.
    replay : callable(batch)
        Prepares the metadata of a live batch. It has no part for a feature that is off: such a feature costs nothing.
    replay_natively : callable(batch)
        Lets sglang's own per-backend code do that, into the buffers that captured graphs read.
    note : str
        More to say about the strategy in the log.
    size : int
        Bytes of the buffers.
    """

    def __init__(
        self, host: Host, backends: Sequence[Any], batch: Any, native_mode: Any, strategy: Strategy,
        drop_wide_table: bool, exact: bool, afterwards: Afterwards | None,
    ) -> None:  # fmt: skip
        first = backends[0]
        self.strategy = self.bound_as = strategy
        self.recorded = self._failed = self._lacking = False
        self._dispatch = f"set_{generation().prefix}_prefill_impl"
        self._host, self._backends, self._native_mode = host, tuple(backends), native_mode
        self._batch_size = batch.batch_size
        self._stores = tuple(self._store(backend) for backend in backends)
        self._own = tuple(store[self._batch_size] for store in self._stores)
        self._used = self._buffers(drop_wide_table, exact)
        kept, *others = self._buffers(drop_wide_table=False, exact=exact)
        self._given_back = (kept, *(metadata if strategy == "copy" else replace(metadata) for metadata in others))
        flag = torch.ones(1, dtype=torch.int32, device=first.req_to_token.device)
        self._enabled, self._is_enabled = flag if strategy == "graph" else None, True
        self.note = self._noted(exact)
        if afterwards is not None:
            what = (
                "not graph, which runs when it is too late to repair"
                if repairs(host)
                else "what graphs did, afterwards"
            )
            self.note += f", verified (every {host.verify} replays; {what})"
        self._offsets = self._length_offsets(batch, exact)
        self._report = self._reports()
        self._describe = self._report.describe(batch, self._describer(exact))
        self._static = self._describe(batch)
        self._geometry = self._sizes()
        consumers = [self._consumer(index) for index in range(len(self._used))]
        self._run = host.plan(
            self._static,
            self._geometry,
            consumers,
            "copy" if strategy == "copy" else "share",
            self._refresher(exact),
            self._enabled,
        )
        self._observe = self._report.observer(strategy, self._static)
        self._afterwards, self._spares = afterwards, dict[int, Any]()
        if afterwards is not None:
            self._make_spares(afterwards.spares)
        views = {view.data_ptr(): view.numel() * view.element_size() for step in consumers for view in planes_of(step)}
        self.size = sum(views.values())
        self._choose()

    def bind(self) -> None:
        """Point the backends at the buffers that the strategy uses."""
        self._hand_out(self._used)

    def undo(self) -> None:
        """Leave the backends to sglang, with metadata in the buffers that captured graphs read.

        With `share` these are the first backend's. No graph reads the other backends' own.
        """
        if self.is_current():
            self._hand_out(self._given_back)

    def retire(self) -> None:
        """Undo, and let what graphs have recorded do nothing from now on."""
        self._obey(False)
        self.undo()

    def discard(self) -> None:
        """Give every backend the metadata that sglang made for it, after a capture that failed."""
        if self.is_current():
            self._hand_out(self._own)

    def is_outdated(self) -> bool:
        """Whether sglang has made new CUDA-graph buffers since. Nobody reads the old ones any more."""
        return any(
            self._store(backend) is not store for backend, store in zip(self._backends, self._stores, strict=True)
        )

    def is_current(self) -> bool:
        """Whether the backends still hold the metadata that this was made for."""
        return all(
            self._store(backend).get(self._batch_size) is metadata
            for backend, metadata in zip(self._backends, self._used, strict=True)
        )

    def capture(self, batch: Any) -> None:
        """Take the static buffers of a runner that is about to capture, and prepare its batch.

        This capture has to record anew what an earlier one recorded.
        """
        self.recorded = False
        self._choose()
        self._static = self._describe(batch)
        self._obey(True)
        self._run(self._static)
        self._point()

    def record(self) -> None:
        """Issue the work. A stream that is being captured records it."""
        self._run(self._static)

    def leave_to_graph(self) -> None:
        """Do nothing before replays from now on: a captured graph does the work, and none over these buffers lacks it."""
        self.recorded = not self._lacking
        self._choose()

    def leave_to_host(self) -> None:
        """Do the work before replays for good: a captured graph lacks it, and which of several is replayed is not known."""
        self.recorded, self._lacking = False, True
        self._choose()

    def step_down(self) -> None:
        """Do the work before replays from now on: it could not be recorded."""
        self.strategy, self.recorded = "share", False
        self._choose()

    def fail(self) -> None:
        """Leave the preparation to sglang's own code from now on."""
        self._failed = True

    @property
    def native(self) -> bool:
        """Whether sglang's own code prepares, because ours failed or is switched off."""
        return self._failed or not self._host.on

    def look_at_switch(self) -> bool:
        """Whether ours prepares the next replay. Work in a graph obeys from here on, in stream order."""
        on = not self.native
        self._obey(on)
        return on

    def rehearse(self) -> None:
        """Record the work in a graph that is thrown away. It raises what the real capture would raise, before that begins."""
        rehearse(lambda: self._run(self._static))

    def _obey(self, on: bool) -> None:
        """Write the flag that recorded work reads, if it is not what it should be."""
        if self._enabled is not None and self._is_enabled is not on:
            self._enabled.fill_(int(on))
            self._is_enabled = on

    def _choose(self) -> None:
        """Compose `replay` and `replay_natively`."""
        steps = len(self._backends)
        ours = self._replay_recorded if self.recorded else self._replay_before
        call = self._report.instrument(ours, self.strategy, steps)
        if self._afterwards is not None:
            self._verification = Verification(self._report, self.strategy, self._host.verify)
            call = self._verification.after(call, self._expect if self.recorded else self._verify)
        self.replay = call
        self.replay_natively = self._report.instrument(self._natively, "off", steps)

    def _replay_recorded(self, batch: Any) -> None:
        if self._backends[0].forward_metadata is not self._used[0]:
            self._point()
        if self._observe is not None:
            self._observe(self._describe(batch))

    def _replay_before(self, batch: Any) -> None:
        live = self._describe(batch)
        self._run(live)
        if self._backends[0].forward_metadata is not self._used[0]:
            self._point()
        if self._observe is not None:
            self._observe(live)

    def _natively(self, batch: Any) -> None:
        native_replay(self._backends, batch, self._native_mode)

    def _verify(self, batch: Any) -> None:
        """Compare what is there with sglang's own values."""
        live = self._describe(batch)
        self._verification.settle(
            self._differences(batch, live),
            lambda: self._natively(batch),
            lambda: (live, self._geometry, None),
        )

    def _expect(self, batch: Any) -> None:
        """Keep sglang's own values, to be compared with what the graph will have written."""
        afterwards = self._afterwards
        assert afterwards is not None
        self._rebuild_all(batch)
        live = snapshot(self._describe(batch), self._geometry)

        def check() -> None:
            try:
                self._verification.settle(self._differences(None, live), None, lambda: (live, self._geometry, None))
            except Exception as error:
                self._afterwards = None
                self._choose()
                self._report.fell_back("replay", self.strategy, error)

        afterwards.wait(check)

    def _rebuild_all(self, batch: Any) -> None:
        for offset in self._spares:
            self._rebuild(batch, offset)

    def _rebuild(self, batch: Any, offset: int) -> None:
        """Have sglang's own code write the values for lengths that are longer by `offset` into spare buffers."""
        seen = SimpleNamespace(**vars(batch))
        seen.seq_lens = batch.seq_lens[: self._batch_size] + offset
        if batch.seq_lens_cpu is not None:
            seen.seq_lens_cpu = batch.seq_lens_cpu[: self._batch_size] + offset
        held = {self._batch_size: self._spares[offset]}
        native_replay([shadow(self._backends[0], decode_cuda_graph_metadata=held)], seen, self._native_mode)

    def _differences(
        self, batch: Any, live: BatchDescriptor
    ) -> Iterator[tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
        """Index, sglang's defined values and ours, of each step that differs; without `batch` sglang's are there already."""
        computed = None
        for index, (metadata, offset) in enumerate(zip(self._used, self._offsets, strict=True)):
            if index and metadata is self._used[0]:
                continue
            if batch is not None and offset != computed:
                self._rebuild(batch, offset)
                computed = offset
            if values := differing_values(self._spares[offset], metadata, live, self._geometry):
                yield index, *values

    def _store(self, backend: Any) -> Any:
        """A backend's captured metadata by batch size."""
        return backend.decode_cuda_graph_metadata

    def _reports(self) -> PathReport:
        return report(self._host, self._native_mode)

    def _noted(self, exact: bool) -> str:
        """What the log says of the buffers."""
        note = ", with exact step lengths" if exact else ""
        return note + (
            ", without the wide page table, which nothing reads" if self._used[0].page_table_1 is None else ""
        )

    def _length_offsets(self, batch: Any, exact: bool) -> tuple[int, ...]:
        """Tokens that each backend sees beyond the batch's lengths."""
        return tuple(index + 1 if exact else 0 for index in range(len(self._backends)))

    def _describer(self, exact: bool) -> Callable[[Any], BatchDescriptor]:
        """The describe function for batches like the captured one."""
        first, mode, steps = self._backends[0], MODES[self._native_mode.name], len(self._backends)
        offsets = self._offsets if exact else ()
        return lambda batch: describe(batch, backend=first, mode=mode, num_steps=steps, step_offsets=offsets)

    def _sizes(self) -> Geometry:
        return geometry(self._backends[0], self._used[0])

    def _consumer(self, index: int) -> StepMetadata:
        """The buffers of one backend."""
        return consumer(self._used[index])

    def _make_spares(self, spares: SpareBuffers) -> None:
        """Make room for sglang's own values; what waits for a graph is there for all lengths at once."""
        made = None
        for offset in dict.fromkeys(self._offsets):
            if made is None or self.strategy == "graph":
                made = spare_metadata(self._used[0], spares)
            self._spares[offset] = made

    @cached_property
    def _constants(self) -> Mapping[str, Any]:
        """Fields of the `DSAMetadata` that no replay writes to. A copy writes all of them, where sglang has them."""
        return {} if self.strategy == "copy" else derived.constants(self._backends[0], self._own[0])

    @cached_property
    def _first(self) -> Any:
        """The first backend's `DSAMetadata`."""
        own = self._own[0]
        is_held = all(getattr(own, name) is value for name, value in self._constants.items())
        return own if is_held else replace(own, **self._constants)

    def _buffers(self, drop_wide_table: bool, exact: bool) -> tuple[Any, ...]:
        """The `DSAMetadata` for each backend."""
        if self.strategy == "copy":
            return self._own
        first = replace(self._first, page_table_1=None) if drop_wide_table else self._first
        if not exact:
            return (first,) * len(self._own)
        shared = {"page_table_1": first.page_table_1, "real_page_table": first.real_page_table, **self._constants}
        return (first, *(replace(metadata, **shared) for metadata in self._own[1:]))

    def _refresher(self, exact: bool) -> Refresh | None:
        """A function that refreshes the derived planes of all buffers that the plan writes; None if there are none."""
        planes = list(zip(self._backends, self._used, strict=True))[: None if exact else 1]
        made = [
            derived.refreshers(*plane, self._native_mode, self._batch_size, self._constants.keys()) for plane in planes
        ]
        return side_by_side([refresh for refreshes in made for refresh in refreshes])

    def _point(self) -> None:
        """Leave the Python state that sglang's own replay leaves. Only eager code looks at it."""
        for backend, metadata in zip(self._backends, self._used, strict=True):
            getattr(backend, self._dispatch)(forward_batch=None)
            backend.forward_metadata = metadata

    def _hand_out(self, used: Sequence[Any]) -> None:
        for backend, metadata in zip(self._backends, used, strict=True):
            self._store(backend)[self._batch_size] = metadata
            backend.forward_metadata = metadata
