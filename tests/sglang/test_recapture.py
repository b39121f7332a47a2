"""Captures again and again over the same owner, as after weight updates: memory is flat; and what undo leaves to live graphs."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest
import torch

from nsa_plugin.adapters.sglang import hooked, preparation, reports
from nsa_plugin.rigs.sglang import backends as kit
from nsa_plugin.testing.lasting import live_bytes
from tests.sglang.batches import record
from tests.sglang.conftest import Install
from tests.sglang.test_switch import CONFIG, TABLE, Runner

CAPTURES = 50


@pytest.mark.parametrize("strategy", ["graph", "share", "copy"])
@pytest.mark.parametrize("mode", ["DECODE", "TARGET_VERIFY"])
def test_memory_is_flat_over_captures(
    install: Install, monkeypatch: pytest.MonkeyPatch, mode: str, strategy: str
) -> None:
    install(strategy)
    runner = Runner(mode, monkeypatch)
    sizes = []
    for number in range(CAPTURES):
        if number:
            runner.allocate()
        runner.capture(2)
        if number in (1, CAPTURES // 2, CAPTURES - 1):
            sizes.append(live_bytes())
    assert sizes[0] == sizes[1] == sizes[2]
    assert runner.replay([70, 9], [3, 1]) == []


def test_what_a_live_graph_runs_is_kept_after_undo(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    _, adapter = install("graph")
    runner = Runner("DECODE", monkeypatch)
    runner.capture(2)
    (prepared,) = vars(runner.owner)["_nsa_plugin_prepared"].values()
    kept = weakref.ref(prepared)
    del prepared
    adapter.undo()
    gc.collect()
    assert kept() is not None
    del runner
    gc.collect()
    assert kept() is None


def test_what_a_graph_runs_until_an_error_is_kept_after_undo(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel was recorded, then something raised, and sglang's capture went on. The graph reads the kernel's tables."""
    host, adapter = install("graph")
    runner = Runner("DECODE", monkeypatch)
    static = runner.batch([1, 1], [0, 0])
    runner.owner.init_forward_metadata_out_graph(static, in_capture=True)
    whole = preparation.Preparation.record

    def half(self: Any) -> None:
        whole(self)
        raise RuntimeError("planted")

    monkeypatch.setattr(preparation.Preparation, "record", half)
    record(runner.owner, static, monkeypatch)
    assert sum(host.fallbacks.values()) == 1
    (prepared,) = vars(runner.owner)["_nsa_plugin_prepared"].values()
    adapter.undo()
    kept = hooked._recorded.get(runner.owner)
    assert kept is not None
    assert list(kept.values()) == [[prepared]]


def stale(num_steps: int) -> tuple[Any, list[Any], Any]:
    multi = kit.make_multi_step(CONFIG, TABLE, num_steps)
    static = kit.make_batch("DECODE", torch.ones(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    multi.init_forward_metadata_out_graph(static, in_capture=True)
    return multi, [backend.forward_metadata for backend in multi.attn_backends], static


def differing(multi: Any, held: list[Any]) -> set[tuple[int, str]]:
    reference, found = kit.make_backend(CONFIG, TABLE), set()
    for lengths in ([200, 31], [5, 240]):
        live = kit.make_batch("DECODE", torch.tensor(lengths), torch.tensor([3, 1]))
        multi.init_forward_metadata_out_graph(kit.replay_view(live))
        expected = kit.engine_metadata(reference, live, "DECODE")
        for index, (metadata, backend) in enumerate(zip(held, multi.attn_backends, strict=True)):
            ours = reports.MODES["DECODE"]
            found |= {(index, name) for name in kit.differences(expected, metadata, backend, live, ours)}
    return found


@pytest.mark.parametrize("step_lengths", ["engine", "exact"])
@pytest.mark.parametrize("strategy", ["graph", "share", "copy"])
@pytest.mark.parametrize("num_steps", [3, 4, 5, 8])
def test_after_undo_no_value_is_staler_than_without_the_plugin(
    install: Install, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    num_steps: int, strategy: str, step_lengths: str,
) -> None:  # fmt: skip
    """In what captured graphs read, with sglang's own code at work again."""
    without = differing(*stale(num_steps)[:2])
    _, adapter = install(strategy, step_lengths=step_lengths)
    multi, held, static = stale(num_steps)
    record(multi, static, monkeypatch)
    caplog.set_level(logging.WARNING)
    adapter.undo()
    assert differing(multi, held) <= without
    assert ("draft decode: CUDA graphs go on with the work that they recorded" in caplog.text) == (strategy == "graph")
