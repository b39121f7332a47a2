"""The target's graph refreshes its own metadata: equal to vLLM's rebuild in all that it reads, and never without one of the two."""

from __future__ import annotations

import gc
import inspect
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils")

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.input_batch import InputBatch

from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.adapters.vllm.v2.target.late import LateMetadata
from nsa_plugin.adapters.vllm.v2.target.refresh import Refresh
from nsa_plugin.core import api
from nsa_plugin.core.batch import BatchDescriptor
from nsa_plugin.hookspec import hookimpl
from nsa_plugin.host import Host
from nsa_plugin.rigs.vllm.v2_target import Batch, Shape, TargetRunner, hopper
from tests.vllm.targets import FLAT, NATIVE, POISON, Mutated, each, refreshed, replays, shipped, unequal

Install = Callable[..., tuple[Host, VllmAdapter]]
SHAPES = (
    Shape("bf16", 1), Shape("fp8 mixed", 2), Shape("fp8 separate", 3), Shape("bf16", 4), Shape("fp8 mixed", 5),
    Shape("fp8 separate", 6), Shape("bf16", 7), Shape("fp8 separate", 2, block_size=128), Shape("bf16", 3, block_size=128),
    Shape("fp8 mixed", 3, draft_heads=8), Shape("bf16", 4, block_size=128, draft_heads=8),
)  # fmt: skip
"""2 to 8 tokens, lengths by request (2 and 4) and by row, three layouts, blocks of one and two pages, two and four groups."""
WRITTEN = {
    "req_id_per_token", "seq_lens", "decode_lens", "per_req_decode_lens", "schedule_metadata", "block_table",
}  # fmt: skip
"""Fields that a rebuild writes."""
ROUNDS = ((2, 0), (3, 0), (1, 4), (4, 0))
"""Batches that grow and shrink: requests, and to how many other ranks pad them."""


@pytest.fixture(autouse=True)
def on_hopper() -> Iterator[None]:
    with hopper():
        yield


@pytest.fixture(scope="module")
def stocks() -> dict[Shape, TargetRunner]:
    """Targets of vLLM alone, captured before anything is installed."""
    return {}


@pytest.fixture
def stock(stocks: dict[Shape, TargetRunner]) -> Callable[[Shape], TargetRunner]:
    """The one of a shape; to be asked for before anything is installed."""

    def made(shape: Shape) -> TargetRunner:
        if shape not in stocks:
            stocks[shape] = TargetRunner(shape)
        return stocks[shape]

    return made


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.tokens + 1}-{s.layout}-{s.block_size}-{s.draft_heads}")
def test_a_refreshed_graph_reads_what_a_rebuild_writes(
    shape: Shape, stock: Callable[[Shape], TargetRunner], install: Install
) -> None:
    theirs = stock(shape)
    host, _ = install("graph")
    ours = TargetRunner(shape)
    for seed, (requests, pad_to) in enumerate(ROUNDS):
        want = shipped(theirs, seed, requests, pad_to)
        metadata, *seen = refreshed(ours, seed, requests, pad_to)
        assert isinstance(metadata, LateMetadata) and not metadata.built
        assert unequal(want, *seen) == []
        compared = {name.rpartition(".")[2] for name in want[0]}
        assert compared >= WRITTEN
    assert not host.fallbacks


def test_two_stock_rebuilds_are_not_equal_by_chance(stock: Callable[[Shape], TargetRunner]) -> None:
    """The comparison sees the batch: another one is read differently."""
    theirs = stock(NATIVE)
    assert unequal(shipped(theirs, 0, 3), *shipped(theirs, 1, 3)[:2])


def _own_request(plane: torch.Tensor, live: BatchDescriptor) -> None:
    plane[: live.num_rows] = torch.arange(live.num_rows) // live.draft_tokens


