#!/usr/bin/env python3
"""vLLM's real V2 speculator on a GPU: the metadata of its draft steps, as shipped and with this plugin, in one process.

Real `MTPSpeculator`, `BlockTables`, FlashMLA-sparse and indexer builders, DeepGEMM schedule and Triton kernels, with a
stand-in for the draft model and the draft's CUDA graphs really captured. Four ways in turn:

    stock       as shipped: metadata rebuilt and a graph replayed for every draft step
    kept        where vLLM does not fuse: the first step's metadata is kept, one metadata kernel (and DeepGEMM's schedule and
                its copy) for every further step
    in place    FlashMLA-sparse has its hook: the whole draft is one graph, each group updates its metadata itself
    one kernel  the plugin as it is installed: that graph with one metadata kernel (and DeepGEMM's schedule) a step

First the graphs of the latter three are replayed over changing batches (sizes, lengths up to the model's, requests, block
tables; buffers poisoned in between), and what every step's model saw is compared with the rebuild; DeepGEMM's schedule
only in full batches, because vLLM's updates in place let rows of padding grow and its rebuild does not. The last is also
compared with the third, rows of padding included. Then all are timed.

    python tests/gpu/run_vllm_draft.py --json vllm_draft.json

Needs a complete vLLM 0.33.0 and this repository as the working directory, on PYTHONPATH. Without a GPU the graphs are
emulated, small, and nothing is timed (VLLM_TARGET_DEVICE=cpu TRITON_INTERPRET=1). Exit status 1 if a value differs.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

tests = sys.modules["tests"] = ModuleType("tests")  # ours, though an installed distribution may have one of that name
tests.__path__ = [str(Path(__file__).parents[1])]
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["VLLM_PLUGINS"] = ""  # this script says when the plugin is installed

import torch
from vllm.config import set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from nsa_plugin.adapters.probe import installed_version
from nsa_plugin.adapters.vllm import capabilities
from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.bench.measure import gpu_time, host_time
from nsa_plugin.bench.run import where
from nsa_plugin.host import Host
from tests.vllm.harness import Draft, DraftModel, Graphs, Sizes

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
LAYOUTS = {"fp8 64 heads": ("fp8_ds_mla", 64), "fp8 16 heads": ("fp8_ds_mla", 16), "bf16 64 heads": ("auto", 64)}
WAYS = ("stock", "kept", "in place", "one kernel")
FUSED = ("in place", "one kernel")
POISON = 7


class StandIn(DraftModel):
    """Writes down whole block tables; logits without a sync."""

    columns = 1 << 20

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Some logits."""
        return hidden[:, :128].float()


