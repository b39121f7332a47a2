"""Contenders over the real sglang: its per-backend code, its shipped code, and this plugin in each strategy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from nsa_plugin.adapters.sglang import refusals, releases
from nsa_plugin.adapters.sglang.describe import consumer
from nsa_plugin.adapters.sglang.pools import foreign_formulas
from nsa_plugin.bench.cell import Cell, Contender, capture
from nsa_plugin.bench.embedded import differing_from_reference, original_loop_contender
from nsa_plugin.core.batch import BatchDescriptor, ForwardMode, TokenTable
from nsa_plugin.core.errors import UnavailableError
from nsa_plugin.host import Host
from nsa_plugin.rigs.sglang import backends as kit
from nsa_plugin.settings import Settings

NATIVE = {
    ForwardMode.DECODE: "DECODE",
    ForwardMode.TARGET_VERIFY: "TARGET_VERIFY",
    ForwardMode.DRAFT_EXTEND: "DRAFT_EXTEND_V2",
}
LOOP, SHIPPED, UNFUSED = "sglang loop", "sglang shipped", "sglang unfused"


class Sglang:
    """The contenders of one cell: the original loop (if its wheel is at hand), sglang's own code, then this plugin.

    sglang's own code is its per-backend code (`LOOP`), which outside DECODE is what it ships, what it ships for DECODE, and
    with pooled index keys what it ships with its fused metadata switched off.

    Raises
    ------
    UnavailableError
        The installed sglang lacks what the cell's mode takes, or a strategy could not be had.
    """

    def __init__(self, cell: Cell, device: torch.device, wheel: Path | None, decode_impl: str) -> None:
        if cell.mode is ForwardMode.DRAFT_EXTEND and (problem := releases.lacking("draft extend")):
            raise UnavailableError(f"--mode extend: {problem}")
        if cell.index_kpool > 1 and (problem := foreign_formulas(cell.index_kpool)):
            raise UnavailableError(f"--index-kpool {cell.index_kpool}: {problem}")
        self._geometry, self._batches = geometry, batches = cell.geometry(device), cell.batches(device)
        self.bytes = cell.bytes_to_move(batches)
        first = batches[0]
        assert isinstance(first.slots, TokenTable)
        self._cell, self._table = cell, first.slots.req_to_token
        self._native = NATIVE[cell.mode]
        self._config = kit.Config(
            width=cell.width, max_requests=self._table.shape[0], max_batch_size=cell.batch_size,
            draft_tokens=cell.steps, index_topk=geometry.index_topk, page_size=geometry.page_size, decode_impl=decode_impl,
            index_kpool=cell.index_kpool,
        )  # fmt: skip
        self._live = [self._batch(batch) for batch in batches]
        self._backends: dict[str, list[Any]] = {}
        host = Host()
        adapter = host.manager.adapter("sglang")
        if adapter is None:
            raise UnavailableError("no adapter for sglang")
        self._adapter = adapter
        self.contenders = [] if wheel is None else [original_loop_contender(cell, batches, geometry, wheel)]
        self.contenders.append(self._loop())
        if cell.mode is ForwardMode.DECODE:
            self.contenders.append(self._prepared(SHIPPED))
        if cell.index_kpool > 1:
            self.contenders.append(self._prepared(UNFUSED))
        records = torch.cuda.is_available() and not refusals.not_graph()
        for strategy in ("copy", "share", "graph") if records else ("copy", "share"):
            host.settings = Settings(strategy=strategy)
            if problems := adapter.install(host):
                raise UnavailableError("; ".join(problems))
            self.contenders.append(self._prepared(strategy))
        if host.fallbacks:
            raise UnavailableError(f"a strategy could not be had: {dict(host.fallbacks)}")

    def check(self, contender: Contender) -> list[str]:
        """Fields that differ from the reference or, in backends of sglang, from sglang's per-backend code."""
        name = contender.name
        return differing_from_reference(
            self._batches, self._geometry, contender, lambda index: self._stale(name, index)
        )

    def close(self) -> None:
        """Leave sglang as it was found."""
        self._adapter.undo()

    def _batch(self, batch: BatchDescriptor) -> Any:
        assert isinstance(batch.slots, TokenTable)
        made = kit.make_batch(self._native, batch.seq_lens, batch.slots.req_pool_indices, batch.num_rows)
        made.spec_info = None if batch.accepted is None else SimpleNamespace(num_accept_tokens=batch.accepted)
        return made

    def _owner(self, name: str) -> Any:
        config = replace(self._config, fused=name != UNFUSED)
        if self._cell.mode is ForwardMode.DECODE:
            owner = kit.make_multi_step(config, self._table, self._cell.steps)
            self._backends[name] = owner.attn_backends
        else:
            owner = kit.make_backend(config, self._table)
            self._backends[name] = [owner]
        return owner

    def _static(self) -> Any:
        fill = torch.ones(self._cell.batch_size, dtype=torch.int64, device=self._table.device)
        made = kit.make_batch(self._native, fill, fill - 1, self._cell.batch_size * self._cell.draft_tokens)
        if self._live[0].spec_info is not None:
            made.spec_info = SimpleNamespace(num_accept_tokens=fill.to(torch.int32))
        return made

    def _loop(self) -> Contender:
        self._owner(LOOP)

        def prepare(index: int) -> None:
            for backend in self._backends[LOOP]:
                kit.engine_metadata(backend, self._live[index], self._native)

        calls = [lambda index=index: prepare(index) for index in range(len(self._live))]
        prepare(0)
        return Contender.of_calls(LOOP, calls, self._consumers(LOOP))

    def _prepared(self, name: str) -> Contender:
        owner, static = self._owner(name), self._static()
        kit.before_capture(owner, static)
        before = [kit.preparation(owner, live) for live in self._live]
        if name != "graph":
            return Contender.of_calls(name, before, self._consumers(name))
        kit.in_graph(owner, static)
        recorded = capture(lambda: kit.in_graph(owner, static))

        def load(index: int) -> None:
            static.seq_lens.copy_(self._live[index].seq_lens)
            static.req_pool_indices.copy_(self._live[index].req_pool_indices)
            if static.spec_info is not None:
                static.spec_info.num_accept_tokens.copy_(self._live[index].spec_info.num_accept_tokens)

        return Contender.of_graph(name, recorded, load, before, self._consumers(name), owner)

    def _consumers(self, name: str) -> list[Any]:
        return [consumer(backend.forward_metadata) for backend in self._backends[name]]

    def _stale(self, name: str, index: int) -> list[str]:
        """Values of contender `name` after input `index` that differ from those of sglang's per-backend code."""
        if name not in self._backends:
            return []
        expected = kit.engine_metadata(self._backends[LOOP][0], self._live[index], self._native)
        live = self._live[index]
        return [
            field
            for backend in self._backends[name]
            for field in kit.differences(expected, backend.forward_metadata, backend, live, self._cell.mode)
        ]