def _unclamped(plane: torch.Tensor, live: BatchDescriptor) -> None:
    rows = torch.arange(live.num_rows)
    plane[: live.num_rows] = live.seq_lens[rows // live.draft_tokens] - live.draft_tokens + 1 + rows % live.draft_tokens


def _of_all(plane: torch.Tensor, live: BatchDescriptor) -> None:
    plane[: live.batch_size] = live.draft_tokens


def _poisoned(plane: torch.Tensor, live: BatchDescriptor) -> None:
    plane.fill_(POISON)


def _shifted(plane: torch.Tensor, live: BatchDescriptor) -> None:
    plane[: live.num_rows - 1] = plane[1 : live.num_rows].clone()


MUTATIONS: dict[str, tuple[Shape, Any, str]] = {
    "padding is mapped to its own request": (NATIVE, each("request_map", _own_request), "req_id_per_token"),
    "lengths of padding are not clamped": (FLAT, each("lengths", _unclamped), "decode.seq_lens"),
    "lengths are one token long": (NATIVE, each("lengths", lambda plane, live: plane.add_(1)), "decode.seq_lens"),
    "padding has rows": (NATIVE, each("query_lens", _of_all), "per_req_decode_lens"),
    "rows of one token are not written": (FLAT, each("ones", _poisoned), "decode_lens"),
    "rows have the next row's pages": (FLAT, each("row_pages", _shifted), "block_table"),
    "padding has pages": (FLAT, each("row_pages", lambda plane, live: plane[:, 0].add_(1)), "block_table"),
    "a second indexer is left out": (NATIVE, each("lengths", _poisoned, last=True), "decode.seq_lens"),
    "pages of a block are the same one": (
        Shape("bf16", 3, block_size=128),
        each("request_pages", lambda plane, live: plane[:, 1::2].copy_(plane[:, ::2])), "block_table",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_is_spoilt_shows(mutation: str, stock: Callable[[Shape], TargetRunner], install: Install) -> None:
    shape, spoil, field = MUTATIONS[mutation]
    theirs = stock(shape)
    install("graph", Mutated(spoil))
    ours = TargetRunner(shape)
    wrong = [line for seed in (0, 5) for line in unequal(shipped(theirs, seed, 3), *refreshed(ours, seed, 3)[1:])]
    assert any(field in name for name in wrong), wrong


def test_a_schedule_that_is_not_made_anew_shows(
    stock: Callable[[Shape], TargetRunner], install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = stock(NATIVE)
    monkeypatch.setattr(Refresh, "run", lambda refresh: refresh._run.__self__._precompute(refresh._static))
    install("graph")
    wrong = unequal(shipped(theirs, 0, 3), *refreshed(TargetRunner(NATIVE), 0, 3)[1:])
    assert wrong and all("schedule_metadata" in name for name in wrong)


def mixed(runner: TargetRunner) -> Any:
    """An eager batch of requests with different numbers of tokens, which leaves other values in the builders' buffers."""
    batch = InputBatch.make_dummy(3, 8, runner.buffers, max_query_len=4)
    slots = runner.tables.get_dummy_slot_mappings(8)
    return runner.state.prepare_attn(
        batch, CUDAGraphMode.NONE, runner.tables.get_dummy_block_tables(3), slots, runner.groups, runner.cache
    )


@pytest.mark.parametrize("shape", [NATIVE, Shape("bf16", 4)], ids=["by request", "by row"])
def test_eager_batches_between_leave_nothing_behind(
    shape: Shape, stock: Callable[[Shape], TargetRunner], install: Install
) -> None:
    theirs = stock(shape)
    install("graph")
    ours = TargetRunner(shape)
    want = shipped(theirs, 3, 3)
    with ours.inference():
        eager = mixed(ours)
        assert type(eager) is dict  # an eager batch has its metadata at once
        batch = ours.batch(3, 3)
        late = ours.prepare(batch)
        assert unequal(want, *ours.replay(batch)) == [] and not late.built


def test_metadata_are_there_for_whoever_asks_and_a_late_build_is_right(
    stock: Callable[[Shape], TargetRunner], install: Install
) -> None:
    """An eager first pass reads them after the replay; the next replay is refreshed all the same."""
    theirs = stock(FLAT)
    install("graph")
    ours = TargetRunner(FLAT)
    layers = {name for same_cache in ours.groups for group in same_cache for name in group.layer_names}
    asks: list[Callable[[Any], Any]] = [
        lambda late: late[next(iter(layers))], lambda late: {**late}, dict, list, len, bool, lambda late: late.items(),
        lambda late: late | {}, lambda late: "x" in late, lambda late: late.get("x"), lambda late: late.copy(),
    ]  # fmt: skip
    for seed, ask in enumerate(asks):
        late, *_ = refreshed(ours, seed, 3)
        assert not late.built
        with ours.inference():
            ask(late)
        assert late.built and set(late) == layers and set({**late}) == layers
    assert unequal(shipped(theirs, 40, 2), *refreshed(ours, 40, 2)[1:]) == []


def test_a_graph_without_the_refresh_is_not_replayed_without_a_build(
    stock: Callable[[Shape], TargetRunner], install: Install
) -> None:
    """As a twin of the same size with other LoRAs that could not be refreshed: only the descriptor tells them apart."""
    theirs = stock(NATIVE)
    install("graph")
    ours = TargetRunner(NATIVE)
    want = shipped(theirs, 1, 3)
    with ours.inference():
        batch = ours.batch(1, 3)
        graph, twin = ours.manager.graphs[batch.descriptor], replace(batch.descriptor, num_active_loras=1)
        graph.forward = inspect.getclosurevars(graph.forward).nonlocals["forward"]  # what vLLM alone captures
        ours.manager.graphs[twin] = graph
        ours.poison(POISON)
        late = ours.prepare(batch)
        seen = ours.replay(replace(batch, descriptor=twin))
    assert late.built and unequal(want, *seen) == []


def test_off_leaves_a_captured_graph_to_vllm_at_the_next_replay(
    stock: Callable[[Shape], TargetRunner], install: Install
) -> None:
    theirs = stock(NATIVE)
    host, adapter = install("graph")
    ours = TargetRunner(NATIVE)
    assert refreshed(ours, 0, 3)[0].built is False
    host.switch(False, "test")
    want = shipped(theirs, 1, 3)
    metadata, *seen = refreshed(ours, 1, 3)
    assert type(metadata) is dict and unequal(want, *seen) == []
    with ours.inference():  # what the graph has recorded writes nothing: it would make up for this
        batch = ours.batch(1, 3)
        ours.prepare(batch)
        ours.builders[0].req_id_per_token_buffer.fill_(9)
        assert bool((ours.replay(batch)[0]["0 FlashMLASparseMetadata.req_id_per_token"] == 9).all())
    host.switch(True, "test")
    metadata, *seen = refreshed(ours, 1, 3)
    assert not metadata.built and unequal(want, *seen) == [] and adapter.switch(True) == []


def test_captured_while_off_nothing_is_recorded_and_switching_on_says_so(install: Install) -> None:
    host, adapter = install("graph")
    host.switch(False, "test")
    ours = TargetRunner(FLAT)
    host.switch(True, "test")
    assert type(refreshed(ours, 0, 3)[0]) is dict
    assert any("target verify was captured while switched off" in line for line in adapter.switch(True))


def test_an_earlier_manager_that_is_still_there_does_not_answer_for_graphs_captured_while_off(
    stock: Callable[[Shape], TargetRunner], install: Install
) -> None:
    theirs = stock(FLAT)
    host, _ = install("graph")
    ours = TargetRunner(FLAT)
    earlier = ours.manager
    host.switch(False, "test")
    ours.capture()
    host.switch(True, "test")
    want = shipped(theirs, 1, 3)
    metadata, *seen = refreshed(ours, 1, 3)
    assert type(metadata) is dict and unequal(want, *seen) == [] and earlier is not ours.manager


def test_an_undo_leaves_the_engine_as_it_was(stock: Callable[[Shape], TargetRunner], install: Install) -> None:
    theirs = stock(NATIVE)
    _, adapter = install("graph")
    ours = TargetRunner(NATIVE)
    with ours.inference():
        batch = ours.batch(2, 3)
        late = ours.prepare(batch)
        adapter.undo()
        assert late.built  # the gate is gone: what waits is built
    want = shipped(theirs, 1, 3)
    metadata, *seen = refreshed(ours, 1, 3)
    assert type(metadata) is dict and unequal(want, *seen) == []


@pytest.mark.parametrize("width", [2, 3])
def test_graphs_of_fewer_tokens_than_the_most_are_refreshed_by_what_they_read(width: int, install: Install) -> None:
    """As with a number of draft tokens that changes: a builder for 4 tokens has lengths by request for 2, by row for 3."""
    theirs, ours = TargetRunner(NATIVE), TargetRunner(NATIVE)
    theirs.width = ours.width = width
    theirs.capture()
    install("graph")
    ours.capture()
    for seed, requests in enumerate((3, 2)):
        late, *seen = refreshed(ours, seed, requests)
        assert isinstance(late, LateMetadata) and not late.built
        assert unequal(shipped(theirs, seed, requests), *seen) == []


def test_a_dummy_run_of_a_full_graph_reads_dummies(stock: Callable[[Shape], TargetRunner], install: Install) -> None:
    """vLLM builds a dummy batch as if for a capture; it is no capture, and is refreshed as any other."""
    theirs = stock(FLAT)
    install("graph")
    ours = TargetRunner(FLAT)
    refreshed(ours, 0, 4)
    seen: list[Any] = []
    for runner in (theirs, ours):
        with runner.inference():
            descriptor = runner.manager.dispatch(4, 4 * runner.width, runner.width, 0)
            dummy = InputBatch.make_dummy(4, descriptor.num_tokens, runner.buffers, max_query_len=runner.width)
            tables = runner.tables.get_dummy_block_tables(4)
            batch = Batch(descriptor, 4, dummy, tables, runner.tables.get_dummy_slot_mappings(descriptor.num_tokens))
            metadata = runner.prepare(batch, for_capture=True)
            seen.append(runner.replay(batch)[0])
    assert not metadata.built
    written = [name for name in seen[0] if name.rpartition(".")[2] in WRITTEN]
    assert written and [name for name in written if not torch.equal(seen[0][name], seen[1][name])] == []


def test_captured_again_the_old_graphs_go_with_all_that_is_theirs(install: Install) -> None:
    """As after a profile run, whose graphs are thrown away, and after elastic re-capture."""
    install("graph")
    ours = TargetRunner(FLAT)
    old = [weakref.ref(refresh) for refresh in replays(ours).refreshes.values()]
    manager = weakref.ref(ours.manager)
    assert len(old) == 2
    ours.capture()
    gc.collect()
    assert manager() is None and all(reference() is None for reference in old)
    assert refreshed(ours, 0, 3)[0].built is False
    ours.manager.release_graphs()
    kept = replays(ours)
    with ours.inference():
        assert type(ours.prepare(ours.batch(0, 3))) is dict  # no graph, so an eager batch
    assert replays(ours) is kept


class ThirdParty:
    """Provides and observes by the package's own means."""

    def __init__(self) -> None:
        self.ran, self.described = 0, [type(None)]
        self.seen: list[tuple[str, str, BatchDescriptor]] = []

    @hookimpl
    def nsa_plugin_bind_precompute(self, batch: Any, out: Any, enabled: Any) -> Any:
        run = api.bind_precompute(batch, out, impl="reference", enabled=enabled)

        def counted(live: BatchDescriptor) -> None:
            self.ran += 1
            run(live)

        return counted

    @hookimpl
    def nsa_plugin_observe_replays(self, engine: str, path: str, strategy: str, batch: Any) -> Any:
        return lambda live: self.seen.append((path, strategy, live))


def test_a_third_party_provides_the_refresh_and_observes_replays(
    stock: Callable[[Shape], TargetRunner], install: Install
) -> None:
    theirs, plugin = stock(FLAT), ThirdParty()
    install("graph", plugin)
    ours = TargetRunner(FLAT)
    captured = plugin.ran
    want = shipped(theirs, 4, 3)
    assert captured and plugin.seen == []
    assert unequal(want, *refreshed(ours, 4, 3)[1:]) == []
    assert plugin.ran == captured + 1  # the emulated graph runs what it has recorded
    [(path, strategy, live)] = plugin.seen
    assert (path, strategy, live.batch_size, live.draft_tokens) == ("target verify", "graph", 4, 3)
    assert live.query_start_loc is not None and live.query_start_loc[:5].tolist() == [0, 3, 6, 9, 9]


class Deaf:
    """Knows draft steps alone."""

    @hookimpl
    def nsa_plugin_bind_precompute(self, batch: Any, out: Any) -> Any:
        return out.steps[0]


def test_a_plugin_that_knows_steps_alone_leaves_the_target_to_vllm_with_one_line(
    install: Install, log: Callable[[int], list[str]]
) -> None:
    host, _ = install("graph", Deaf())
    ours = TargetRunner(FLAT)
    assert type(refreshed(ours, 0, 3)[0]) is dict
    assert sum(host.fallbacks.values()) == 1
    assert len([line for line in log(logging.ERROR) if "target verify" in line and "GroupMetadata" in line]) == 1