class Captured(Graphs):
    """The decode graph, really captured where there is a GPU; what its steps saw is kept after each replay."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self.seen: list[dict[str, torch.Tensor]] = []
        self._static: list[dict[str, torch.Tensor]] = []

    def capture(self, record: bool) -> None:
        """Warm up and capture as vLLM does, each with fresh metadata."""
        model = self._draft.model
        model.record = record
        self._metadata, self._slots = self.inputs()
        if not GPU:
            self._static = model.seen
            return
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.body()
            self.body()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._metadata, self._slots = self.inputs()
        model.seen.clear()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.body()
        self._static = list(model.seen)

    def run_fullgraph(self, descriptor: Any) -> None:
        """Replay, and keep copies of what was seen."""
        if GPU:
            self.graph.replay()
        else:
            self._static.clear()
            self.body()
        self.seen += [{name: value.clone() for name, value in step.items()} for step in self._static]


class Batches:
    """Changing batches, the same for every draft that is given one."""

    def __init__(self, sizes: Sizes, seed: int) -> None:
        self._sizes = sizes
        self._random = torch.Generator().manual_seed(seed)

    def new(self, size: int | None = None, plain: bool = False) -> dict[str, Any]:
        """Number of requests, their slots in the runner's tables, lengths, and the tables themselves."""
        sizes, random = self._sizes, self._random
        most, blocks = sizes.model_len, sizes.model_len // 64
        size = int(torch.randint(1, sizes.captured + 1, (), generator=random)) if size is None else size
        lengths = torch.randint(most // 8, most // 4, (size,), generator=random, dtype=torch.int32)
        if not plain:
            edge = torch.randint(0, 6, (size,), generator=random)
            lengths[edge == 0] = torch.randint(1, 200, (size,), generator=random, dtype=torch.int32)[edge == 0]
            lengths[edge == 1] = most - torch.randint(0, 5, (size,), generator=random, dtype=torch.int32)[edge == 1]
            lengths[edge == 2] = lengths[edge == 2] // 64 * 64
        return {
            "size": size, "lengths": lengths.clamp_(1, most), "rows": torch.randperm(sizes.requests, generator=random)[:size],
            "tables": torch.randint(1, 1 << 18, (sizes.requests, blocks), generator=random, dtype=torch.int32),
        }  # fmt: skip


def prepare(draft: Draft, batch: dict[str, Any], poison: bool = False) -> None:
    """Leave the runner's buffers as vLLM leaves them before the draft steps of `batch`."""
    speculator, tables, size = draft.speculator, draft.tables, batch["size"]
    buffers = speculator.input_buffers
    if poison:
        tables.slot_mappings.fill_(POISON)
        for builder in draft.builders:
            for name, value in vars(builder).items():
                if name in ("req_id_per_token_buffer", "decode_seq_lens_buffer", "decode_lens_buffer",
                            "per_req_decode_lens_buffer", "expanded_block_table_buffer"):  # fmt: skip
                    value.fill_(POISON)
    tables.block_tables[0].gpu.copy_(batch["tables"], non_blocking=True)
    speculator.idx_mapping.fill_(-1)
    speculator.idx_mapping[:size].copy_(batch["rows"])
    tables.gather_block_tables(speculator.idx_mapping[:size], num_reqs_padded=draft.sizes.captured)
    buffers.seq_lens.fill_(0)
    buffers.positions.fill_(0)
    buffers.seq_lens[:size].copy_(batch["lengths"])
    buffers.positions[:size].copy_(batch["lengths"] - 1)
    starts = torch.arange(draft.sizes.requests + 1, dtype=torch.int32, device=DEVICE)
    buffers.query_start_loc.copy_(starts.clamp_(max=size))


def run(draft: Draft, batch: dict[str, Any]) -> None:
    """The draft steps of a batch that was prepared."""
    speculator, size = draft.speculator, draft.sizes.captured
    fused = speculator.supports_decode_metadata_update
    steps = speculator._fused_multi_step_decode if fused else speculator._multi_step_decode
    descriptor = BatchExecutionDescriptor(CUDAGraphMode.FULL, size, size, 1)
    steps(batch["size"], False, descriptor, None, batch["lengths"], draft.tokens)


def make(layout: str, tokens: int, sizes: Sizes) -> Draft:
    """A speculator whose request slots all have blocks."""
    draft = Draft(*LAYOUTS[layout], tokens, sizes, StandIn, Captured)
    for request in range(sizes.requests):
        draft.tables.append_block_ids(request, ([1] * (sizes.model_len // 64),), True)
    draft.tables.apply_staged_writes()
    return draft


def compare(reference: Draft, draft: Draft, batches: int, seed: int) -> dict[str, Any]:
    """Entries of each field that differ from the reference over so many batches; every other batch is a full one."""
    rebuilt = not reference.speculator.supports_decode_metadata_update
    source = Batches(draft.sizes, seed)
    wrong: dict[str, torch.Tensor] = {}
    entries: Counter[str] = Counter()
    advanced = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for number in range(batches):
        batch = source.new(size=draft.sizes.captured if number % 2 else None)
        live = slice(batch["size"] if rebuilt else None)
        for each in (reference, draft):
            each.graphs.seen.clear()
            prepare(each, batch, poison=each is draft)
            run(each, batch)
        assert len(reference.graphs.seen) == len(draft.graphs.seen) == draft.tokens - 1
        first, last = reference.graphs.seen[0], reference.graphs.seen[-1]
        advanced += (first["positions"] != last["positions"]).any()
        for want, have in zip(reference.graphs.seen, draft.graphs.seen, strict=True):
            assert want.keys() == have.keys()
            padded = rebuilt and batch["size"] < draft.sizes.captured
            names = want.keys() - ({"schedule"} if padded else set())
            for name in names:
                unequal = (want[name][live] != have[name][live]).sum()
                wrong[name] = wrong.get(name, 0) + unequal
                entries[name] += want[name][live].numel()
    assert draft.tokens == 2 or int(advanced), "the steps did not differ: nothing was compared"
    return {
        "batches": batches,
        "different": {name: int(count) for name, count in wrong.items()},
        "compared": dict(entries),
    }


def measure(draft: Draft, seed: int) -> dict[str, Any]:
    """Host time, GPU time, launches and time to completion of a draft of the captured size, and its kernels by name."""
    batch = Batches(draft.sizes, seed).new(draft.sizes.captured, plain=True)
    prepare(draft, batch)

    def call() -> None:
        run(draft, batch)

    call()
    host = host_time([call])
    prepare(draft, batch)
    gpu, kernels = gpu_time([call])
    prepare(draft, batch)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(50):
        call()
    torch.cuda.synchronize()
    wall = (time.perf_counter() - start) / 50 * 1e6
    steps = draft.tokens - 1
    return {
        "host_us": host, "gpu_us": gpu, "kernels": kernels, "wall_us": wall,
        "gpu_us_per_step": None if gpu is None else gpu / steps, "kernels_per_step": None if kernels is None else kernels / steps,
        "by_kernel": by_kernel(call, steps),
    }  # fmt: skip


def by_kernel(call: Any, steps: int) -> dict[str, dict[str, float]]:
    """Launches and microseconds of each kernel, per draft step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    launches: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type.name == "CUDA":
            launches[event.name[:100]] += 1
            times[event.name[:100]] += event.device_time
    return {name: {"launches": launches[name] / steps, "us": times[name] / steps} for name in launches}


def main() -> int:
    """Run everything; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 8], help="speculative tokens (K)")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--batch-size", type=int, default=32 if GPU else 4, help="the captured size")
    parser.add_argument("--replays", type=int, default=1000 if GPU else 8, help="changing batches for each graph")
    parser.add_argument("--seconds", type=float, default=420, help="begin no further layout after so many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    size = options.batch_size
    sizes = Sizes(DEVICE, size, 65536, max(128, size), 2048) if GPU else Sizes(DEVICE, size, 1024, 16, 256)
    begun, results, bad = time.perf_counter(), [], 0
    environment = {**where(DEVICE), "batch_size": size, "model_len": sizes.model_len, "seed": options.seed}
    environment["versions"]["vllm"] = installed_version("vllm")
    covered = capabilities.uncovered_speculator
    for layout in options.layouts:
        for tokens in options.tokens:
            if time.perf_counter() - begun > options.seconds:
                print(f"SKIP {layout}, K = {tokens}: over {options.seconds:.0f} s", flush=True)
                bad += 1
                continue
            entry: dict[str, Any] = {"layout": layout, "tokens": tokens}
            results.append(entry)
            adapter, host = VllmAdapter(), Host()
            start = time.perf_counter()
            try:
                drafts: dict[str, Draft] = {}
                for way in WAYS:
                    alone = way == "in place"
                    capabilities.uncovered_speculator = (lambda speculator: "measured without") if alone else covered
                    drafts[way] = draft = make(layout, tokens, sizes)
                    assert draft.speculator.supports_decode_metadata_update == (way in FUSED)
                    if way == "stock":  # which stays so
                        draft.speculator._multi_step_decode = draft.speculator._multi_step_decode
                    if way == "kept":  # made before, so that vLLM does not fuse it
                        assert adapter.install(host) == []
                    with set_current_vllm_config(draft.config), torch.inference_mode():
                        draft.graphs.capture(record=True)
                        if way != "stock":
                            entry[way] = compare(drafts["stock"], draft, options.replays, options.seed)
                            checks = [entry[way]]
                            if way == "one kernel":
                                few = max(options.replays // 4, 2)
                                checks.append(compare(drafts["in place"], draft, few, options.seed + 1))
                                entry[way]["against in place"] = checks[-1]
                            bad += sum(any(check["different"].values()) for check in checks)
                        else:
                            entry[way] = {}
                if GPU:
                    for way, draft in drafts.items():
                        capabilities.uncovered_speculator = (
                            (lambda speculator: "measured without") if way == "in place" else covered
                        )
                        with set_current_vllm_config(draft.config), torch.inference_mode():
                            draft.graphs.capture(record=False)
                            entry[way] |= measure(draft, options.seed)
                entry["fallbacks"] = {str(cause): count for cause, count in host.fallbacks.items()}
                bad += bool(host.fallbacks)
            except Exception:
                entry["error"] = traceback.format_exc(limit=-6)
                bad += 1
            finally:
                adapter.undo()
                capabilities.uncovered_speculator = covered
            report(entry, time.perf_counter() - start)
            if options.json:  # after each, in case the next does not end
                options.json.write_text(json.dumps({**environment, "results": results}, indent=1) + "\n")
    print(f"{len(results)} of {len(options.layouts) * len(options.tokens)} run; {bad} not as they should be")
    return 1 if bad else 0


def report(entry: dict[str, Any], seconds: float) -> None:
    """Print a result in a few lines."""
    print(f"{entry['layout']}, K = {entry['tokens']} ({seconds:.1f} s)", entry.get("fallbacks") or "", flush=True)
    for way in WAYS:
        got = entry.get(way, {})
        line = ", ".join(
            f"{name} {got[name]:.1f}" for name in ("host_us", "gpu_us", "kernels", "wall_us") if got.get(name)
        )
        for check in (got, got.get("against in place", {})):
            if "different" in check:
                different = {name: count for name, count in check["different"].items() if count} or "none"
                line += (
                    f"; {check['batches']} batches, {sum(check['compared'].values())} entries, different: {different}"
                )
        print(f"    {way}: {line}", flush=True)
    if "error" in entry:
        print(entry["error"], flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
