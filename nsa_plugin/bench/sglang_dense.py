"""Contenders over sglang's dense backends: sglang's own code as it ships, and this plugin in each strategy that serves them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from nsa_plugin.adapters.base import Strategy
from nsa_plugin.adapters.sglang import dense as dense_rows
from nsa_plugin.adapters.sglang import recorded
from nsa_plugin.adapters.sglang.derived import filled_memory
from nsa_plugin.adapters.sglang.releases import lacking
from nsa_plugin.bench.cell import SPARE_ROWS, Cell, Contender, capture
from nsa_plugin.bench.measure import Call
from nsa_plugin.bench.sglang_engine import NATIVE, SHIPPED
from nsa_plugin.core.batch import TokenTable
from nsa_plugin.core.errors import UnavailableError, reject
from nsa_plugin.host import Host
from nsa_plugin.rigs.sglang.dense import Dense, Name, stand_ins
from nsa_plugin.rigs.sglang.flash_attention import Sizes
from nsa_plugin.settings import Settings

PARTS: dict[Name, tuple[str, ...]] = {
    "fa3": ("dense FlashAttention", "recorded draft extend"),
    "flashmla": ("dense FlashMLA",),
}
"""What a backend's rows need of sglang, as the adapter's tables name it."""
STRATEGIES: tuple[Strategy, ...] = ("share", "graph")


class SglangDense:
    """The contenders of one cell, each with backends of its own.

    What sglang records in its graph counts for sglang, which computes it once more before each replay, and for the plugin,
    which leaves it to the graph.

    Parameters
    ----------
    cell : Cell
    device : torch.device
    backend : "fa3" or "flashmla"
        As sglang's `--attention-backend` names it.

    Raises
    ------
    UnavailableError
        The installed sglang lacks what the cell's mode takes, or a strategy could not be had.
    """

    def __init__(self, cell: Cell, device: torch.device, backend: Name) -> None:
        self._cell, self._backend, self._host = cell, backend, _Told("off")
        self._sizes = Sizes(
            cell.page_size, False, cell.width, cell.batch_size + SPARE_ROWS, cell.batch_size, cell.steps
        )
        if cell.context + cell.steps > self._sizes.context:
            reject(
                "--ctx", f"sequences with room for {cell.steps} draft tokens among {self._sizes.context}", cell.context,
                fix="take a larger --width, or fewer --steps",
            )  # fmt: skip
        self._row = next(
            row
            for row in (*dense_rows.ROWS, *recorded.ROWS)
            if row.part in PARTS[backend] and row.mode == NATIVE[cell.mode]
        )
        self._opened, self._installed = contextlib.ExitStack(), contextlib.ExitStack()
        with contextlib.ExitStack() as opened:
            try:
                opened.enter_context(stand_ins(cell.steps))
            except ImportError as error:
                raise UnavailableError(f"--backend {backend}: {error}") from error
            if problem := lacking(self._row.part):
                raise UnavailableError(f"--backend {backend}: {problem}")
            batches = cell.batches(device)
            tables = [batch.slots for batch in batches if isinstance(batch.slots, TokenTable)]
            self._table, self._lens = tables[0].req_to_token, [batch.seq_lens for batch in batches]
            self._requests = [table.req_pool_indices for table in tables]
            by_sglang = isinstance(self._row, recorded.RecordedRow)
            self._shipped = self._newest = self._prepared(SHIPPED, records=by_sglang)
            self.bytes = self._bytes_to_move()
            self._opened = opened.pop_all()

    @property
    def contenders(self) -> Iterator[Contender]:
        """sglang's own code, before anything is installed; then strategies, each installed when its turn comes."""
        yield self._shipped.contender
        for strategy in STRATEGIES:
            if (strategy == "graph" and not has_graphs()) or (strategy == "share" and self._row.least == "graph"):
                continue
            self._install(strategy)
            self._newest = self._prepared(strategy, records=strategy == "graph")
            served = self._host.served.get(self._row.path, "off")
            if self._host.fallbacks or not served.startswith(strategy):
                raise _not_had(strategy, dict(self._host.fallbacks) or served)
            yield self._newest.contender

    def check(self, contender: Contender) -> list[str]:
        """Values that differ from sglang's own, and of sglang's own those that differ from plain torch."""
        wrong: set[str] = set()
        for index in range(len(self._lens)):
            contender.run(index)
            got = self._newest.values(index)
            if contender.name == SHIPPED:
                expected = self._by_torch(index)
            else:
                with filled_memory():
                    self._shipped.contender.run(index)
                expected = self._shipped.values(index)
            wrong.update(
                name
                for want, found in zip(expected, got, strict=True)
                for name in want
                if name in found and not _equal(want[name], found[name])
            )
        if self._host.fallbacks:
            raise _not_had(contender.name, dict(self._host.fallbacks))
        return sorted(wrong)

    def close(self) -> None:
        """Leave sglang as it was found."""
        self._installed.close()
        self._opened.close()

    def _prepared(self, name: str, records: bool) -> _Prepared:
        rig = Dense(
            self._backend, NATIVE[self._cell.mode], self._sizes, self._cell.steps, self._table.device, self._table
        )
        return _Prepared(name, rig, self._lens, self._requests, records)

    def _install(self, strategy: Strategy) -> None:
        self._installed.close()
        self._host = _Told(strategy)
        adapter = self._host.manager.adapter("sglang")
        if adapter is None:
            raise UnavailableError("no adapter for sglang")
        self._installed.callback(adapter.undo)
        if problems := adapter.install(self._host):
            raise UnavailableError("; ".join(problems))

    def _bytes_to_move(self) -> float:
        """Of each live page one slot is read and one page number written, 4 bytes each, whatever the number of steps."""
        longest, page = max(self._shipped.seen()), self._cell.page_size
        pages = sum(int(((lens + longest + page - 1) // page).sum()) for lens in self._lens)
        return 8 * pages / len(self._lens)

    def _by_torch(self, number: int) -> list[dict[str, torch.Tensor]]:
        """Lengths, their running sum and live pages for each backend, from what they are defined to be."""
        page = self._cell.page_size
        slots = self._table[self._requests[number], : self._cell.width // page * page : page]
        starts, found = torch.arange(slots.shape[1], device=slots.device) * page, []
        for more in self._shipped.seen():
            lens = self._lens[number] + more
            running = torch.nn.functional.pad(torch.cumsum(lens, 0), (1, 0))
            pages = (slots // page).masked_fill(starts >= lens[:, None], -1)
            found.append({"cache_seqlens_int32": lens.int(), "cu_seqlens_k": running.int(), "table": pages})
        return found


def _equal(want: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether all words are equal that sglang's own code, in `filled_memory`, has written: FlashMLA leaves some as they were."""
    written = want != torch.iinfo(want.dtype).max
    return want.shape == found.shape and torch.equal(want[written], found[written])


class _Prepared:
    """Backends that one contender prepares, captured as sglang's runners do it, with every input in buffers of its own.

    With `records` what is launched within the capture is in a CUDA graph. It reads the runner's static buffers: an input is
    loaded there first.
    """

    def __init__(
        self, name: str, rig: Dense, lens: Sequence[torch.Tensor], requests: Sequence[torch.Tensor], records: bool
    ) -> None:
        self._rig, self._lens, size = rig, lens, rig.sizes.max_batch_size
        owner, inputs = rig.owner, [rig.more_buffers() for _ in lens]
        batches = [
            rig.live(size, lens.tolist(), rows.tolist(), buffers)
            for lens, rows, buffers in zip(lens, requests, inputs, strict=True)
        ]
        static = rig.static(size)
        owner.init_forward_metadata_out_graph(static, in_capture=True)
        self._metadata = [backend.forward_metadata for backend in rig.backends]

        def record() -> None:
            owner.init_forward_metadata_in_graph(static)

        def prepare(batch: Any) -> Call:
            return lambda: owner.init_forward_metadata_out_graph(batch)

        record()
        if records and has_graphs():
            before = [prepare(rig.batch(size, size, rig.buffers))]
            self.contender = Contender.of_graph(
                name, capture(record), lambda index: rig.buffers.load(inputs[index]), before, (), rig
            )
        else:
            self.contender = Contender.of_calls(name, [prepare(batch) for batch in batches], ())

    def seen(self) -> list[int]:
        """Tokens that each backend's kernels see beyond a batch's lengths."""
        return [self._rig.seen(index) for index in range(len(self._metadata))]

    def values(self, number: int) -> list[dict[str, torch.Tensor]]:
        """What captured kernels read of each backend's metadata after the input of that number."""
        lens = self._lens[number]
        return [self._rig.values(metadata, index, len(lens), lens) for index, metadata in enumerate(self._metadata)]


class _Told(Host):
    """A host that keeps how each path is served."""

    def __init__(self, strategy: str) -> None:
        self.served: dict[str, str] = {}
        super().__init__(Settings(strategy=strategy))

    def using(self, logger: logging.Logger, engine: str, path: str, strategy: str) -> None:
        """Keep it."""
        self.served[path] = strategy
        super().using(logger, engine, path, strategy)


def has_graphs() -> bool:
    """Whether work can be recorded in a CUDA graph."""
    return torch.cuda.is_available()


def _not_had(strategy: str, why: object) -> UnavailableError:
    return UnavailableError(f"strategy {strategy} could not be had: {why}")
