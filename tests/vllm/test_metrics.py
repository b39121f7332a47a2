"""What is measured of vLLM's drafts: how many, how prepared, how much host time; and that nothing is hooked for it when off."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nsa_plugin import background, monitoring
from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.adapters.vllm.ledger import v1_patches
from nsa_plugin.adapters.vllm.v1.kept import KeptSteps
from nsa_plugin.adapters.vllm.v1.proposer import PATH as V1_PATH
from nsa_plugin.adapters.vllm.v1.verified import watch as v1_watch
from nsa_plugin.adapters.vllm.v2.step import PATH as V2_PATH
from nsa_plugin.host import Host
from nsa_plugin.rigs.vllm import v1_draft
from nsa_plugin.rigs.vllm.drafts import BATCHES
from nsa_plugin.settings import Settings
from tests.vllm.drafts import LARGE, TOKENS, captured

Install = Callable[..., tuple[Host, VllmAdapter]]
PROMETHEUS = frozenset({"prometheus"})
Grown = dict[tuple[str, str], tuple[int, int]]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Host], Grown]]:
    """Replays and draft steps of each path and strategy since the start of the test."""
    monkeypatch.setattr(background, "every_second", lambda task: None)

    def read() -> dict[tuple[str, str], tuple[float, float]]:
        found: dict[tuple[str, str], tuple[float, float]] = {}
        for metric, at in ((monitoring.prometheus().seconds, 0), (monitoring.prometheus().steps, 1)):
            for sample in (sample for family in metric.collect() for sample in family.samples):
                if sample.name.endswith(("_count", "_total")) and sample.labels["framework"] == "vllm":
                    key = sample.labels["path"], sample.labels["strategy"]
                    have = list(found.get(key, (0.0, 0.0)))
                    have[at] = sample.value
                    found[key] = (have[0], have[1])
        return found

    before = read()

    def since(host: Host) -> Grown:
        host.flush_metrics()
        grown: Grown = {}
        for key, (replays, steps) in read().items():
            replays_before, steps_before = before.get(key, (0.0, 0.0))
            if replays > replays_before:
                grown[key] = (int(replays - replays_before), int(steps - steps_before))
        return grown

    yield since


def test_drafts_whose_metadata_a_graph_computes(install: Install, counted: Any) -> None:
    """Of a replay, nothing but its count is left on the host; a batch without a graph is timed."""
    host, _ = install(metrics=PROMETHEUS)
    draft = captured()
    for batch in BATCHES:
        draft.propose(*batch)
    assert counted(host) == {(V2_PATH, "graph"): (len(BATCHES), len(BATCHES) * (TOKENS - 1))}
    (held,) = (key for key in host._monitor._pending if (key[0].path, key[1]) == (V2_PATH, TOKENS - 1))
    draft.propose(*LARGE)
    (seconds,) = host._monitor._pending[held]
    assert seconds > 1e-5  # it binds and launches
    assert counted(host)[V2_PATH, "graph"] == (len(BATCHES) + 1, (len(BATCHES) + 1) * (TOKENS - 1))


@pytest.mark.usefixtures("hopper")
def test_drafts_that_are_prepared_before_they_begin(install: Install, counted: Any) -> None:
    host, _ = install(metrics=PROMETHEUS, verify=2)
    draft = captured()
    for batch in (*BATCHES, LARGE):
        draft.propose(*batch)
    host.switch(False, "test")
    draft.propose(*BATCHES[0])
    ours = len(BATCHES) + 1
    assert counted(host) == {(V2_PATH, "copy"): (ours, ours * (TOKENS - 1)), (V2_PATH, "off"): (1, TOKENS - 1)}
    assert host.verifications == {("vllm", V2_PATH, "copy"): 1 + (len(BATCHES) - 1) // 2 + 1}  # LARGE has its own turn
    assert sum(
        sample.value
        for family in monitoring.prometheus().buffer_bytes.collect()
        for sample in family.samples
        if sample.labels["path"] == V2_PATH
    )


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("verify", [0, 1])
def test_drafts_of_model_runner_v1(counted: Any, monkeypatch: pytest.MonkeyPatch, verify: int) -> None:
    """One figure per draft: all its steps, and no verification."""
    host, patch = Host(Settings(metrics=PROMETHEUS, verify=verify)), v1_patches()
    patch.install(host)
    try:
        draft = v1_draft.V1Draft("auto", 4, TOKENS)
        v1_draft.proposals(draft, BATCHES[:3])
        assert counted(host) == {(V1_PATH, "copy"): (3, 3 * (TOKENS - 1))}
        assert host.verifications.total() == (3 if verify else 0)
        monkeypatch.setattr(KeptSteps, "at", lambda kept, step, longest: 1 / 0)
        v1_draft.proposals(draft, BATCHES[:2])
        draft.propose(*BATCHES[0], None, 1)  # a single token has no further steps
    finally:
        patch.undo()
    assert counted(host)[V1_PATH, "off"] == (2, 2 * (TOKENS - 1))


def test_the_time_of_a_v1_draft_is_that_of_its_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the update to the metadata of each step, whatever lies between the steps."""
    now = [0.0]
    host = Host(Settings(metrics=PROMETHEUS))

    def takes(seconds: float) -> Callable[..., None]:
        def call(*arguments: Any, **keywords: Any) -> None:
            now[0] += seconds

        return call

    class Fake:
        update, build = staticmethod(lambda: takes(1.0)), staticmethod(lambda: takes(0.25))
        serving = staticmethod(lambda proposer: proposer)
        report = host.path("vllm", "test", logging.getLogger("test"))

    class Proposer:
        num_speculative_tokens = 4

    patch: Any = Fake
    with monkeypatch.context() as clock:
        clock.setattr("time.perf_counter", lambda: now[0])
        update, build = v1_watch.watched(host, patch, "copy")
    for _ in range(2):
        build(Proposer, None)
        for step in (1, 2, 3):
            now[0] += 100.0
            update(Proposer, None, None, 1, 1, 64)
            build(Proposer, None, draft_index=step)
    (durations,) = (
        taken for (labels, steps), taken in host._monitor._pending.items() if (labels.path, steps) == ("test", 3)
    )
    assert durations == [3.75, 3.75]


def test_nothing_is_in_between_when_nothing_is_measured() -> None:
    host = Host(Settings())

    class Fake:
        made = (print, repr)
        report = host.path("vllm", "test", logging.getLogger("test"))
        update, build = staticmethod(lambda: Fake.made[0]), staticmethod(lambda: Fake.made[1])

    patch: Any = Fake
    assert v1_watch.watched(host, patch, "copy") == Fake.made
