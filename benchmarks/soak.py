"""Soak: very many replays over a random trace, watched for differences, growth of memory, and addresses that change.

    python -m benchmarks.soak --engine none|sglang --replays N [--json FILE]
    python -m benchmarks.soak --engine sglang --strategy graph --index-kpool 4 16 --width 1048576 --replays 6000 --compared 6000

The first thousand replays (`--compared`) are verified, then every hundredth. On a CPU the core is compared with a loop over requests,
rows and tokens. On a GPU its work is recorded in CUDA graphs, and compared with the plain torch reference. sglang's backends
are compared with sglang's own per-backend code.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import random
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from nsa_plugin import BatchDescriptor, ForwardMode, Geometry, PrecomputedMetadata, ReplayPlan, TokenTable, precompute
from nsa_plugin.adapters.sglang.pools import foreign_formulas, write_plan
from nsa_plugin.core.metadata import TABLES, VECTORS, differing_fields
from nsa_plugin.core.plan import PlanStrategy
from nsa_plugin.rigs.sglang import backends as kit
from nsa_plugin.trace import Round, Sizes, generate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALL_BELOW, EVERY = 1000, 100
"""Replays up to `ALL_BELOW`, or as many as are asked for, are all verified, then every `EVERY`-th."""
WARM_UP = 0.2
"""Share of the replays after which memory must not grow any more."""
SLACK_MIB, SLACK_OBJECTS = 8.0, 2000
"""Growth that is taken for the allocator's and the interpreter's own."""
DRAFT_TOKENS = 4


class Subject(Protocol):
    """Prepares replays of one mode with one strategy, for all captured sizes."""

    name: str

    def replay(self, entry: Round) -> None:
        """Prepare a round."""

    def differences(self, entry: Round) -> list[str]:
        """Names of what is wrong after `replay(entry)`."""

    def addresses(self) -> list[int]:
        """Addresses of all buffers."""


class Core:
    """The core by itself. On a GPU its plans are recorded in CUDA graphs."""

    def __init__(self, mode: ForwardMode, strategy: PlanStrategy, offsets: tuple[int, ...], sizes: Sizes) -> None:
        self.name = f"core {mode.value} {strategy}" + (" exact" if offsets else "")
        self._mode, self._offsets = mode, offsets
        self._steps = 3 if mode is ForwardMode.DECODE else 1
        self.geometry = Geometry(_index_topk(sizes), sizes.page_size, sizes.width)
        self._table = _table(sizes)
        self.plans: dict[int, Any] = {}
        for size in sizes.captured:
            static = self._batch(torch.ones(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64))
            planes = len(static.offsets)
            count = self._steps if strategy == "copy" else planes
            made = [PrecomputedMetadata.allocate(static, self.geometry) for _ in range(count)]
            consumers = list(made[0].steps) if planes > 1 else [entry.steps[0] for entry in made]
            if strategy == "share" and planes == 1:
                consumers *= self._steps
            plan = ReplayPlan(static, self.geometry, consumers, strategy=strategy)
            plan.run(static)
            self.plans[size] = (plan, static, consumers, _recorded(lambda plan=plan, static=static: plan.run(static)))

    def replay(self, entry: Round) -> None:
        """Load the static buffers, then run the plan or the graph that recorded it."""
        plan, static, _, graph = self.plans[len(entry.seq_lens)]
        static.seq_lens.copy_(torch.tensor(entry.seq_lens))
        static.slots.req_pool_indices.copy_(torch.tensor(entry.requests))
        if graph is None:
            plan.run(static)
        else:
            graph.replay()

    def differences(self, entry: Round) -> list[str]:
        """Fields that differ from the naive loop (CPU) or from the reference (GPU)."""
        _, static, consumers, _ = self.plans[len(entry.seq_lens)]
        if DEVICE.type == "cuda":
            made = precompute(static, self.geometry, impl="reference")
            return [name for i, step in enumerate(consumers) for name in differing_fields(made, step, i)]
        from tests.batches import naive

        wrong = []
        for index, step in enumerate(consumers):
            offset = static.step_offsets[index] if static.step_offsets else 0
            expected: dict[str, Any] = naive(static, self.geometry, offset)
            for name in VECTORS + TABLES:
                values = expected[name]
                have = getattr(step, name).tolist()
                if name in TABLES:
                    equal = all(row[: len(live)] == live for row, live in zip(have, values, strict=True))
                else:
                    equal = have[: len(values)] == values
                wrong += [] if equal else [f"step {index}: {name}"]
        return wrong

    def addresses(self) -> list[int]:
        """Addresses of every vector and table of every size."""
        return [
            getattr(step, name).data_ptr()
            for _, _, consumers, _ in self.plans.values()
            for step in consumers
            for name in VECTORS + TABLES
        ]

    def _batch(self, seq_lens: torch.Tensor, requests: torch.Tensor) -> BatchDescriptor:
        slots = TokenTable(self._table, requests.to(DEVICE))
        draft_tokens = 1 if self._mode is ForwardMode.DECODE else DRAFT_TOKENS
        return BatchDescriptor(
            self._mode, seq_lens.numel(), seq_lens.to(DEVICE), slots, self._steps, self._offsets, draft_tokens
        )


class Sglang:
    """sglang's real backends with the adapter installed. On a GPU, what it records runs in CUDA graphs."""

    def __init__(self, native: str, sizes: Sizes, index_kpool: int = 1) -> None:
        self.name, self._native = f"sglang {native}" + (f", pools of {index_kpool}" if index_kpool > 1 else ""), native
        config = kit.Config(
            sizes.width, sizes.max_requests, max(sizes.captured), DRAFT_TOKENS, _index_topk(sizes), sizes.page_size,
            index_kpool=index_kpool,
        )  # fmt: skip
        self._pooled_extend = index_kpool > 1 and native == "DRAFT_EXTEND_V2"
        table = kit.req_to_token(config, DEVICE)
        self._fresh = kit.make_backend(config, table)
        decode = native == "DECODE"
        self._owner: Any = kit.make_multi_step(config, table, 4) if decode else kit.make_backend(config, table)
        self._backends = self._owner.attn_backends if decode else [self._owner]
        self._captured: dict[int, Any] = {}
        for size in sizes.captured:
            static = self._batch(torch.ones(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64))
            self._owner.init_forward_metadata_out_graph(static, in_capture=True)
            graph = None
            if DEVICE.type == "cuda":
                self._owner.init_forward_metadata_in_graph(static)
                graph = _recorded(lambda static=static: self._owner.init_forward_metadata_in_graph(static))
            self._captured[size] = (static, kit.replay_view(static), graph)

    def replay(self, entry: Round) -> None:
        """Prepare a round as sglang's runners do."""
        static, view, graph = self._captured[len(entry.seq_lens)]
        lengths = torch.tensor(entry.seq_lens)
        if self._pooled_extend:
            lengths.clamp_(min=DRAFT_TOKENS)
            static.spec_info.num_accept_tokens.copy_(1 + lengths % DRAFT_TOKENS)
        static.seq_lens.copy_(lengths)
        static.req_pool_indices.copy_(torch.tensor(entry.requests))
        self._owner.init_forward_metadata_out_graph(view)
        if graph is not None:
            graph.replay()

    def differences(self, entry: Round) -> list[str]:
        """Values that differ from sglang's own per-backend code."""
        from nsa_plugin.adapters.sglang.reports import MODES

        static, _, _ = self._captured[len(entry.seq_lens)]
        expected = kit.engine_metadata(self._fresh, static, self._native)
        mode = MODES[self._native]
        return [
            name
            for backend in self._backends
            for name in kit.differences(expected, backend.forward_metadata, backend, static, mode)
        ]

    def addresses(self) -> list[int]:
        """Addresses of every tensor in the metadata of every size."""
        return [
            value.data_ptr()
            for backend in self._backends
            for size in self._captured
            for metadata in (backend.decode_cuda_graph_metadata[size],)
            for value in (*vars(metadata).values(), *vars(write_plan(metadata) or SimpleNamespace()).values())
            if isinstance(value, torch.Tensor)
        ]

    def _batch(self, seq_lens: torch.Tensor, requests: torch.Tensor) -> Any:
        rows = seq_lens.numel() * (1 if self._native == "DECODE" else DRAFT_TOKENS)
        made = kit.make_batch(self._native, seq_lens.to(DEVICE), requests.to(DEVICE), rows)
        if self._pooled_extend:
            accepted = torch.ones(seq_lens.numel(), dtype=torch.int32, device=DEVICE)
            made.spec_info = SimpleNamespace(num_accept_tokens=accepted)
        return made


