"""The refreshed target when something is wrong or not covered: vLLM's own values, a line that says why, and verification."""

from __future__ import annotations

import dataclasses
import logging
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils")

from vllm.v1.attention.backends.mla import indexer

from nsa_plugin import repro
from nsa_plugin.adapters.reporting import PathReport
from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.adapters.vllm.v2.target import refusals
from nsa_plugin.adapters.vllm.v2.target.refresh import Refresh
from nsa_plugin.host import Host
from nsa_plugin.rigs.vllm.v2_target import Shape, TargetRunner, hopper
from nsa_plugin.rigs.vllm.v2_target_engine import Failing
from nsa_plugin.testing.engine import Fault
from tests.vllm.targets import FLAT, NATIVE, Mutated, each, refreshed, replays, shipped, unequal

Install = Callable[..., tuple[Host, VllmAdapter]]


@pytest.fixture(autouse=True, scope="module")
def logging_is_configured() -> None:
    """vLLM's first configuration of a process sets levels anew, and would take the lines from who listens already."""
    with hopper():
        TargetRunner(FLAT)


@pytest.fixture(autouse=True)
def on_hopper() -> Iterator[None]:
    with hopper():
        yield


@pytest.mark.parametrize(("working", "stage"), [(0, "capture"), (2, "capture"), (4, "replay"), (5, "replay")])
def test_an_error_hands_every_batch_back_to_vllm(
    working: int, stage: str, install: Install, log: Callable[[int], list[str]]
) -> None:
    """At a warm-up, a capture, a first and a later replay (which only an emulated graph can fail at)."""
    theirs = TargetRunner(FLAT)
    fault = Fault(working)
    host, _ = install("graph", Failing(fault))
    ours = TargetRunner(FLAT)  # two sizes, each warmed up and captured
    for seed in range(3):
        assert unequal(shipped(theirs, seed, 3), *refreshed(ours, seed, 3)[1:]) == []
    assert fault.calls == working + 1
    assert list(host.fallbacks) == [("vllm", "target verify", stage, "graph", "RuntimeError")]
    assert len([line for line in log(logging.ERROR) if "target verify" in line and "planted" in line]) == 1
    assert type(refreshed(ours, 9, 3)[0]) is dict


def config(**changes: Any) -> Any:
    """A VllmConfig as far as refusals look at it; `changes` by a path with underscores for dots."""
    made = SimpleNamespace(
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=False
        ),
        speculative_config=SimpleNamespace(enable_adaptive_verification=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        kv_transfer_config=None,
    )
    for path, value in changes.items():
        owner, _, name = path.rpartition("__")
        setattr(getattr(made, owner) if owner else made, name, value)
    return made


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parallel_config__decode_context_parallel_size": 2}, "decode context parallelism is not covered"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "prefill context parallelism is not covered"),
        ({"parallel_config__use_ubatching": True}, "microbatches (DBO) is not covered"),
        ({"speculative_config__enable_adaptive_verification": True}, "adaptive verification is not covered"),
        ({"speculative_config": None}, "no speculative decoding"),
        ({"attention_config__hisparse_config": object()}, "HiSparse is not covered"),
        ({"kv_transfer_config": object()}, "a KV connector"),
    ],
)
def test_engines_that_are_not_covered_are_named(changes: dict[str, Any], words: str) -> None:
    state = object.__new__(pkgutil.resolve_name(refusals.STATE))
    assert refusals.uncovered(config(), state) == ""
    assert refusals.uncovered(config(**changes), state).startswith(words)
    assert "prepares attention in a way of its own" in refusals.uncovered(config(), object())


def other_builder(runner: TargetRunner) -> None:
    builder = runner.builders[0]
    builder.__class__ = type("Another", (type(builder),), {})


def compressed(runner: TargetRunner) -> None:
    for builder in runner.builders:
        builder.compress_ratio = 4


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (other_builder, "Another is not covered"),
        (compressed, "compressed indexer cache"),
        (lambda runner: setattr(runner.builders[-1], "dcp_world_size", 2), "decode context parallelism"),
        (lambda runner: setattr(runner.builders[-1], "varies", True), "query lengths that vary"),
    ],
)
def test_builders_that_are_not_covered_are_left_to_vllm(
    spoil: Callable[[TargetRunner], None], words: str, install: Install, log: Callable[[int], list[str]]
) -> None:
    ours = TargetRunner(NATIVE)
    host, _ = install("graph")
    spoil(ours)
    with mock.patch.object(type(ours.builders[-1]), "build", _frozen(ours)):
        ours.capture()
    assert replays(ours).refreshes == {} and not host.fallbacks
    lines = [line for line in log(logging.INFO) if words in line]
    assert len(lines) == 2 and "target verify: strategy off" in lines[0] and "draft extend: strategy off" in lines[1]


def _frozen(runner: TargetRunner) -> Any:
    """A build that does not look at what was spoilt."""
    real = indexer.DeepseekV32IndexerMetadataBuilder.build

    def build(builder: Any, *args: Any, **kwargs: Any) -> Any:
        plain = {"compress_ratio": 1, "dcp_world_size": 1}
        changed = {name: vars(builder)[name] for name in plain}
        vars(builder).update(plain)
        try:
            made = real(builder, *args, **kwargs)
        finally:
            vars(builder).update(changed)
        if "varies" in vars(builder):  # as on Blackwell
            made.decode.indices = made.decode.decode_lens
        return made

    return build


