"""Off means off, whenever it is said: at a capture, at a replay, in what CUDA graphs have recorded, from any thread."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch

from nsa_plugin import hookimpl
from nsa_plugin.adapters.sglang import preparation, reports
from nsa_plugin.core import reference
from nsa_plugin.rigs.sglang import backends as kit
from tests.sglang.batches import DEVICE, record
from tests.sglang.conftest import Install
from tests.storm import storm

CONFIG = kit.Config(width=256, max_batch_size=4, max_requests=8)
TABLE = kit.req_to_token(CONFIG, DEVICE)
MODES = ("DECODE", "TARGET_VERIFY", "DRAFT_EXTEND_V2")
SECONDS = 1.0


class Runner:
    """What sglang's CUDA-graph runners do with one owner; on a CPU what was recorded is launched again at a replay."""

    def __init__(self, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mode, self._patch = mode, monkeypatch
        self.owner: Any = kit.make_multi_step(CONFIG, TABLE, 4) if mode == "DECODE" else kit.make_backend(CONFIG, TABLE)
        self.backends = self.owner.attn_backends if mode == "DECODE" else [self.owner]
        self.reference = kit.make_backend(CONFIG, TABLE)
        self.graphs: dict[int, tuple[Any, list[Any], bool]] = {}

    def batch(self, lengths: list[int], requests: list[int]) -> Any:
        tokens = len(lengths) * (1 if self.mode == "DECODE" else CONFIG.draft_tokens)
        return kit.make_batch(self.mode, torch.tensor(lengths), torch.tensor(requests), tokens)

    def allocate(self) -> None:
        """As the runners do before they capture anew."""
        rows = CONFIG.max_batch_size * (1 if self.mode == "DECODE" else CONFIG.draft_tokens)
        self.owner.init_cuda_graph_state(CONFIG.max_batch_size, rows)

    def capture(self, size: int) -> None:
        static = self.batch([1] * size, [0] * size)
        self.owner.init_forward_metadata_out_graph(static, in_capture=True)
        held = [backend.forward_metadata for backend in self.backends]
        self.owner.init_forward_metadata_in_graph(static)
        record(self.owner, static, self._patch)
        found = vars(self.owner).get("_nsa_plugin_prepared", {})
        recorded = any(prepared.recorded for (_, bs), prepared in found.items() if bs == size)
        self.graphs[size] = static, held, recorded

    def replay(self, lengths: list[int], requests: list[int]) -> list[str]:
        """What of the metadata that the graph reads differs from sglang's own per-backend values."""
        static, held, recorded = self.graphs[len(lengths)]
        live = self.batch(lengths, requests)
        static.seq_lens.copy_(live.seq_lens)
        static.req_pool_indices.copy_(live.req_pool_indices)
        self.owner.init_forward_metadata_out_graph(kit.replay_view(live))
        if recorded:
            prepared = vars(self.owner).get("_nsa_plugin_prepared", {})
            for (_, size), preparation_ in prepared.items():
                if size == len(lengths):
                    preparation_.record()
        expected = kit.engine_metadata(self.reference, live, self.mode)
        ours = reports.MODES[self.mode]
        return [
            f"{index}: {name}"
            for index, (metadata, backend) in enumerate(zip(held, self.backends, strict=True))
            for name in kit.differences(expected, metadata, backend, live, ours)
        ]


@pytest.mark.parametrize("strategy", ["graph", "share", "copy"])
@pytest.mark.parametrize("mode", MODES)
def test_a_storm_of_switching_through_captures_replays_and_undo(
    install: Install, monkeypatch: pytest.MonkeyPatch, mode: str, strategy: str
) -> None:
    """No value is wrong, nothing is raised, and nothing counts as a failure."""
    host, adapter = install(strategy)
    rng = random.Random(5)
    runner = Runner(mode, monkeypatch)
    with storm(host) as meanwhile:
        end, turn = time.monotonic() + SECONDS, 0
        while turn < 4 or time.monotonic() < end:
            if turn % 8 == 0:
                if turn % 16 == 8:
                    runner.allocate()
                for size in (4, 2):
                    runner.capture(size)
            size = rng.choice((4, 2))
            lengths = [rng.randint(1, CONFIG.width - CONFIG.draft_tokens) for _ in range(size)]
            if mode == "DRAFT_EXTEND_V2":
                lengths = [max(length, CONFIG.draft_tokens) for length in lengths]
            assert runner.replay(lengths, rng.sample(range(CONFIG.max_requests), size)) == []
            turn += 1
        adapter.undo()
    assert meanwhile.switches > 1 and not meanwhile.raised and not host.fallbacks


class Wrong:
    """A precompute that obeys its flag, and plants a wrong value."""

    @hookimpl
    def nsa_plugin_bind_precompute(self, batch: Any, geometry: Any, out: Any, enabled: Any) -> Any:
        def bound(live: Any) -> None:
            reference.precompute(live, out, enabled)
            if enabled is None or int(enabled[0]):
                out.steps[0].nsa_cu_seqlens_k[-1] += 7

        return bound


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_recorded_work_is_switched_at_the_next_replay(
    install: Install, monkeypatch: pytest.MonkeyPatch, mode: str, exact: bool
) -> None:
    """While it is on, the planted wrong value is there; off, sglang's values win, without a new capture."""
    host, _ = install("graph", Wrong(), step_lengths="exact" if exact else "engine")
    runner = Runner(mode, monkeypatch)
    runner.capture(2)
    assert runner.graphs[2][2], "nothing was recorded"
    for on, lengths in ((True, [70, 9]), (False, [200, 64]), (False, [5, 90]), (True, [33, 40]), (False, [8, 240])):
        if host.on is not on:
            assert host.switch(on, "test") == []
        assert (runner.replay(lengths, [3, 1]) == []) is not on
    assert not host.fallbacks


@pytest.mark.parametrize("mode", MODES)
def test_off_between_the_two_calls_of_a_capture(install: Install, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """What is said while sglang captures holds for this capture already."""
    host, _ = install("graph", Wrong())
    capture = preparation.Preparation.capture

    def switched(self: Any, batch: Any) -> None:
        host.switch(False, "test")
        capture(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(preparation.Preparation, "capture", switched)
        runner = Runner(mode, monkeypatch)
        runner.capture(2)
    assert not runner.graphs[2][2]
    assert runner.replay([70, 9], [3, 1]) == []
    host.switch(True, "test")
    assert runner.replay([70, 9], [3, 1]) != []


@pytest.mark.parametrize("mode", MODES)
def test_a_capture_that_records_nothing_is_prepared_before_its_replays(
    install: Install, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Whatever an earlier capture of the same size recorded."""
    install("graph")
    runner = Runner(mode, monkeypatch)
    runner.capture(2)
    static = runner.batch([1, 1], [0, 0])
    runner.owner.init_forward_metadata_out_graph(static, in_capture=True)
    runner.graphs[2] = static, runner.graphs[2][1], False
    assert runner.replay([70, 9], [3, 1]) == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", [(True, False), (False, True)])
@pytest.mark.parametrize("anew", [False, True])
def test_a_graph_that_lacks_the_work_is_prepared_before_its_replays(
    install: Install, monkeypatch: pytest.MonkeyPatch, anew: bool, order: tuple[bool, bool], mode: str
) -> None:
    """sglang captures several graphs for one size, after one preparation or after one each; one is captured while off."""
    host, _ = install("graph")
    runner = Runner(mode, monkeypatch)
    static = runner.batch([1, 1], [0, 0])
    runner.owner.init_forward_metadata_out_graph(static, in_capture=True)
    held = [backend.forward_metadata for backend in runner.backends]
    for number, on in enumerate(order):
        if host.on is not on:
            host.switch(on, "test")
        if anew and number:
            runner.owner.init_forward_metadata_out_graph(static, in_capture=True)
        record(runner.owner, static, monkeypatch)
    if not host.on:
        host.switch(True, "test")
    runner.graphs[2] = static, held, False  # the graph that lacks it
    assert runner.replay([70, 9], [3, 1]) == []
    assert not host.fallbacks
