"""FlashMLA's metadata: computed once per captured size if lengths do not matter, at every replay if they do; right both ways."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nsa_plugin.adapters.sglang import preparation, reports
from nsa_plugin.rigs.sglang import backends as kit
from tests.sglang.batches import DEVICE, record
from tests.sglang.conftest import Install

CONFIG = kit.Config(width=256, max_batch_size=4, max_requests=8, index_topk=128, decode_impl="flashmla_kv")
TABLE = kit.req_to_token(CONFIG, DEVICE)
MODES = ("DECODE", "TARGET_VERIFY", "DRAFT_EXTEND_V2")
Made = tuple[torch.Tensor, torch.Tensor]


def by_topk(lengths: torch.Tensor, **others: Any) -> Made:
    """As the compiled kernel: the rows alone count."""
    return kit.flash_mla(lengths, **others)


def by_lengths(lengths: torch.Tensor, **others: Any) -> Made:
    """What a kernel would be that plans by the keys there are."""
    return kit.flash_mla(lengths)


def of_the_last_length_alone(lengths: torch.Tensor, **others: Any) -> Made:
    metadata, splits = kit.flash_mla(lengths, **others)
    metadata[-1, 3] = lengths[-1]
    return metadata, splits


def of_few_lengths(lengths: torch.Tensor, **others: Any) -> Made:
    """It refuses what no batch has."""
    if int(lengths.max()) > CONFIG.index_topk:
        raise ValueError("planted")
    return kit.flash_mla(lengths, **others)


def with_garbage(lengths: torch.Tensor, **others: Any) -> Made:
    metadata, splits = kit.flash_mla(lengths, **others)
    metadata[:, 7] = torch.randint(1 << 30, (metadata.shape[0],))
    return metadata, splits


CONSTANT = (by_topk, with_garbage)
KERNELS = (*CONSTANT, by_lengths, of_the_last_length_alone, of_few_lengths)


class Kernel:
    """Stands in for the compiled function, and counts its calls."""

    def __init__(self, made: Callable[..., Made]) -> None:
        self._made, self.calls = made, 0

    def __call__(self, cache_seqlens: torch.Tensor, **others: Any) -> Made:
        self.calls += 1
        return self._made(cache_seqlens, **others)


@pytest.fixture
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    stand_in = Kernel(request.param)
    for module in kit.FLASH_MLA:
        monkeypatch.setattr(sys.modules[module], "get_mla_metadata", stand_in)
    return stand_in


class Runner:
    """One owner of backends; what its graphs have recorded is launched again at a replay."""

    def __init__(self, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mode, self._patch = mode, monkeypatch
        self.owner: Any = kit.make_multi_step(CONFIG, TABLE, 4) if mode == "DECODE" else kit.make_backend(CONFIG, TABLE)
        self.backends = self.owner.attn_backends if mode == "DECODE" else [self.owner]
        self._fresh = kit.make_backend(CONFIG, TABLE)
        self.graphs: dict[int, tuple[Any, list[Any], Any]] = {}

    def batch(self, lengths: list[int], requests: list[int]) -> Any:
        tokens = len(lengths) * (1 if self.mode == "DECODE" else CONFIG.draft_tokens)
        return kit.make_batch(self.mode, torch.tensor(lengths), torch.tensor(requests), tokens)

    def capture(self, size: int) -> None:
        static = self.batch([1] * size, [0] * size)
        self.owner.init_forward_metadata_out_graph(static, in_capture=True)
        record(self.owner, static, self._patch)
        prepared = vars(self.owner).get("_nsa_plugin_prepared", {})
        (found,) = [each for (_, bs), each in prepared.items() if bs == size] or [None]
        held = [backend.forward_metadata for backend in self.backends]
        self.graphs[size] = static, held, found if found is not None and found.recorded else None

    def prepare(self, live: Any) -> None:
        static, _, recorded = self.graphs[live.batch_size]
        static.seq_lens.copy_(live.seq_lens)
        static.req_pool_indices.copy_(live.req_pool_indices)
        self.owner.init_forward_metadata_out_graph(kit.replay_view(live))
        if recorded is not None:
            recorded.record()

    def replay(self, lengths: list[int], requests: list[int]) -> list[str]:
        """What of the metadata that the graph reads is not what sglang's own path computes; also FlashMLA's schedule."""
        live = self.batch(lengths, requests)
        self.prepare(live)
        expected = kit.engine_metadata(self._fresh, live, self.mode)
        wanted, wrong = expected.flashmla_metadata.flashmla_metadata[:, :7], []
        for metadata, backend in zip(self.graphs[len(lengths)][1], self.backends, strict=True):
            wrong += kit.differences(expected, metadata, backend, live, reports.MODES[self.mode])
            if not torch.equal(metadata.flashmla_metadata.flashmla_metadata[:, :7], wanted):
                wrong.append("schedule")
        return wrong

    def replays(self, number: int, seed: int = 3) -> list[str]:
        """The same of replays of all sizes in any order."""
        rng, wrong = random.Random(seed), []
        for _ in range(number):
            size = rng.choice(list(self.graphs))
            lengths = [rng.randint(CONFIG.draft_tokens, CONFIG.width - CONFIG.draft_tokens) for _ in range(size)]
            wrong += self.replay(lengths, rng.sample(range(CONFIG.max_requests), size))
        return wrong


@pytest.mark.parametrize(
    ("mode", "strategy", "kernel"),
    [
        *[(mode, "graph", kernel) for mode in MODES for kernel in (by_topk, by_lengths)],
        *[("DECODE", strategy, by_topk) for strategy in ("share", "copy")],
        *[("DECODE", "graph", kernel) for kernel in (with_garbage, of_the_last_length_alone, of_few_lengths)],
    ],
    indirect=["kernel"],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_values_are_sglangs_own_for_sizes_in_any_order(
    install: Install, monkeypatch: pytest.MonkeyPatch, mode: str, strategy: str, kernel: Kernel
) -> None:
    """Through a switch off and on again, a second capture, and an undo."""
    host, adapter = install(strategy)
    runner = Runner(mode, monkeypatch)
    for size in (4, 2, 1):
        runner.capture(size)
    assert runner.replays(4) == []
    host.switch(False, "test")
    assert runner.replays(3, 4) == []
    host.switch(True, "test")
    assert runner.replays(2, 5) == []
    runner.capture(2)
    assert runner.replays(2, 6) == []
    assert not host.fallbacks
    adapter.undo()
    assert runner.replays(2, 7) == []


@pytest.mark.parametrize("kernel", KERNELS, indirect=True, ids=lambda made: made.__name__)
@pytest.mark.parametrize("strategy", ["graph", "copy"])
def test_it_is_computed_at_a_replay_only_where_it_changes(
    install: Install, monkeypatch: pytest.MonkeyPatch, strategy: str, kernel: Kernel
) -> None:
    install(strategy)
    runner = Runner("DECODE", monkeypatch)
    runner.capture(2)
    before = kernel.calls
    for length in (5, 200):
        runner.prepare(runner.batch([length, 70], [1, 2]))
    constant = strategy != "copy" and kernel._made in CONSTANT
    assert kernel.calls - before == (0 if constant else 2)


@pytest.mark.parametrize("kernel", [by_topk], indirect=True, ids=lambda made: made.__name__)
def test_each_size_has_memory_of_its_own_and_all_steps_share_it(
    install: Install, monkeypatch: pytest.MonkeyPatch, kernel: Kernel
) -> None:
    install("graph", step_lengths="exact")
    runner = Runner("DECODE", monkeypatch)
    for size in (4, 2):
        runner.capture(size)
    addresses = [
        {metadata.flashmla_metadata.flashmla_metadata.data_ptr() for metadata in held}
        for _, held, _ in runner.graphs.values()
    ]
    of_sglang = {
        backend.decode_cuda_graph_metadata["flashmla_metadata"].flashmla_metadata.data_ptr()
        for backend in runner.backends
    }
    assert [len(found) for found in addresses] == [1, 1]
    assert len(of_sglang.union(*addresses)) == 2 + len(runner.backends)


@pytest.mark.parametrize("kernel", [by_topk, by_lengths], indirect=True, ids=lambda made: made.__name__)
@pytest.mark.parametrize("strategy", ["graph", "share"])
def test_a_plane_that_was_damaged_is_found(
    install: Install, monkeypatch: pytest.MonkeyPatch, strategy: str, kernel: Kernel
) -> None:
    """A verification computes it by sglang's own path."""
    host, _ = install(strategy, verify=1)
    runner = Runner("DECODE", monkeypatch)
    runner.capture(2)
    assert runner.replay([9, 70], [1, 2]) == []
    runner.graphs[2][1][0].flashmla_metadata.num_splits.zero_()
    for _ in range(2):
        runner.prepare(runner.batch([9, 70], [1, 2]))
    assert bool(host.mismatches) == (kernel._made is by_topk)


