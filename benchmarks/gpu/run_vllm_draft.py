#!/usr/bin/env python3
"""vLLM's real V2 speculator on a GPU: every value that its draft steps see, with this plugin and as shipped.

Real are `MTPSpeculator`, `BlockTables`, FlashMLA-sparse and indexer builders, DeepGEMM's schedule, the Triton kernels and the
captured CUDA graphs; the draft model is a stand-in. These drafts are replayed over changing batches (sizes, lengths up to the
model's, requests, block tables), with buffers poisoned in between:

- "vllm shipped" rebuilds the metadata for every step. What the model of every other draft sees is compared with this one.
- "vllm in place" is fused: FlashMLA-sparse has its hook, and each group updates its own metadata.
- "graph" is fused: the plugin as it is installed. It is also compared with "vllm in place", rows of padding included.
- "metadata kept" is not fused.

DeepGEMM's schedule is compared in full batches only: vLLM's updates in place let rows of padding grow, its rebuild does not.
`nsa-plugin bench --engine vllm` times the same drafts.

    python -m benchmarks.gpu.run_vllm_draft --json vllm_draft.json

With --verify N the plugin itself verifies every N-th draft of "graph", as with NSA_PLUGIN_VERIFY: the metadata is then
written before each replay, and the graph has copies of it.

It needs a complete vLLM 0.33.0. Run it in the repository's root. Without a GPU the graphs are small, and emulated. The exit
status is 1 if a value differs.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from nsa_plugin.bench.run import where
from nsa_plugin.rigs.requirements import require

require("vllm")

from nsa_plugin.rigs.vllm.drafts import LAYOUTS
from nsa_plugin.rigs.vllm.v2_draft import Sizes
from nsa_plugin.rigs.vllm.v2_replay import IN_PLACE, ONE_KERNEL, STOCK, Batch, Comparison, ReplayedDraft, ways

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


class Batches:
    """Changing batches, the same for the same seed."""

    def __init__(self, sizes: Sizes, seed: int) -> None:
        self._sizes = sizes
        self._random = torch.Generator().manual_seed(seed)

    def new(self, size: int | None = None) -> Batch:
        """A batch of `size` requests, or of any number. Half of the lengths are short, at the end, or whole blocks."""
        sizes, random = self._sizes, self._random
        most, blocks = sizes.model_len, sizes.model_len // 64
        size = int(torch.randint(1, sizes.captured + 1, (), generator=random)) if size is None else size
        lengths = torch.randint(most // 8, most // 4, (size,), generator=random, dtype=torch.int32)
        edge = torch.randint(0, 6, (size,), generator=random)
        lengths[edge == 0] = torch.randint(1, 200, (size,), generator=random, dtype=torch.int32)[edge == 0]
        lengths[edge == 1] = most - torch.randint(0, 5, (size,), generator=random, dtype=torch.int32)[edge == 1]
        lengths[edge == 2] = lengths[edge == 2] // 64 * 64
        rows = torch.randperm(sizes.requests, generator=random)[:size]
        table = torch.randint(1, 1 << 18, (sizes.requests, blocks), generator=random, dtype=torch.int32)
        return Batch(lengths.clamp_(1, most), rows, table)


def compare(reference: ReplayedDraft, draft: ReplayedDraft, batches: int, seed: int) -> dict[str, Any]:
    """Entries of each field that differ from the reference, over a number of batches. Every other batch is a full one."""
    source, comparison = Batches(draft.sizes, seed), Comparison()
    for number in range(batches):
        batch = source.new(size=draft.sizes.captured if number % 2 else None)
        want = reference.steps(batch, poison=False)
        comparison.add(want, draft.steps(batch), live=None if reference.fused else len(batch.lengths))
    return {"batches": batches, "different": comparison.different, "compared": dict(comparison.compared)}


def check(layout: str, tokens: int, sizes: Sizes, replays: int, seed: int, verify: int) -> dict[str, Any]:
    """Comparisons for one cache layout and number of tokens, by the name of the draft."""
    with ways(layout, tokens, sizes, verify) as drafts:
        for draft in drafts.values():
            draft.capture(record=True)
        stock = drafts[STOCK]
        return {
            **{name: compare(stock, draft, replays, seed) for name, draft in drafts.items() if draft is not stock},
            f"{ONE_KERNEL} against {IN_PLACE}": compare(
                drafts[IN_PLACE], drafts[ONE_KERNEL], max(replays // 4, 2), seed + 1
            ),
        }


def main() -> int:
    """Run everything; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 8], help="speculative tokens (K)")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--batch-size", type=int, default=32 if GPU else 4, help="the captured size")
    parser.add_argument("--replays", type=int, default=1000 if GPU else 8, help="changing batches for each graph")
    parser.add_argument("--seconds", type=float, default=420, help="begin no further layout after so many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--verify", type=int, default=0, help="let the plugin verify every so many drafts")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    size = options.batch_size
    sizes = Sizes(DEVICE, size, 65536, max(128, size), 2048) if GPU else Sizes(DEVICE, size, 1024, 16, 256)
    environment = {
        **where(DEVICE), "batch_size": size, "model_len": sizes.model_len, "seed": options.seed, "verify": options.verify,
    }  # fmt: skip
    begun, results, bad = time.perf_counter(), [], 0
    cases = [(layout, tokens) for layout in options.layouts for tokens in options.tokens]
    for layout, tokens in cases:
        start = time.perf_counter()
        if start - begun > options.seconds:
            print(f"SKIP {layout}, K = {tokens}: over {options.seconds:.0f} s", flush=True)
            bad += 1
            continue
        entry: dict[str, Any] = {"layout": layout, "tokens": tokens}
        try:
            checks = check(layout, tokens, sizes, options.replays, options.seed, options.verify)
            entry |= checks
            bad += any(found["different"] for found in checks.values())
        except Exception:
            entry["error"] = traceback.format_exc(limit=-6)
            bad += 1
        results.append(entry)
        report(entry, time.perf_counter() - start)
        if options.json:  # after each, in case the next does not end
            options.json.write_text(json.dumps({**environment, "results": results}, indent=1) + "\n")
    print(f"{len(results)} of {len(cases)} run; {bad} not as they should be")
    return 1 if bad else 0


def report(entry: dict[str, Any], seconds: float) -> None:
    """Print a result in a few lines."""
    print(f"{entry['layout']}, K = {entry['tokens']} ({seconds:.1f} s)")
    for name, found in entry.items():
        if isinstance(found, dict):
            entries = sum(found["compared"].values())
            print(
                f"    {name}: {found['batches']} batches, {entries} entries, different: {found['different'] or 'none'}"
            )
    print(entry.get("error", ""), end="", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