def soak(subjects: list[Subject], replays: int, sizes: Sizes, seed: int, compared: int = ALL_BELOW) -> dict[str, Any]:
    """Replay; the subjects take turns. Returns what happened; "ok" says whether all is well."""
    every_size = (Round((1,) * size, (0,) * size, 0) for size in sizes.captured for _ in subjects)
    rounds = itertools.chain(every_size, rounds_of(sizes, seed))
    before = {subject.name: subject.addresses() for subject in subjects}
    wrong: dict[str, int] = {}
    verified = moved = 0
    warm: tuple[float, int, int] | None = None
    start = time.perf_counter()
    for index in range(replays):
        subject, entry = subjects[index % len(subjects)], next(rounds)
        subject.replay(entry)
        if index < compared or index // len(subjects) % EVERY == 0:
            verified += 1
            for name in subject.differences(entry):
                wrong[f"{subject.name}: {name}"] = wrong.get(f"{subject.name}: {name}", 0) + 1
            moved += subject.addresses() != before[subject.name]
        if warm is None and index >= replays * WARM_UP:
            warm = _memory()
    end = _memory()
    growth = [after - then for after, then in zip(end, warm or end, strict=True)]
    ok = not wrong and not moved and growth[0] < SLACK_MIB and growth[1] < SLACK_OBJECTS and growth[2] == 0
    return {
        "ok": ok, "subjects": [subject.name for subject in subjects], "replays": replays, "verified": verified,
        "seconds": round(time.perf_counter() - start, 1), "differences": wrong, "address_changes": moved, "seed": seed,
        "growth_after_warm_up": dict(zip(("host_mib", "python_objects", "gpu_bytes"), growth, strict=True)),
    }  # fmt: skip


