"""What monitoring adds to the host time of a replay: `python -m benchmarks.overhead [FILE.json]`.

It needs no GPU and no engine. A replay is a call of an empty function, which `Host.instrument` wraps as it does for an
adapter. A draft of vLLM is a call of empty methods, which the adapter wraps as it does the engine's. With all metrics off
nothing is wrapped.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from nsa_plugin.adapters.vllm.reports import report
from nsa_plugin.adapters.vllm.v1 import proposer as v1_proposer
from nsa_plugin.adapters.vllm.v1.verified import watch as v1_watch
from nsa_plugin.adapters.vllm.v2.verified import watch as v2_watch
from nsa_plugin.bench.run import where
from nsa_plugin.host import Host
from nsa_plugin.settings import Settings

V1_STEPS = (3, 7)
"""Draft steps after the first, in drafts of 4 and of 8 tokens."""
CALLS = 200_000
REPEATS = 9


def _nothing(batch: Any) -> None:
    pass


def measure(metrics: frozenset[str]) -> dict[str, float]:
    """Nanoseconds that `metrics` add to a call, and that the flushing thread spends per replay."""
    host = Host(Settings(metrics=metrics))
    monitored = host.instrument(_nothing, "sglang", "draft decode", "graph", 3)
    assert (monitored is _nothing) == (not metrics)
    drafts = {f"vllm_v1_added_ns_per_draft_of_{steps}": _v1_draft(host, steps) for steps in V1_STEPS}
    drafts["vllm_v2_added_ns_per_draft"] = _v2_draft(host)
    plain, with_it, flush = [], [], []
    added: dict[str, list[float]] = {name: [] for name in drafts}
    for _ in range(REPEATS):
        plain.append(_per_call(_nothing))
        with_it.append(_per_call(monitored))
        for name, (bare, watched) in drafts.items():
            added[name].append(0.0 if watched is bare else _per_call(watched) - _per_call(bare))
        start = time.perf_counter()
        host.flush_metrics()
        flush.append((time.perf_counter() - start) / CALLS * 1e9)
    return {
        "added_ns": statistics.median(with_it) - statistics.median(plain),
        "flush_ns_in_background": statistics.median(flush) if "prometheus" in metrics else 0.0,
        **{name: statistics.median(values) for name, values in added.items()},
    }


def _v1_draft(host: Host, steps: int) -> tuple[Callable[[Any], None], Callable[[Any], None]]:
    """A draft of Model Runner V1 whose methods are empty: bare, and watched."""

    def update(proposer: Any, positions: Any, batch: Any, batch_size: int, rows: int, block_size: int) -> None:
        pass

    def build(proposer: Any, common_attn_metadata: Any, draft_index: int = 0) -> None:
        pass

    proposer = SimpleNamespace(num_speculative_tokens=steps + 1)
    patch: Any = SimpleNamespace(
        update=lambda: update,
        build=lambda: build,
        serving=lambda proposer: proposer,
        report=report(host, v1_proposer.PATH),
    )

    def draft(update: Callable[..., None], build: Callable[..., None]) -> Callable[[Any], None]:
        def call(batch: Any) -> None:
            build(proposer, batch)
            for index in range(1, steps + 1):
                update(proposer, None, batch, 1, 1, 64)
                build(proposer, batch, draft_index=index)

        return call

    watched = v1_watch.watched(host, patch, "copy")
    bare = draft(update, build)
    return bare, bare if watched == (update, build) else draft(*watched)


def _v2_draft(host: Host) -> tuple[Callable[[Any], None], Callable[[Any], None]]:
    """A draft of Model Runner V2 that a graph replays, whose one method is empty: bare, and watched."""

    def decode(*arguments: Any) -> None:
        pass

    class Speculator:
        block_tables = attn_groups = None
        num_speculative_steps = 4
        device = torch.device("cpu")

    speculator, descriptor = Speculator(), SimpleNamespace(cg_mode=SimpleNamespace(name="FULL"), num_reqs=4)
    watch = v2_watch.watch(host, lambda: True)
    begin = decode if watch is None else watch.begin(decode)
    if watch is not None:
        watch.count(speculator, 4)
    bare, watched = (
        lambda batch, call=call: call(speculator, 4, False, descriptor, None, None, 4) for call in (decode, begin)
    )
    return bare, bare if begin is decode else watched


def _per_call(call: Callable[[Any], None]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call(None)
    return (time.perf_counter() - start) / CALLS * 1e9


def main() -> None:
    """Measure without metrics, with Prometheus and, where there is a GPU, with NVTX."""
    results: dict[str, Any] = {**where(torch.device("cuda" if torch.cuda.is_available() else "cpu")), "settings": {}}
    choices = ["off", "prometheus"] + (["nvtx", "prometheus,nvtx"] if torch.cuda.is_available() else [])
    for choice in choices:
        metrics = frozenset(choice.split(",")) - {"off"}
        results["settings"][choice] = measure(metrics)
    text = json.dumps(results, indent=1)
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n")


if __name__ == "__main__":
    main()
