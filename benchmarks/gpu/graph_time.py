#!/usr/bin/env python3
"""What the metadata adds to the time of one of sglang's captured graphs on a GPU, by how derived planes are computed.

Derived planes are DeepGEMM's schedule, the top-k plan and FlashMLA's metadata; sglang's own functions compute them. Four
graphs are captured per cell: stand-ins for a model's kernels alone, and the same after the metadata, whose derived planes
follow one another, or have branches of their own, or do so without FlashMLA's metadata, which are computed once at capture.
They are replayed in blocks, in random order, between two CUDA events. The added time is the difference to the model alone
within a turn: median, and a 95 % interval of the median by bootstrap. The values of all are compared. FlashMLA's metadata of
random lengths are compared with those that the last graph reads.

    python -m benchmarks.gpu.graph_time --json graph_time.json

It needs sglang 0.5.23 with its kernels. Run it in the repository's root. The exit status is 1 if a value differs, or if
FlashMLA's metadata depend on the lengths although they are computed once.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from nsa_plugin.bench.run import MODES, where
from nsa_plugin.rigs.requirements import require

require("sglang")

from nsa_plugin.adapters.sglang import derived, preparation
from nsa_plugin.bench.cell import Cell, capture
from nsa_plugin.bench.sglang_engine import NATIVE
from nsa_plugin.core.batch import ForwardMode, TokenTable
from nsa_plugin.host import Host
from nsa_plugin.rigs.sglang import backends as kit
from nsa_plugin.settings import Settings

DEVICE = torch.device("cuda")
IN_TURN, SIDE_BY_SIDE, ONCE = "in turn", "side by side", "FlashMLA once"
MODEL_KERNELS, MODEL_SIZE = 40, 1 << 20
REPLAYS = 50
"""Of a graph between two events: the GPU is the slower by far, so that launches are hidden."""


def in_turn(refreshes: Any) -> Callable[[], None]:
    """The derived planes one after the other."""

    def derive() -> None:
        for refresh in refreshes:
            refresh()

    return derive


class Graphs:
    """The graphs of one cell, by name."""

    def __init__(self, cell: Cell) -> None:
        self._model = torch.ones(MODEL_SIZE, device=DEVICE)
        self._metadata: dict[str, Any] = {}
        self._cell, self._batch = cell, cell.batches(DEVICE)[0]
        self._run_model()
        self.graphs = {"model": capture(self._run_model), ONCE: self._prepared(ONCE)}
        with mock.patch.object(derived, "constants", lambda *of: {}):
            self.graphs[SIDE_BY_SIDE] = self._prepared(SIDE_BY_SIDE)
            with mock.patch.object(preparation, "side_by_side", in_turn):
                self.graphs[IN_TURN] = self._prepared(IN_TURN)

    def _run_model(self) -> None:
        for _ in range(MODEL_KERNELS):
            self._model.mul_(1.0)

    def _prepared(self, name: str) -> torch.cuda.CUDAGraph:
        cell, batch = self._cell, self._batch
        assert isinstance(batch.slots, TokenTable)
        geometry, native = cell.geometry(DEVICE), NATIVE[cell.mode]
        config = kit.Config(
            width=cell.width, max_requests=batch.slots.req_to_token.shape[0], max_batch_size=cell.batch_size,
            draft_tokens=cell.steps, index_topk=geometry.index_topk, page_size=geometry.page_size,
            decode_impl="flashmla_kv",
        )  # fmt: skip
        owner: Any
        if cell.mode is ForwardMode.DECODE:
            owner = kit.make_multi_step(config, batch.slots.req_to_token, cell.steps)
            backend = owner.attn_backends[0]
        else:
            owner = backend = kit.make_backend(config, batch.slots.req_to_token)
        static = kit.make_batch(native, batch.seq_lens.clone(), batch.slots.req_pool_indices.clone(), batch.num_rows)
        kit.before_capture(owner, static)
        kit.in_graph(owner, static)

        def work() -> None:
            kit.in_graph(owner, static)
            self._run_model()

        graph = capture(work)
        graph.replay()
        torch.cuda.synchronize()
        self._metadata[name] = (backend.forward_metadata, backend, static, owner)
        return graph

    def different(self) -> list[str]:
        """Values that not all ways have in common."""
        expected, *_ = self._metadata[IN_TURN]
        return [
            f"{way}: {name}"
            for way, (found, backend, static, _) in self._metadata.items()
            for name in kit.differences(expected, found, backend, static, self._cell.mode)
        ]

    def flashmla(self, number: int) -> dict[str, Any]:
        """How many of `number` vectors of random lengths have other FlashMLA metadata than the graph that computes none reads.

        A word of the schedule is compared if it is the same whenever the lengths are. `columns` are those that differ.
        """
        metadata, backend, *_ = self._metadata[ONCE]
        captured = metadata.dsa_cache_seqlens_int32
        generator = torch.Generator(device=DEVICE).manual_seed(1)
        held = backend.decode_cuda_graph_metadata[derived.FLASHMLA].flashmla_metadata
        once = metadata.flashmla_metadata.flashmla_metadata.data_ptr() != held.data_ptr()
        topk, repeated = backend.dsa_index_topk, 20

        def made(lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with derived.filled_memory():
                found = backend._compute_flashmla_metadata(cache_seqlens=lengths, seq_len_q=1)
            return found.flashmla_metadata, found.num_splits

        schedule, splits = made(captured)
        defined = torch.ones_like(schedule, dtype=torch.bool)
        again = [made(captured)[0] for _ in range(repeated)]  # all alive: each has an address of its own
        for other in again:
            defined &= schedule == other
        if once:
            schedule, splits = metadata.flashmla_metadata.flashmla_metadata, metadata.flashmla_metadata.num_splits
        count, columns = 0, torch.zeros(schedule.shape[1], dtype=torch.bool, device=DEVICE)
        for turn in range(number):
            longest = topk + 1 if turn % 4 else 64 * topk
            lengths = torch.randint(1, longest, captured.shape, generator=generator, device=DEVICE).to(captured.dtype)
            other, others_splits = made(lengths)
            wrong = (other != schedule) & defined
            columns |= wrong.any(0)
            count += bool(wrong.any()) or not torch.equal(others_splits, splits)
        return {
            "once": once, "rows": captured.numel(), "vectors": number, "different": count,
            "undefined words": int((~defined).sum()), "columns": columns.nonzero().flatten().tolist(),
        }  # fmt: skip


@contextmanager
def installed() -> Iterator[None]:
    """The plugin records its work in captured graphs."""
    host = Host()
    host.settings = Settings(strategy="graph")
    adapter = host.manager.adapter("sglang")
    assert adapter is not None
    if problems := adapter.install(host):
        raise RuntimeError("; ".join(problems))
    try:
        yield
    finally:
        adapter.undo()


def replay_time(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of a replay, the mean over a block."""
    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    graph.replay()
    begin.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3 / REPLAYS


