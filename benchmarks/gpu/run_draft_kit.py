#!/usr/bin/env python3
"""sglang's own draft CUDA-graph-runner kit on a GPU, without the plugin and with it in each strategy, in one process.

The kit builds two fixtures and compares their outputs. Both have real DSA backends and pools, the real multi-step backend
and the real draft worker's `draft_forward`; the second also has the real `EAGLEDraftCudaGraphRunner`, captured and replayed.
After every replay, each draft backend's metadata is compared with what its own per-backend code computes from the runner's
static buffers. A field that differs is reported as stale.

    python -m benchmarks.gpu.run_draft_kit --json draft_kit.json

With NSA_PLUGIN_VERIFY=1 the plugin also verifies every replay itself.

It needs a complete sglang 0.5.23 with its kernels, and this plugin installed beside it. The exit status is 1 if a case fails
or a value is stale with the plugin on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
import traceback
import unittest
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from nsa_plugin import ForwardMode, entry
from nsa_plugin.bench.run import where
from nsa_plugin.host import Host
from nsa_plugin.rigs.sglang.backends import differences, engine_metadata

PREFIXES = {
    "full": ((128, 192), 2, 256),
    "padded": ((70, 130, 200), 4, 256),
    "wide": (tuple(range(60, 240, 5)), 40, 256),
    "long": ((900, 1500, 300), 4, 2048),
}
"""Prefix lengths, captured batch size and context length, by name. Only `long` is longer than a segment of 256 tokens."""


class Case(unittest.TestCase):
    """The object whose assertions the kit calls."""

    def runTest(self) -> None:
        """Never run by itself."""


class Watch:
    """Compares metadata after every replay of the real runner, and times what the host does before it."""

    def __init__(self) -> None:
        from sglang.srt.speculative.eagle_draft_cuda_graph_runner import EAGLEDraftCudaGraphRunner as Runner

        self.stale: set[str] = set()
        self.replays = 0
        self.wide_table = False
        self.host_us: list[float] = []
        replay = Runner._replay_graph

        def watched(runner: Any, shape_key: Any, forward_batch: Any) -> Any:
            out = replay(runner, shape_key, forward_batch)
            self._compare(runner)
            return out

        Runner._replay_graph = watched

    def _compare(self, runner: Any) -> None:
        multi, buffers, size = runner.draft_attn_backend, runner.buffers, runner.bs
        batch = SimpleNamespace(
            batch_size=size, seq_lens=buffers.seq_lens[:size], req_pool_indices=buffers.req_pool_indices[:size],
            seq_lens_cpu=buffers.seq_lens[:size].cpu(), spec_info=None,
        )  # fmt: skip
        self.replays += 1
        for index, backend in enumerate(multi.attn_backends):
            found = backend.forward_metadata
            self.wide_table = self.wide_table or found.page_table_1 is not None
            spare: Any = object.__new__(type(backend))
            vars(spare).update(vars(backend), decode_cuda_graph_metadata={})
            spare.init_cuda_graph_state(size, size)
            expected = engine_metadata(spare, batch, "DECODE")
            names = differences(expected, found, backend, batch, ForwardMode.DECODE)
            self.stale |= {f"backend {index}: {name}" for name in names}
        view = SimpleNamespace(**vars(batch), forward_mode=None)
        for _ in range(20):
            start = time.perf_counter()
            multi.init_forward_metadata_out_graph(view)
            self.host_us.append((time.perf_counter() - start) * 1e6)
        torch.cuda.synchronize()


def cases(steps: list[int]) -> Iterator[tuple[str, int, tuple[int, ...], int, int]]:
    """Name, steps, prefix lengths, captured size and context of each case."""
    for number in steps:
        for tag, (prefix, captured, context) in PREFIXES.items():
            yield f"steps {number} {tag}", number, prefix, captured, context


def run(number: int, prefix: tuple[int, ...], captured: int, context: int, name: str, kv: str, impl: str) -> None:
    """Run one case of the kit; raises AssertionError if the kit finds something wrong."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode as NativeMode
    from sglang.test.kits.attention_unittest.attention_methods import dsa_attention as dsa
    from sglang.test.kits.attention_unittest.runner_modes import speculative_draft_runner as draft

    fp8 = kv == "fp8"
    settings = draft.EagleDraftRunnerSettings(
        topk=1, speculative_num_steps=number, speculative_num_draft_tokens=number + 1, capture_batch_size=captured,
        hidden_size=64, max_context_len=context, vocab_size=64, dtype=torch.bfloat16, device="cuda",
        atol=dsa.DSA_SPARSE_FP8_ATOL if fp8 else dsa.DSA_SPARSE_ATOL,
        rtol=dsa.DSA_SPARSE_FP8_RTOL if fp8 else dsa.DSA_SPARSE_RTOL,
    )  # fmt: skip
    adapter = draft.EagleDraftCudaGraphRunnerAdapter(
        build_fixture=dsa.build_dsa_sparse_attention_fixture, make_model_forward=draft._make_dsa_model_forward,
        make_draft_inputs=draft._make_dsa_draft_inputs, prepare_replay_state=draft._prepare_dsa_draft_replay_state,
        make_forward_batch=draft._make_dsa_eagle_draft_forward_batch, check_case=draft._check_dsa_draft_cache_layout,
    )  # fmt: skip
    case = dsa.DSAAttentionCase(
        name=name.replace(" ", "_"), backend="dsa", forward_mode=NativeMode.DECODE, num_heads=4, num_kv_heads=1,
        page_size=dsa.DSA_PAGE_SIZE, prefix_lens=prefix,
    )  # fmt: skip
    draft.run_eagle_draft_cuda_graph_runner_case(
        Case(), case, adapter=adapter, settings=settings,
        build_kwargs={
            "max_context_len": context, "dtype": settings.dtype, "device": "cuda", "dsa_decode_backend": impl,
            "fp8_kv_cache": fp8,
        },
    )  # fmt: skip