def test_a_field_that_is_not_known_is_left_to_vllm(install: Install, log: Callable[[int], list[str]]) -> None:
    install("graph")
    new = SimpleNamespace(name="of_a_later_release")
    real = dataclasses.fields

    def fields(kind: Any) -> Any:
        return (*real(kind), new) if kind is indexer.DeepSeekV32IndexerDecodeMetadata else real(kind)

    with mock.patch("nsa_plugin.adapters.vllm.builders.dataclasses.fields", fields):
        ours = TargetRunner(FLAT)
    assert replays(ours).refreshes == {}
    assert any("of_a_later_release" in line for line in log(logging.INFO))


@pytest.mark.parametrize("shape", [NATIVE, FLAT, Shape("bf16", 3, block_size=128)], ids=["by request", "by row", "128"])
def test_a_verified_graph_is_the_graph_itself(shape: Shape, install: Install) -> None:
    host, _ = install("graph", verify=2)
    ours = TargetRunner(shape)
    for seed, requests in enumerate((3, 4, 1, 2)):
        late, *_ = refreshed(ours, seed, requests)
        assert late.built == (seed % 2 == 0)  # of each size the first, then every second
    assert not host.mismatches and sum(host.verifications.values()) >= 2


@pytest.mark.parametrize("plane", ["request_map", "lengths", "query_lens", "row_pages"])
def test_a_difference_is_reported_and_the_next_batch_is_vllms(
    plane: str, install: Install, log: Callable[[int], list[str]], tmp_path: Path
) -> None:
    theirs = TargetRunner(FLAT)
    spoil = each(plane, lambda values, live: values.flatten()[:1].add_(1))
    host, _ = install("graph", Mutated(spoil), verify=1, repro_dir=tmp_path)
    ours = TargetRunner(FLAT)
    refreshed(ours, 0, 3)
    assert {key[:3] for key in host.mismatches} == {("vllm", "target verify", "graph")}
    assert any(plane in key[3] for key in host.mismatches)
    [line] = log(logging.ERROR)
    assert "from the next batch on: this one was computed with the others" in line and not host.on
    metadata, *seen = refreshed(ours, 1, 3)
    assert type(metadata) is dict and unequal(shipped(theirs, 1, 3), *seen) == []
    [file] = tmp_path.glob("*.npz")
    computed = repro.recompute(repro.load(file), "reference")
    assert computed["engine"] == [] and len(computed["plugin"]) == 1 and plane in computed["plugin"][0]


def test_a_plane_that_the_graph_does_not_write_shows(install: Install) -> None:
    """vLLM's own build before the replay must not hide it."""
    host, _ = install("graph", verify=1)
    with mock.patch.object(Refresh, "run", lambda refresh: None):
        ours = TargetRunner(FLAT)
        refreshed(ours, 0, 3)
    assert any("lengths" in key[3] for key in host.mismatches)


def test_replays_are_counted(install: Install) -> None:
    host, _ = install("graph")
    counted: list[tuple[str, str]] = []
    with mock.patch.object(
        type(host),
        "instrument",
        lambda host, call, engine, path, strategy, steps: lambda _: counted.append((path, strategy)),
    ):
        ours = TargetRunner(FLAT)
    for seed in range(3):
        refreshed(ours, seed, 2)
    assert counted == [("target verify", "graph")] * 3


def test_the_paths_are_listed_with_reasons(install: Install) -> None:
    host, adapter = install("graph", verify=1)
    plans = {plan.path: plan for plan in adapter.paths(host)}
    assert plans["target verify (Model Runner V2)"].strategy == "graph"
    assert "no work of its own" in plans["draft extend (Model Runner V2)"].why
    other = Host()
    other.switch(False, "test")
    assert {plan.strategy for plan in adapter.paths(other) if "Model Runner V2" in plan.path} == {"off"}


def test_a_tensor_of_the_flag_can_be_written_outside_of_inference_mode(install: Install) -> None:
    _, adapter = install("graph")
    ours = TargetRunner(FLAT)
    refreshed(ours, 0, 2)
    assert not torch.is_inference_mode_enabled()
    adapter.undo()
    assert [refresh._is_enabled for refresh in replays(ours).refreshes.values()] == [False, False]


def test_the_target_is_left_to_vllm_where_nothing_unverified_may_be_used(
    install: Install, log: Callable[[int], list[str]]
) -> None:
    theirs = TargetRunner(FLAT)
    host, adapter = install("graph", verify=1, verify_mode="before")
    ours = TargetRunner(FLAT)
    metadata, *seen = refreshed(ours, 0, 3)
    assert type(metadata) is dict and unequal(shipped(theirs, 0, 3), *seen) == []
    assert not host.verifications and not host.fallbacks
    why = "NSA_PLUGIN_VERIFY_MODE=before can't be had here"
    assert any("target verify" in line and why in line for line in log(logging.INFO))
    plans = {plan.path: plan for plan in adapter.paths(host)}
    for path in ("target verify", "draft extend"):
        plan = plans[f"{path} (Model Runner V2)"]
        assert plan.strategy == "off" and plan.why == why
    assert plans["draft decode (Model Runner V2)"].strategy == "copy"


def test_batches_that_are_handed_to_vllm_are_counted(install: Install) -> None:
    counts: list[str] = []

    def instrument(report: Any, call: Any, strategy: str, steps: int) -> Any:
        def counted(argument: Any) -> None:
            counts.append(strategy)
            call(argument)

        return counted

    with mock.patch.object(PathReport, "instrument", instrument):
        host, _ = install("graph")
        ours = TargetRunner(FLAT)
        counts.clear()
        refreshed(ours, 0, 3)
        host.switch(False, "test")
        refreshed(ours, 1, 3)
        host.switch(True, "test")
        refreshed(ours, 2, 3)
        for refresh in replays(ours).refreshes.values():
            refresh.failed = True
        refreshed(ours, 3, 3)
        replays(ours).fail()
        refreshed(ours, 4, 3)
    assert counts == ["graph", "off", "graph", "off", "off"]