def measure(graphs: dict[str, torch.cuda.CUDAGraph], turns: int, order: random.Random) -> dict[str, dict[str, Any]]:
    """What each graph takes more than the model alone, in microseconds, turn by turn."""
    added: dict[str, list[float]] = {name: [] for name in graphs if name != "model"}
    names, alone = list(graphs), []
    for _ in range(turns):
        order.shuffle(names)
        times = {name: replay_time(graphs[name]) for name in names}
        alone.append(times["model"])
        for name, values in added.items():
            values.append(times[name] - times["model"])
    added["saved"] = [before - after for before, after in zip(added[IN_TURN], added[ONCE], strict=True)]
    return {
        name: {"us": round(statistics.median(values), 2), "interval": interval(values, order)}
        for name, values in {**added, "model": alone}.items()
    }


def interval(values: list[float], order: random.Random) -> list[float]:
    """95 % interval of the median."""
    medians = sorted(statistics.median(order.choices(values, k=len(values))) for _ in range(1000))
    return [round(medians[at], 2) for at in (25, 974)]


def main() -> int:
    """Run all cells; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--bs", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--ctx", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--width", type=int, default=163840)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--vectors", type=int, default=200, help="of random lengths, to compare FlashMLA's metadata of")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results, bad, order = [], 0, random.Random(1)
    with installed():
        for mode in options.mode:
            for size in options.bs:
                graphs = Graphs(Cell(MODES[mode], size, options.ctx, options.steps, options.width, seed=size))
                different, flashmla = graphs.different(), graphs.flashmla(options.vectors)
                bad += bool(different) or (flashmla["once"] and flashmla["different"] > 0)
                found = measure(graphs.graphs, options.turns, order)
                checks = {"different": different, "flashmla": flashmla}
                results.append({"mode": mode, "bs": size, "turns": options.turns, **checks, **found})
                print(results[-1], flush=True)
                if options.json:
                    written = {**where(DEVICE), "ctx": options.ctx, "steps": options.steps, "width": options.width}
                    options.json.write_text(json.dumps({**written, "cells": results}, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