def main() -> int:
    """Run everything; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 3, 4, 5, 6, 9])
    parser.add_argument("--kv", nargs="+", default=["bf16", "fp8"], choices=["bf16", "fp8"])
    parser.add_argument("--impl", default="flashmla_kv")
    strategies = ["without", "graph", "share", "copy"]
    parser.add_argument("--strategies", nargs="+", default=strategies, choices=strategies)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from sglang.srt.plugins import load_plugins

    watch = Watch()
    results = []
    bad = 0
    for strategy in sorted(options.strategies, key=strategies.index):
        if strategy != "without":
            load_plugins()
        host = entry._hosts.get("sglang")
        if strategy != "without":
            assert isinstance(host, Host), "the plugin's entry point did not install it"
            host.settings = dataclasses.replace(host.settings, strategy=strategy)
        for kv in options.kv:
            for name, number, prefix, captured, context in cases(options.steps):
                watch.stale, watch.replays, watch.wide_table, watch.host_us = set(), 0, False, []
                if isinstance(host, Host):
                    host.fallbacks.clear()
                    host.mismatches.clear()
                start, error = time.perf_counter(), ""
                try:
                    run(number, prefix, captured, context, name, kv, options.impl)
                except Exception:
                    error = traceback.format_exc(limit=-4)
                error = error or ("" if watch.replays else "the runner was never replayed")
                stale = sorted(watch.stale)
                fallbacks = {**host.fallbacks, **host.mismatches} if isinstance(host, Host) else {}
                bad += bool(error or fallbacks or (stale and strategy != "without"))
                host_us = statistics.median(watch.host_us) if watch.host_us else None
                results.append(
                    {"strategy": strategy, "kv": kv, "case": name, "passed": not error, "stale": stale, "host_us": host_us,
                     "wide_table": watch.wide_table, "error": error, "fallbacks": {str(key): value for key, value in fallbacks.items()}}
                )  # fmt: skip
                seconds = time.perf_counter() - start
                print(
                    "FAIL" if error else "PASS", strategy, kv, name, f"{seconds:.1f} s, host {host_us or 0:.1f} µs",
                    f"stale: {stale}" if stale else "", error, fallbacks or "", flush=True,
                )  # fmt: skip
                if options.json:
                    text = json.dumps({**where(torch.device("cuda")), "cases": results}, indent=1)
                    options.json.write_text(text + "\n")
    passed = sum(result["passed"] for result in results)
    print(f"{passed} passed, {len(results) - passed} failed; {bad} not as they should be")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