@pytest.mark.parametrize("kernel", [of_few_lengths], indirect=True, ids=lambda made: made.__name__)
def test_a_kernel_that_refuses_lengths_is_asked_at_every_replay(
    install: Install, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kernel: Kernel
) -> None:
    caplog.set_level("INFO", reports.logger.name)
    install("graph")
    Runner("DECODE", monkeypatch).capture(2)
    assert "FlashMLA's metadata are computed at every replay: ValueError: planted" in caplog.text
    assert torch.get_deterministic_debug_mode() == 0


@pytest.mark.parametrize("strategy", ["graph", "share"])
@pytest.mark.parametrize("kernel", [by_topk], indirect=True)
def test_a_second_capture_that_fails_leaves_the_first_graph_its_memory(
    install: Install, kernel: Kernel, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """sglang captures a size twice, with and without a feature. Before: what the first graph read was freed."""
    host, _ = install(strategy)
    runner = Runner("DECODE", monkeypatch)
    runner.capture(2)
    static, held, _ = runner.graphs[2]
    capture, left = preparation.Preparation.capture, [RuntimeError("planted")]

    def fails_once(self: Any, batch: Any) -> None:
        if left:
            raise left.pop()
        capture(self, batch)

    monkeypatch.setattr(preparation.Preparation, "capture", fails_once)
    runner.owner.init_forward_metadata_out_graph(static, in_capture=True)
    assert sum(host.fallbacks.values()) == 1
    for backend, metadata in zip(runner.backends, held, strict=True):
        assert backend.decode_cuda_graph_metadata[2].flashmla_metadata is metadata.flashmla_metadata
    runner.graphs[2] = static, held, None
    assert runner.replay([70, 9], [3, 1]) == []
