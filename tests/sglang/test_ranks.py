"""Ranks with gloo between them, each of which loads the plugin through sglang: nobody waits for one that steps down.

What the plugin records or runs contains no collective and no wait, and stepping down changes only who prepares the
metadata: the model's kernels and collectives are captured, and replayed, in the same order on every rank.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable
from datetime import timedelta
from importlib.metadata import entry_points
from typing import Any
from unittest import mock

import pytest

from tests import ranks

LOGGER = "sglang.srt.plugins.nsa_plugin"
SIZE, STEPS = 4, 3
ROUNDS = (([300, 9, 64, 65], [4, 2, 0, 7]), ([5, 511, 1, 1], [1, 3, 0, 0]), ([600, 2, 128, 77], [2, 5, 6, 1]))
"""Lengths and requests of each replay; the second is padded by two requests."""
IDLE = ([1] * SIZE, [0] * SIZE)
"""What sglang's runners fill the static buffers of a rank with that has no request while others do."""
CAPTURE = range(1000)
"""Every call fails: at capture first, whatever the strategy."""
RECORDING, REPLAY = (1,), (3,)
"""Calls: 0 at capture, 1 in the warm-up of the graph, 2 in its capture, 3 at the first replay that is prepared before."""

pytestmark = pytest.mark.skipif(
    not any(point.name == "nsa_plugin" for point in entry_points(group="sglang.srt.plugins")),
    reason="nsa-plugin is not installed in this environment",
)


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class Rank:
    """What one rank does: every case on backends of its own, with a collective after each draft step."""

    def __init__(self, rank: int, world: int, store: str) -> None:
        import torch.distributed as dist
        from sglang.srt.plugins import load_plugins

        from nsa_plugin import entry
        from tests.faults import Faults

        self.rank, self.world, self.lines, self.faults = rank, world, Lines(), Faults()
        logging.getLogger(LOGGER).addHandler(self.lines)
        dist.init_process_group("gloo", store, timedelta(seconds=ranks.HUNG), world, rank)
        load_plugins()
        load_plugins()
        host: Any = entry._hosts.get("sglang")
        if host is not None:
            host.manager.register(self.faults)
        self.host = host

    def hooks(self) -> int:
        """How many wrappers the hooked method has: one, however often and wherever plugins were loaded."""
        from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnMultiStepBackend

        method: Any = DeepseekSparseAttnMultiStepBackend.init_forward_metadata_out_graph
        count = 0
        while hasattr(method, "__wrapped__"):
            method, count = method.__wrapped__, count + 1
        return count

    def case(
        self, name: str, failing: dict[int, Iterable[int]], idle: tuple[int, ...] = (), recorded: bool = True
    ) -> dict[str, Any]:
        """Capture, then draft and verify some rounds.

        Returns the names of values that differ from sglang's own code, the sum over all ranks that each draft step's
        collective gave, this rank's part of it, the strategies and errors that were logged, and the fall-backs.
        """
        import torch

        from nsa_plugin.adapters.sglang import hooked, reports
        from nsa_plugin.rigs.sglang import backends as kit

        config, device = kit.Config(), torch.device("cpu")
        table = kit.req_to_token(config, device, seed=0 if not idle else self.rank)
        reference = kit.make_backend(config, table)
        self.lines.records.clear()
        self.faults.failing = tuple(failing.get(self.rank, ()))
        self.faults.error = type(f"Planted{name.title().replace(' ', '')}", (RuntimeError,), {})
        before = 0 if self.host is None else sum(self.host.fallbacks.values())
        result: dict[str, Any] = {"wrong": [], "totals": [], "own": []}

        def batch(mode: str, lengths: list[int], requests: list[int]) -> Any:
            tokens = len(lengths) * (1 if mode == "DECODE" else config.draft_tokens)
            return kit.make_batch(mode, torch.tensor(lengths), torch.tensor(requests), tokens)

        def expected(mode: str, live: Any) -> Any:
            metadata = kit.engine_metadata(reference, live, mode)
            reference.decode_cuda_graph_metadata.pop(SIZE)
            return metadata

        owners = {"DECODE": kit.make_multi_step(config, table, STEPS), "TARGET_VERIFY": kit.make_backend(config, table)}
        statics = {mode: batch(mode, *IDLE) for mode in owners}
        with mock.patch.object(hooked, "capturing", lambda: recorded):
            for mode, owner in owners.items():
                owner.init_forward_metadata_out_graph(statics[mode], in_capture=True)
                for _ in range(2):  # warm-up, capture
                    owner.init_forward_metadata_in_graph(statics[mode])
                    self.collective(0)
        for lengths, requests in ROUNDS:
            if self.rank in idle:
                lengths, requests = IDLE
            for mode, owner in owners.items():
                live = batch(mode, lengths, requests)
                view = kit.replay_view(live)
                view.actual_forward_mode = type(live.forward_mode)["IDLE" if self.rank in idle else mode]
                if mode == "DECODE":
                    view.forward_mode = view.actual_forward_mode  # as the draft's runner has it
                statics[mode].seq_lens.copy_(live.seq_lens)
                statics[mode].req_pool_indices.copy_(live.req_pool_indices)
                owner.init_forward_metadata_out_graph(view)
                owner.init_forward_metadata_in_graph(statics[mode])  # stands for the replay of the captured graph
                values = expected(mode, live)
                for backend in getattr(owner, "attn_backends", [owner]):
                    seen = backend.forward_metadata
                    result["totals"].append(self.collective(int(seen.dsa_cu_seqlens_k[-1])))
                    result["own"].append(int(values.dsa_cu_seqlens_k[-1]))
                    result["wrong"] += kit.differences(values, seen, backend, live, reports.MODES[mode])
        errors = [record.getMessage() for record in self.lines.records if record.levelno >= logging.ERROR]
        used = [record.getMessage() for record in self.lines.records if "strategy" in str(record.msg)]
        fallbacks = 0 if self.host is None else sum(self.host.fallbacks.values()) - before
        return result | {"errors": errors, "used": sorted(set(used) - set(errors)), "fallbacks": fallbacks}

    def collective(self, value: int) -> int:
        """The all-reduce that follows the attention of a layer."""
        import torch
        import torch.distributed as dist

        total = torch.tensor([value])
        dist.all_reduce(total)
        return int(total)