def rounds_of(sizes: Sizes, seed: int) -> Iterator[Round]:
    """An endless random trace."""
    while True:
        yield from generate(10_000, DRAFT_TOKENS + 1, sizes, seed)
        seed += 1


def core_subjects(sizes: Sizes) -> list[Subject]:
    """Subjects for every mode, with strategies in turn, and one with exact step lengths."""
    return [
        Core(ForwardMode.DECODE, "share", (), sizes),
        Core(ForwardMode.DECODE, "copy", (), sizes),
        Core(ForwardMode.DECODE, "share", (1, 2, 3), sizes),
        Core(ForwardMode.TARGET_VERIFY, "share", (), sizes),
        Core(ForwardMode.DRAFT_EXTEND, "share", (), sizes),
    ]


def sglang_subjects(sizes: Sizes, pools: Sequence[int]) -> list[Subject]:
    """Subjects for the three paths of the adapter, which must be installed, at each number of tokens that share an index key."""
    return [Sglang(native, sizes, k) for k in pools for native in ("DECODE", "TARGET_VERIFY", "DRAFT_EXTEND_V2")]


def _pools(asked: Sequence[int] | None, strategy: str) -> Sequence[int]:
    """Tokens that share an index key: what is asked for, or 1, and 4 if sglang has them and the strategy takes them."""
    if asked is None:
        return (1, 4) if strategy != "auto" and not foreign_formulas(4) else (1,)
    for k in asked:
        if problem := k > 1 and foreign_formulas(k):
            raise SystemExit(f"--index-kpool {k}: {problem}")
    return asked


def _index_topk(sizes: Sizes) -> int:
    """Top-k of DeepSeek V3.2, or less where all sequences would be shorter than that."""
    return 2048 if sizes.width > 4096 else 256


def _table(sizes: Sizes) -> torch.Tensor:
    config = kit.Config(width=sizes.width, max_requests=sizes.max_requests, page_size=sizes.page_size)
    return kit.req_to_token(config, DEVICE)


def _recorded(work: Any) -> Any:
    if DEVICE.type != "cuda":
        return None
    from nsa_plugin.bench.cell import capture

    return capture(work)


def _memory() -> tuple[float, int, int]:
    """MiB of the process, number of Python objects, bytes on the GPU."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    on_gpu = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
    return pages * resource.getpagesize() / 2**20, len(gc.get_objects()), on_gpu


def main() -> int:
    """Run a soak; returns the exit status, 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("none", "sglang"), default="none")
    parser.add_argument("--replays", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512 if DEVICE.type == "cpu" else 16384)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--strategy", choices=("auto", "graph", "share", "copy"), default="auto", help="of sglang")
    parser.add_argument(
        "--index-kpool",
        type=int,
        nargs="+",
        help="of sglang: tokens that share an index key (default: 1; also 4, unless auto)",
    )
    parser.add_argument("--compared", type=int, default=ALL_BELOW, help="so many replays at first are all compared")
    parser.add_argument("--verify", type=int, default=0, help="let the sglang adapter verify every so many replays too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes = Sizes(width=options.width)
    if options.engine == "none":
        result = soak(core_subjects(sizes), options.replays, sizes, options.seed, options.compared)
    else:
        from nsa_plugin.host import Host
        from nsa_plugin.rigs.requirements import require
        from nsa_plugin.rigs.sglang.backends import stand_ins
        from nsa_plugin.settings import Settings

        require("sglang")
        with stand_ins():
            host = Host(Settings(strategy=options.strategy, verify=options.verify))
            adapter = host.manager.adapters()["sglang"]
            if problems := adapter.install(host):
                raise SystemExit("; ".join(problems))
            subjects = sglang_subjects(sizes, _pools(options.index_kpool, options.strategy))
            result = soak(subjects, options.replays, sizes, options.seed, options.compared)
            result["fallbacks"], result["mismatches"] = sum(host.fallbacks.values()), sum(host.mismatches.values())
            result["ok"] = result["ok"] and not host.fallbacks and not host.mismatches
            adapter.undo()
    from nsa_plugin.bench.run import where

    result = {**where(DEVICE), **result, "command": f"benchmarks.soak {' '.join(sys.argv[1:])}"}
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    sys.exit(main())
