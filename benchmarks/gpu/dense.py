#!/usr/bin/env python3
"""Dense backends of sglang on a GPU: what captured graphs read after replays of changing batches, against sglang's own code.

For each row of the adapter's table a real backend is captured with the plugin, in a real CUDA graph, and replayed with
random batches. After each replay every value that captured kernels read is compared with what sglang's own code computes for
the same batch in a backend of its own. FlashMLA's compiled schedule has a stand-in where it can't be had; attention kernels are
not run.

    python -m benchmarks.gpu.dense --batches 1000

It needs sglang's Python files, not its compiled kernels. The exit status is 1 if a value differs or a path fell back.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections import Counter
from typing import Any

import torch

from nsa_plugin.adapters.sglang.dense import ROWS
from nsa_plugin.adapters.sglang.derived import filled_memory
from nsa_plugin.adapters.sglang.registry import beneath_hooks
from nsa_plugin.bench.run import where
from nsa_plugin.host import Host
from nsa_plugin.rigs.sglang.dense import Dense, stand_ins
from nsa_plugin.rigs.sglang.dense_engine import case
from nsa_plugin.rigs.sglang.flash_attention import Sizes
from nsa_plugin.settings import Settings


class Captured:
    """A rig whose metadata work, if any, is recorded in a CUDA graph."""

    def __init__(self, rig: Dense, size: int) -> None:
        self._rig, self._size, owner = rig, size, rig.owner
        static = rig.static(size)
        owner.init_forward_metadata_out_graph(static, in_capture=True)
        self._seen = [backend.forward_metadata for backend in rig.backends]
        owner.init_forward_metadata_in_graph(static)
        self._graph, self._spare = torch.cuda.CUDAGraph(), torch.zeros(1, device=rig.table.device)
        with torch.cuda.graph(self._graph):
            self._spare.add_(1)  # a graph may not be empty
            owner.init_forward_metadata_in_graph(static)

    def replay(self, seq_lens: list[int], requests: list[int]) -> list[dict[str, torch.Tensor]]:
        """What captured kernels read of a batch."""
        self._rig.owner.init_forward_metadata_out_graph(self._rig.live(self._size, seq_lens, requests))
        self._graph.replay()
        return [self._rig.values(metadata, index, self._size) for index, metadata in enumerate(self._seen)]


def batch(rng: random.Random, size: int, context: int, requests: int) -> tuple[list[int], list[int]]:
    """Lengths from 1 to the end of the context, page edges among them, and rows of the token table; padded at times."""
    live = rng.randint(0, size)
    edges = (1, 63, 64, 65, context - 1, context)
    lengths = [rng.choice(edges) if rng.random() < 0.3 else rng.randint(1, context) for _ in range(live)]
    return lengths, [rng.randint(1, requests - 1) for _ in range(live)]


def differing(row: Any, page_size: int, steps: int, windows: bool, batches: int, size: int, width: int) -> Counter[str]:
    """Values that differ in any batch, with the number of batches."""
    device, rng = torch.device("cuda"), random.Random(page_size * 1000 + steps)
    sizes = Sizes(page_size, windows, width, 2 * size, size, steps)
    backend = case(row).backend
    captured = Captured(Dense(backend, row.mode, sizes, steps, device), size)
    reference = Dense(backend, row.mode, sizes, steps, device)
    compute = beneath_hooks(type(reference.owner).init_forward_metadata_out_graph)
    compute(reference.owner, reference.static(size), in_capture=True)
    found: Counter[str] = Counter()
    for _ in range(batches):
        numbers = batch(rng, size, width - 8, sizes.max_requests)
        compute(reference.owner, reference.live(size, *numbers))
        got = captured.replay(*numbers)
        for index, metadata in enumerate(reference.backends):
            want = reference.values(metadata.forward_metadata, index, size)
            found.update(name for name in want if not torch.equal(want[name], got[index][name]))
    return found


def main() -> int:
    """Run all rows; print a line for each, and the whole as JSON last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=1000, help="for each row, page size and number of steps")
    parser.add_argument("--bs", type=int, default=32)
    parser.add_argument("--width", type=int, default=8192)
    options = parser.parse_args()
    host = Host(Settings(strategy="graph"))
    adapter = host.manager.adapter("sglang")
    assert adapter is not None
    results = []
    with stand_ins():
        if problems := adapter.install(host):
            raise SystemExit("; ".join(problems))
        for row in ROWS:
            fa3 = row.part == "dense FlashAttention"
            for page_size, steps, windows in itertools.product(
                (1, 16, 64, 128) if fa3 else (64,), (2, 4, 8) if row.draft else (4,), (False, True) if fa3 else (False,)
            ):
                with filled_memory():
                    wrong = differing(row, page_size, steps, windows, options.batches, options.bs, options.width)
                told = {"path": row.path, "page_size": page_size, "steps": steps, "sliding_window": windows}
                results.append({**told, "differs": dict(wrong)})
                print(f"{told}: {options.batches} batches, {dict(wrong)}")
        adapter.undo()
    fallbacks = [" ".join(cause) for cause in host.fallbacks]
    print(
        json.dumps({**where(torch.device("cuda")), "batches": options.batches, "rows": results, "fallbacks": fallbacks})
    )
    return int(bool(fallbacks) or any(result["differs"] for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
