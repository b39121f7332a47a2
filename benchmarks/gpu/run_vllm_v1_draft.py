#!/usr/bin/env python3
"""vLLM's real V1 proposer on a GPU: the metadata of every draft step is compared with vLLM's own rebuild, and timed.

Three drafts take the same changing batches: vLLM's rebuild with its caches cleared (the reference), stock vLLM, and the
plugin. Every field of attention and indexer metadata is compared at every step. Then the metadata of the draft steps is
timed, stock and with the plugin. At last the FlashMLA scheduler object that the plugin keeps is compared with fresh ones.

    python -m benchmarks.gpu.run_vllm_v1_draft --json vllm_v1_draft.json

It needs vLLM 0.33.0 with its kernels, and takes under two minutes. Run it in the repository's root. The exit status is 1 if
anything is wrong. Without a GPU, `--batches 2 --rounds 2` tries the program itself.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import random
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from nsa_plugin.bench.measure import gpu_time, synchronize
from nsa_plugin.bench.run import where
from nsa_plugin.core.api import Impl
from nsa_plugin.core.batch import BlockTable
from nsa_plugin.core.draft_steps import DraftLimits, DraftStep, PastEnd, bind_draft_steps
from nsa_plugin.rigs.requirements import require

require("vllm")

from nsa_plugin.rigs.vllm.drafts import LAYOUTS
from nsa_plugin.rigs.vllm.v1_draft import V1Draft, differing, patched, proposals, reference

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
MAX_MODEL_LEN = 65536
BAD = ("error", "wrong", "differ", "plugin_wrong", "fallbacks", "mismatches")
Outcome = dict[str, Any]


def batches(tokens: int, number: int, seed: int) -> Iterator[tuple[list[int], list[int], int]]:
    """Lengths, rejected tokens and first block of changing batches, of any size. Some requests have the maximal length."""
    rng = random.Random(seed)
    for index in range(number):
        size = (1, 3, 4, 32, 64)[index % 5]
        high = MAX_MODEL_LEN if index % 4 == 3 else MAX_MODEL_LEN - 2 * tokens
        low = MAX_MODEL_LEN - tokens - 2 if index % 4 == 3 else tokens + 1
        lengths = [rng.randint(low, high) for _ in range(size)]
        yield lengths, [rng.randint(0, tokens) for _ in range(size)], rng.randint(1, 1000)


def compare(draft: V1Draft, number: int, seed: int) -> Outcome:
    """Number of steps compared, fields in which stock vLLM and the plugin differ from the reference, fall-backs."""
    made = list(batches(draft.tokens, number, seed))
    want, stock = reference(draft, made), proposals(draft, made)
    with patched() as host:
        ours = proposals(draft, made)
        ours_again = proposals(draft, made)  # from kept metadata alone
    with patched(verify=1) as verified:
        watched = proposals(draft, made)
    return {
        "steps": len(want),
        "stock_wrong": count(differing(a, b) for a, b in zip(want, stock, strict=True)),
        "plugin_wrong": count(
            differing(a, b) for a, b in zip(want + want + want, ours + ours_again + watched, strict=True)
        ),
        "fallbacks": {str(key): value for key, value in (host.fallbacks + verified.fallbacks).items()},
        "mismatches": {str(key): value for key, value in verified.mismatches.items()},
    }


def count(differences: Iterator[list[str]]) -> dict[str, int]:
    """How often each field was named."""
    counts: dict[str, int] = {}
    for names in differences:
        for name in names:
            counts[name] = counts.get(name, 0) + 1
    return counts


def measure(draft: V1Draft, size: int, rounds: int) -> Outcome:
    """Host time of the draft steps' metadata and of a whole proposal, in µs; their kernels and GPU time."""
    proposer, tokens = draft.proposer, draft.tokens
    lengths = [random.Random(size).randint(8000, 16000) for _ in range(size)]
    batch = draft.batch(lengths, 1, [tokens + 1] * size)
    at = torch.tensor(lengths, device=draft.device) - 1

    def begin() -> Any:
        live = copy.copy(batch)
        draft.seq_lens[:size].copy_(at + 1)
        proposer.num_speculative_tokens = tokens
        proposer.build_per_group_and_layer_attn_metadata(live)
        live.num_actual_tokens, live.max_query_len = size, 1
        live.query_start_loc = proposer.arange[: size + 1]
        live.query_start_loc_cpu = torch.arange(size + 1, dtype=torch.int32)
        return live

    def steps(live: Any) -> None:
        positions = at
        for index in range(tokens - 1):
            positions = proposer._update_positions_dependent_metadata(positions, live, size, size, 64)
            proposer.build_per_group_and_layer_attn_metadata(live, draft_index=index + 1)

    for _ in range(5):
        steps(begin())
    samples = []
    for _ in range(rounds):
        live = begin()
        synchronize()
        start = time.perf_counter()
        steps(live)
        samples.append((time.perf_counter() - start) * 1e6)
    draft.model.watch = False
    whole = []
    for _ in range(rounds // 2):
        propose = draft.proposal(lengths, [0] * size, 1)
        synchronize()
        start = time.perf_counter()
        propose()
        whole.append((time.perf_counter() - start) * 1e6)
    draft.model.watch = True
    outcome: Outcome = {"host_us": statistics.median(samples), "propose_host_us": statistics.median(whole)}
    if draft.device.type == "cuda":
        before, both = gpu_time([begin], rounds=10), gpu_time([lambda: steps(begin())], rounds=10)
        assert before is not None and both is not None
        outcome |= {"gpu_us": both.spread.median - before.spread.median, "kernels": both.kernels - before.kernels}
    return outcome


def kernel_cases(number: int) -> Outcome:
    """Compare the launch for all steps with its reference, at sizes that engines run."""
    rng, wrong = random.Random(7), 0
    for _ in range(number):
        size, padding, tokens, longest = (
            rng.randint(1, 300),
            rng.randint(0, 60),
            rng.randint(1, 8),
            rng.choice([100, 4096]),
        )
        block_size = rng.choice([16, 64])
        positions = torch.randint(0, longest + 1, (size,), device=DEVICE)
        seq_lens = torch.randint(1, longest + 2, (size,), device=DEVICE, dtype=torch.int32)
        table = torch.randint(0, 1 << 20, (size, -(-longest // block_size)), device=DEVICE, dtype=torch.int32)
        limits, filled = DraftLimits(longest, rng.choice(list(PastEnd))), []
        impls: tuple[Impl, ...] = ("reference", "triton")
        for impl in impls:
            made = [
                DraftStep(*(torch.full((size + padding,), -7, dtype=dtype, device=DEVICE)
                            for dtype in (torch.int64, torch.int64, torch.int32)))
                for _ in range(tokens)
            ]  # fmt: skip
            fill = bind_draft_steps(made, limits, impl=impl)
            fill(positions, seq_lens, BlockTable(table, block_size), size, size + padding)
            filled.append(made)
        pairs = zip(*filled, strict=True)
        wrong += any(
            not torch.equal(getattr(a, name), getattr(b, name))
            for a, b in pairs
            for name in ("positions", "slots", "seq_lens")
        )
    return {"cases": number, "wrong": wrong}


def kept_schedule(layout: str, size: int) -> Outcome:
    """Compare FlashMLA's sparse decode with one scheduler object for all indices, and with a fresh one each time."""
    from vllm.v1.attention.ops.flashmla import flash_mla_with_kvcache, get_mla_metadata

    pages, topk = 256, 2048
    shape = (1, size) if layout == "fp8 mixed" else (size, 1)
    cache = torch.zeros(pages, 64, 1, 656, dtype=torch.uint8, device=DEVICE)
    cache[..., :512] = torch.randn(pages, 64, 1, 512, device=DEVICE).to(torch.float8_e4m3fn).view(torch.uint8)
    cache[..., 512:528] = torch.ones(pages, 64, 1, 4, device=DEVICE).view(torch.uint8)
    cache[..., 528:] = torch.randn(pages, 64, 1, 64, device=DEVICE).bfloat16().view(torch.uint8)
    kept, differ = get_mla_metadata()[0], 0
    constant = torch.full((shape[0],), MAX_MODEL_LEN, dtype=torch.int32, device=DEVICE)
    blocks = torch.zeros(shape[0], 1, dtype=torch.int32, device=DEVICE)
    for round_ in range(8):
        query = torch.randn(*shape, 64, 576, device=DEVICE).bfloat16()
        indices = torch.randint(0, pages * 64, (*shape, topk), device=DEVICE, dtype=torch.int32)
        indices[..., 100 * (round_ + 1) :] = -1  # fewer live tokens
        outputs = [
            flash_mla_with_kvcache(
                q=query, k_cache=cache, block_table=blocks, cache_seqlens=constant, head_dim_v=512,
                tile_scheduler_metadata=schedule, is_fp8_kvcache=True, indices=indices,
            )
            for schedule in (kept, get_mla_metadata()[0])
        ]  # fmt: skip
        differ += any(not torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    return {"calls": 8, "differ": differ}


def attempt(label: dict[str, Any], call: Callable[[], Outcome]) -> Outcome:
    """Run a part; prints and returns its outcome, or its error."""
    start = time.perf_counter()
    try:
        outcome = call()
    except Exception:
        outcome = {"error": traceback.format_exc(limit=-6)}
    outcome = {**label, **outcome, "seconds": round(time.perf_counter() - start, 1)}
    print(json.dumps(outcome), flush=True)
    return outcome


def main() -> int:
    """Run everything; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = [attempt({"part": "kernel"}, partial(kernel_cases, 20 if DEVICE.type == "cpu" else 200))]
    for layout, (cache, heads) in LAYOUTS.items():
        if DEVICE.type == "cuda" and layout != "bf16":
            for size in options.sizes:
                label: Outcome = {"part": "kept schedule", "layout": layout, "bs": size}
                results.append(attempt(label, partial(kept_schedule, layout, size)))
        for tokens in options.tokens:
            made: list[V1Draft] = []  # empty if it can't be set up
            label = {"layout": layout, "K": tokens}

            def set_up(
                made: list[V1Draft] = made, cache: str = cache, heads: int = heads, tokens: int = tokens
            ) -> Outcome:
                settings = {"max_model_len": MAX_MODEL_LEN, "max_num_batched_tokens": 2048}
                made.append(V1Draft(cache, heads, tokens, str(DEVICE), **settings))
                return {}

            results.append(attempt({"part": "set up", **label}, set_up))
            for draft in made:
                results.append(attempt({"part": "compare", **label}, partial(compare, draft, options.batches, tokens)))
                for size in options.sizes:
                    timing, call = (
                        {"part": "measure", **label, "bs": size},
                        partial(measure, draft, size, options.rounds),
                    )
                    results.append(attempt({**timing, "mode": "stock"}, call))
                    with patched():
                        results.append(attempt({**timing, "mode": "plugin"}, call))
            made.clear()
            gc.collect()
        if options.json:
            options.json.write_text(json.dumps({**where(DEVICE), "results": results}, indent=1) + "\n")
    bad = [result for result in results if any(result.get(name) for name in BAD)]
    print(f"{len(results)} parts, {len(bad)} not as they should be")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