def two_that_fail_in_turn(rank: int, world: int, store: str) -> dict[str, Any]:
    """One rank fails at capture, while its work is recorded, or at replay; then one is idle."""
    from nsa_plugin.rigs.sglang import backends as kit

    with kit.stand_ins():
        one = Rank(rank, world, store)
        cases = {
            "sound": one.case("sound", {}),
            "capture": one.case("capture", {1: CAPTURE}),
            "recording": one.case("recording", {1: RECORDING}),
            "replay": one.case("replay", {1: REPLAY}, recorded=False),
            "idle": one.case("idle", {}, idle=(1,)),
        }
        return {"hooks": one.hooks(), "cases": cases}


def four_at_once(rank: int, world: int, store: str) -> dict[str, Any]:
    """Idle, failing at capture, while recording, and sound, all at the same time; then all sound."""
    from nsa_plugin.rigs.sglang import backends as kit

    with kit.stand_ins():
        one = Rank(rank, world, store)
        cases = {
            "mixed": one.case("mixed", {1: CAPTURE, 3: RECORDING}, idle=(2,)),
            "sound": one.case("sound", {}, idle=(0, 2)),
        }
        return {"hooks": one.hooks(), "cases": cases}


def two_with_other_settings(rank: int, world: int, store: str) -> dict[str, Any]:
    """One rank is switched off, as on a node whose environment differs."""
    from nsa_plugin.rigs.sglang import backends as kit

    os.environ["NSA_PLUGIN_STRATEGY"] = ("auto", "off")[rank]
    with kit.stand_ins():
        one = Rank(rank, world, store)
        return {"hooks": one.hooks(), "cases": {"sound": one.case("sound", {})}}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[dict[str, Any]]]:
    """What every rank of every world returned; a world that hangs is killed, and fails."""
    found: dict[str, list[dict[str, Any]]] = ranks.script("tests.sglang.test_ranks")
    return found


