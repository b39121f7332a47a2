"""Several model runners in one process: target and draft, stream groups, two-batch overlap, backends that come and go."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_plugin import BatchDescriptor
from nsa_plugin.adapters.attached import Attached
from nsa_plugin.adapters.sglang import hooked, reports
from nsa_plugin.adapters.sglang.adapter import SglangAdapter
from nsa_plugin.host import Host
from nsa_plugin.rigs.sglang import backends as kit
from tests.faults import Faults
from tests.sglang.conftest import Install

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FIELDS = (
    "cache_seqlens_int32", "cu_seqlens_k", "page_table_1", "real_page_table", "dsa_cache_seqlens_int32",
    "dsa_cu_seqlens_k", "dsa_seqlens_expanded", "paged_mqa_schedule_metadata", "topk_v2_plan",
)  # fmt: skip
DRAFT_TOKENS = kit.Config().draft_tokens
Tape = list[Callable[[], None]]


@dataclass
class Runner:
    """One owner of backends, with the token table, sizes and modes of its model runner."""

    config: kit.Config
    num_steps: int
    modes: tuple[str, ...]
    sizes: tuple[int, ...]
    seed: int

    def __post_init__(self) -> None:
        self.table = kit.req_to_token(self.config, DEVICE, self.seed)
        self.reference = kit.make_backend(self.config, self.table)
        self.owner: Any = (
            kit.make_multi_step(self.config, self.table, self.num_steps)
            if self.modes == ("DECODE",)
            else kit.make_backend(self.config, self.table)
        )
        self.backends: Sequence[Any] = getattr(self.owner, "attn_backends", [self.owner])

    def capture(self, mode: str, size: int) -> None:
        """As sglang's runners: every request at the fill length 1, request 0."""
        self.owner.init_forward_metadata_out_graph(self.batch(mode, [1] * size, [0] * size), in_capture=True)

    def batch(self, mode: str, lengths: Sequence[int], requests: Sequence[int]) -> Any:
        """A batch in this runner's table."""
        tokens = len(lengths) * (1 if mode == "DECODE" else self.config.draft_tokens)
        lens, indices = (torch.tensor(list(values), device=DEVICE) for values in (lengths, requests))
        return kit.make_batch(mode, lens, indices, tokens)

    def random_batch(self, mode: str, size: int, rng: random.Random) -> Any:
        """Any lengths that the table has room for, of any requests."""
        longest = self.config.width - self.config.draft_tokens
        requests = rng.sample(range(self.config.max_requests), size)
        return self.batch(mode, [rng.randint(1, longest) for _ in range(size)], requests)

    def wrong(self, mode: str, live: Any) -> list[str]:
        """What differs from sglang's own code on a backend of its own."""
        expected = kit.engine_metadata(self.reference, live, mode)
        ours = reports.MODES[mode]
        return [
            name
            for backend in self.backends
            for name in kit.differences(expected, backend.forward_metadata, backend, live, ours)
        ]


class Owner:
    """Something that state is attached to."""


TARGET_MODES = ("TARGET_VERIFY", "DRAFT_EXTEND_V2")
RUNNERS = (
    (kit.Config(), 4, ("DECODE",), (4, 2, 1), 0),
    (kit.Config(width=512, max_requests=8, max_batch_size=4, index_topk=128), 6, ("DECODE",), (4, 3), 1),
    (kit.Config(decode_impl="flashmla_kv"), 2, ("DECODE",), (2,), 2),
    (kit.Config(), 1, ("TARGET_VERIFY",), (4, 1), 3),
    (kit.Config(width=512, draft_tokens=3, decode_impl="flashmla_kv"), 1, ("DRAFT_EXTEND_V2",), (4, 2), 4),
    (kit.Config(draft_tokens=5), 1, ("TARGET_VERIFY",), (3,), 0),
)  # fmt: skip