def case(outcomes: dict[str, list[dict[str, Any]]], world: str, name: str) -> list[dict[str, Any]]:
    """A case on every rank, after the checks that every case must pass."""
    found = [rank["cases"][name] for rank in outcomes[world]]
    assert [rank["wrong"] for rank in found] == [[]] * len(found)
    sums = [sum(parts) for parts in zip(*(rank["own"] for rank in found), strict=True)]
    assert len(sums) == len(ROUNDS) * STEPS
    assert all(rank["totals"] == sums for rank in found), "every collective had every rank's right value"
    return found


USED = [
    "nsa-plugin: draft decode: strategy graph, without the wide page table, which nothing reads",
    "nsa-plugin: target verify: strategy graph",
]


def test_every_rank_decides_the_same_and_hooks_once(outcomes: dict[str, list[dict[str, Any]]]) -> None:
    for world in ("spawn", "fork"):
        assert {rank["hooks"] for rank in outcomes[world]} == {1}
    for rank in case(outcomes, "spawn", "sound"):
        assert (rank["used"], rank["errors"], rank["fallbacks"]) == (USED, [], 0)
    assert not any(rank["errors"] for rank in case(outcomes, "fork", "sound"))


@pytest.mark.parametrize(
    ("name", "stage", "strategies"),
    [
        ("capture", "capture", ["graph", "share", "copy"]),
        ("recording", "capture", ["graph"]),
        ("replay", "replay", ["graph"]),
    ],
)
def test_a_rank_that_steps_down_alone_says_so_once_and_nobody_waits(
    outcomes: dict[str, list[dict[str, Any]]], name: str, stage: str, strategies: list[str]
) -> None:
    """Once per path (draft decode, target verify) and strategy."""
    sound, failing = case(outcomes, "spawn", name)
    assert (sound["errors"], sound["fallbacks"]) == ([], 0)
    expected = [
        f"nsa-plugin: {path}: strategy {strategy} failed at {stage} (Planted{name.title()}: planted at call"
        for path in ("draft decode", "target verify")
        for strategy in strategies
    ]
    assert failing["fallbacks"] == len(expected) == len(failing["errors"])
    assert all(line.startswith(start) for line, start in zip(failing["errors"], expected, strict=True))


def test_an_idle_rank_takes_part_in_every_collective(outcomes: dict[str, list[dict[str, Any]]]) -> None:
    busy, idle = case(outcomes, "spawn", "idle")
    assert not (busy["errors"] or idle["errors"])
    assert set(idle["own"]) == {SIZE, SIZE * sum(range(2, 6))} != set(busy["own"])


def test_four_forked_ranks_each_in_another_state(outcomes: dict[str, list[dict[str, Any]]]) -> None:
    """Plugins were loaded before the fork, and again in every rank."""
    found = case(outcomes, "fork", "mixed")
    assert [rank["fallbacks"] for rank in found] == [0, 6, 0, 2]
    assert [len(rank["errors"]) for rank in found] == [0, 6, 0, 2]


def test_ranks_with_other_settings_work_together(outcomes: dict[str, list[dict[str, Any]]]) -> None:
    ours, shipped = case(outcomes, "settings", "sound")
    assert (ours["used"], shipped["used"]) == (USED, [])
    assert [rank["hooks"] for rank in outcomes["settings"]] == [1, 0]


def main() -> dict[str, Any]:
    """Start the worlds. Forks come from a process that has imported sglang, and for "fork" loaded plugins, but computed nothing."""
    from sglang.srt.layers.attention import dsa_backend  # noqa: F401
    from sglang.srt.plugins import load_plugins

    from tests.sglang import test_ranks  # importable in a spawned process, as this module is not

    found = {"settings": ranks.run("fork", 2, test_ranks.two_with_other_settings)}
    load_plugins()
    found["fork"] = ranks.run("fork", 4, test_ranks.four_at_once)
    found["spawn"] = ranks.run("spawn", 2, test_ranks.two_that_fail_in_turn)
    return found


if __name__ == "__main__":
    answer = main()
    sys.stdout.flush()
    print("\n" + json.dumps(answer))