@pytest.mark.parametrize("strategy", ["auto", "copy"])
def test_interleaved_runners_keep_their_own_state(install: Install, strategy: str) -> None:
    """Other sizes, widths, page tables and numbers of steps, captured and replayed in any order."""
    host, _ = install(strategy)
    runners = [Runner(*parameters) for parameters in RUNNERS]
    rng = random.Random(7)
    captures = [(runner, mode, size) for runner in runners for mode in runner.modes for size in runner.sizes]
    rng.shuffle(captures)
    for runner, mode, size in captures:
        runner.capture(mode, size)
    held: list[set[int]] = []
    for _ in range(2):
        rng.shuffle(captures)
        for runner, mode, size in captures:
            live = runner.random_batch(mode, size, rng)
            runner.owner.init_forward_metadata_out_graph(kit.replay_view(live))
            assert runner.wrong(mode, live) == []
    for runner in runners:
        held.append({address for backend in runner.backends for address in addresses(backend)})
    assert sum(map(len, held)) == len(set().union(*held)), "two runners write to the same buffer"
    assert not host.fallbacks


def test_a_failure_in_one_runner_leaves_the_others_on_their_strategy(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = Runner(*RUNNERS[0]), Runner(*RUNNERS[1])
    faults = Faults()
    host, _ = install("share", faults)
    faults.failing = (1,)
    first.capture("DECODE", 4)
    faults.failing = ()
    second.capture("DECODE", 4)
    rng = random.Random(3)
    for _ in range(3):
        for runner in (first, second):
            live = runner.random_batch("DECODE", 4, rng)
            runner.owner.init_forward_metadata_out_graph(kit.replay_view(live))
            assert runner.wrong("DECODE", live) == []
    assert [(key[2:4], count) for key, count in host.fallbacks.items()] == [(("replay", "share"), 1)]
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1 and "planted at call 1" in errors[0]


@pytest.mark.parametrize("mode", TARGET_MODES)
def test_stream_groups_of_prefill_decode_multiplexing(install: Install, mode: str) -> None:
    """One backend per stream, all on the runner's static buffers: `decode_attn_backend_group` of the model runner."""
    host, _ = install("auto")
    parameters = (kit.Config(), 1, (mode,), (4, 2), 5)
    group = [Runner(*parameters) for _ in range(3)]
    for size in (4, 2):
        for runner in group:
            runner.capture(mode, size)
    rng = random.Random(1)
    last: dict[int, Any] = {}
    for turn, stream in enumerate((0, 1, 2, 0, 1)):
        last[stream] = live = group[stream].random_batch(mode, (4, 2)[turn % 2], rng)
        group[stream].owner.init_forward_metadata_out_graph(kit.replay_view(live))
        for other, batch in last.items():  # what another stream's graph may still be reading is as it was
            assert group[other].wrong(mode, batch) == []
    assert not host.fallbacks


def addresses(backend: Any) -> list[int]:
    """Of the buffers of a backend's metadata."""
    values = (getattr(backend.forward_metadata, name) for name in FIELDS)
    return [value.data_ptr() for value in values if value is not None]


class TapeHost(Host):
    """Emulates CUDA graphs: while `tape` is a list, work that is issued is also written down, to be run again."""

    tape: Tape | None = None

    def plan(self, *arguments: Any, **named: Any) -> Callable[[BatchDescriptor], None]:
        """A plan whose runs are recorded."""
        run = super().plan(*arguments, **named)

        def recorded(batch: BatchDescriptor) -> None:
            run(batch)
            if self.tape is not None:
                self.tape.append(lambda: run(batch))

        return recorded


def test_two_batch_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """sglang's own `TboAttnBackend`: children whose halves of two captured batches have the same size."""
    from sglang.srt.batch_overlap.two_batch_overlap import compute_split_indices_for_cuda_graph_replay
    from sglang.srt.layers.attention import tbo_backend

    monkeypatch.setattr(kit, "_bare_backend", with_pools(kit._bare_backend))
    monkeypatch.setattr(hooked, "capturing", lambda: True)
    monkeypatch.setattr(tbo_backend.two_batch_overlap, "split_spec_info", lambda spec_info, **_: spec_info)
    host, adapter = TapeHost(), SglangAdapter()
    assert adapter.install(host) == []
    config, mode = kit.Config(), "TARGET_VERIFY"
    runner = Runner(config, 1, (mode,), (), 6)
    overlap = tbo_backend.TboAttnBackend.init_new(lambda: kit.make_backend(config, runner.table))
    lengths, requests = torch.ones(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    width = SimpleNamespace(draft_token_num=DRAFT_TOKENS)
    graphs: dict[int, Tape] = {}
    try:
        for size in (4, 3, 1):
            static = kit.make_batch(mode, lengths[:size], requests[:size], size * DRAFT_TOKENS)
            split, _ = compute_split_indices_for_cuda_graph_replay(static.forward_mode, size * DRAFT_TOKENS, width)
            static.tbo_children = [
                kit.make_batch(mode, lengths[half], requests[half], (half.stop - half.start) * DRAFT_TOKENS)
                for half in (slice(0, split), slice(split, size))
            ]
            overlap.init_forward_metadata_out_graph(static, in_capture=True)
            host.tape = graphs[size] = []
            overlap.init_forward_metadata_in_graph(static)
            host.tape = None
        assert [len(graphs[size]) for size in (4, 3, 1)] == [3, 3, 2]
        rng = random.Random(2)
        for size in (3, 4, 1, 4, 3):
            live = runner.random_batch(mode, size, rng)
            live.spec_info = width
            lengths[:size], requests[:size] = live.seq_lens, live.req_pool_indices
            overlap.init_forward_metadata_out_graph(kit.replay_view(live))
            for work in graphs[size]:
                work()
            split = size // 2
            halves = zip(overlap.children, (slice(0, split), slice(split, size)), strict=True)
            for backend, half in [(overlap.primary, slice(0, size)), *halves]:
                if half.stop > half.start:
                    part = runner.batch(mode, live.seq_lens[half].tolist(), live.req_pool_indices[half].tolist())
                    runner.backends = [backend]
                    assert runner.wrong(mode, part) == []
        assert not host.fallbacks
    finally:
        adapter.undo()


def with_pools(make: Callable[..., Any]) -> Callable[..., Any]:
    """Backends with the references that `TboAttnBackend` reads off its primary."""

    def made(*arguments: Any) -> Any:
        backend = make(*arguments)
        backend.req_to_token_pool = SimpleNamespace(req_to_token=backend.req_to_token)
        backend.kv_index_translator = None
        return backend

    return made


@pytest.mark.parametrize("record", [False, True], ids=["prepared", "recorded"])
@pytest.mark.parametrize("parameters", [RUNNERS[0], RUNNERS[3], RUNNERS[4]], ids=["draft", "verify", "extend"])
def test_a_dropped_backend_leaves_nothing_to_a_new_one(
    install: Install, monkeypatch: pytest.MonkeyPatch, parameters: Any, record: bool
) -> None:
    """Its state goes with it; a new backend, whatever its id, is served only after a capture of its own."""
    install("auto")
    monkeypatch.setattr(hooked, "capturing", lambda: record)
    rng = random.Random(4)
    config, num_steps, (mode,), (*_, size), _ = parameters
    for seed in range(2):
        runner = Runner(config, num_steps, (mode,), (size,), seed)
        live = runner.random_batch(mode, size, rng)
        if mode != "DECODE":  # sglang's own code makes what it has not captured
            for _ in range(2):
                runner.owner.init_forward_metadata_out_graph(kit.replay_view(live))
            assert runner.wrong(mode, live) == []
        static = runner.batch(mode, [1] * size, [0] * size)
        runner.owner.init_forward_metadata_out_graph(static, in_capture=True)
        runner.owner.init_forward_metadata_in_graph(static)
        static.seq_lens.copy_(live.seq_lens)
        static.req_pool_indices.copy_(live.req_pool_indices)
        runner.owner.init_forward_metadata_out_graph(kit.replay_view(live))
        runner.owner.init_forward_metadata_in_graph(static)
        assert runner.wrong(mode, live) == []
        gone = [weakref.ref(thing) for thing in (runner.owner, *runner.backends, runner.backends[0].forward_metadata)]
        del runner, static
        gc.collect()
        assert [reference() for reference in gone] == [None] * len(gone)


def test_a_copy_of_an_owner_has_no_state_of_its_own() -> None:
    owners: Attached[list[int]] = Attached("test")
    owner, other = Owner(), Owner()
    owners.setdefault(owner, []).append(1)
    assert owners.setdefault(owner, [2]) is owners.get(owner)
    copied = copy.copy(owner)
    assert (owners.get(owner), owners.get(copied), owners.get(other)) == ([1], None, None)
    owners.setdefault(copied, []).append(3)
    assert sorted(owners.values()) == [[1], [3]] and owners.get(owner) == [1]
    owners.clear()
    assert not vars(owner) and not vars(copied) and owners.get(owner) is None
