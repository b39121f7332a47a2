"""FlashAttention's and FlashMLA's draft steps, target verify and draft extend: the graph alone gives sglang's own values."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_plugin.adapters.base import UNPROVED
from nsa_plugin.adapters.sglang import dense, hooked, refusals, releases
from nsa_plugin.adapters.sglang.dense import ROWS, DensePreparation
from nsa_plugin.adapters.sglang.registry import beneath_hooks
from nsa_plugin.rigs.sglang.dense import Dense, pages, stand_ins
from nsa_plugin.rigs.sglang.dense_engine import CASES as CASES_OF_THE_KIT
from nsa_plugin.rigs.sglang.dense_engine import DenseEngine
from nsa_plugin.rigs.sglang.flash_attention import Sizes
from nsa_plugin.testing.conformance import assert_conforms
from tests.sglang.batches import TritonPrecompute
from tests.sglang.conftest import Install

BATCHES: tuple[tuple[list[int], list[int]], ...] = (
    ([17, 64, 65, 300], [3, 1, 2, 6]),
    ([303, 4, 128, 129], [2, 5, 7, 4]),
    ([311, 309, 64, 312], [2, 5, 7, 4]),  # the last tokens of a context of 312
    ([5, 63], [7, 3]),  # padded by two requests
    ([200], [1]),
    ([], []),  # an idle batch, which is all padding
)
SPOILED = (
    "cache_seqlens_int32", "cu_seqlens_k", "page_table", "block_kv_indices", "num_splits", "swa_page_table", "swa_out_cache_loc",
)  # fmt: skip
FA3, FLASHMLA = "FlashAttention", "FlashMLA"
NAMES: dict[str, Any] = {FA3: "fa3", FLASHMLA: "flashmla"}


@pytest.fixture(autouse=True)
def _running() -> Iterator[None]:
    with stand_ins():
        yield


@pytest.fixture(autouse=True)
def _lacks_nothing(_running: None) -> None:
    if problem := next((problem for row in ROWS if (problem := releases.lacking(row.part))), ""):
        pytest.skip(problem)


def made(row: Any, page_size: int = 64, steps: int = 4, windows: bool = False) -> Dense:
    name = row.path.rpartition("(")[2].rstrip(")")
    return Dense(NAMES[name], row.mode, Sizes(page_size, windows), steps)


class Captured:
    """One captured size of a rig, with an emulated graph: what is launched within the capture is launched at each replay."""

    def __init__(self, rig: Dense, monkeypatch: pytest.MonkeyPatch, size: int = 4) -> None:
        self.rig, self.size = rig, size
        self.static = rig.static(size)
        rig.owner.init_forward_metadata_out_graph(self.static, in_capture=True)
        self.seen = [backend.forward_metadata for backend in rig.backends]  # what captured kernels read
        rig.owner.init_forward_metadata_in_graph(self.static)
        with monkeypatch.context() as patch:
            patch.setattr(hooked, "capturing", lambda: True)
            rig.owner.init_forward_metadata_in_graph(self.static)

    def prepare(self, seq_lens: list[int], requests: list[int]) -> Any:
        live = self.rig.live(self.size, seq_lens, requests)
        self.rig.owner.init_forward_metadata_out_graph(live)
        return live

    def replay(self) -> list[dict[str, torch.Tensor]]:
        self.rig.owner.init_forward_metadata_in_graph(self.static)
        return self.values()

    def values(self) -> list[dict[str, torch.Tensor]]:
        return [self.rig.values(metadata, index, self.size) for index, metadata in enumerate(self.seen)]

    def spoil(self) -> None:
        for metadata in self.seen:
            for name in SPOILED:
                if (value := getattr(metadata, name, None)) is not None:
                    value.fill_(-7)

    def is_spoiled(self) -> bool:
        """Whether a preparation writes nothing."""
        self.spoil()
        self.prepare(*BATCHES[0])
        return bool(pages(self.seen[0]).eq(-7).all())


def expected(rig: Dense, live: Any) -> list[dict[str, torch.Tensor]]:
    """What sglang's own code gives, in a rig of its own."""
    beneath_hooks(type(rig.owner).init_forward_metadata_out_graph)(rig.owner, live)
    return [rig.values(backend.forward_metadata, index, 4) for index, backend in enumerate(rig.backends)]


def own(row: Any, page_size: int = 64, steps: int = 4, windows: bool = False) -> Dense:
    rig = made(row, page_size, steps, windows)
    method = beneath_hooks(type(rig.owner).init_forward_metadata_out_graph)
    method(rig.owner, rig.static(4), in_capture=True)
    return rig


def wrong(
    row: Any, monkeypatch: pytest.MonkeyPatch, page_size: int, steps: int, graph: bool = True, windows: bool = False
) -> list[str]:
    """What differs from sglang's own values after replays of all batches."""
    captured = Captured(made(row, page_size, steps, windows), monkeypatch)
    reference = own(row, page_size, steps, windows)
    found = []
    for numbers in BATCHES:
        want = expected(reference, reference.live(4, *numbers))
        captured.spoil()
        captured.prepare(*numbers)
        got = captured.replay() if graph else captured.values()
        assert len(got) == len(want) == (steps - 1 if row.mode == "DECODE" else 1)
        for step, (ours, theirs) in enumerate(zip(got, want, strict=True)):
            assert ours.keys() == theirs.keys() and windows == ("swa_page_table" in ours)
            found += [
                f"{numbers[0]}, step {step}: {name}" for name in ours if not torch.equal(ours[name], theirs[name])
            ]
    return found


CASES = [
    *[(row, page_size, 4) for row in ROWS for page_size in ((1, 16, 128) if FA3 in row.path else (64,))],
    *[(row, 64, steps) for row in ROWS if row.draft for steps in ((2, 3, 8) if FA3 in row.path else (2,))],
]


@pytest.mark.parametrize(("row", "page_size", "steps"), CASES, ids=lambda value: getattr(value, "path", value))
def test_the_graph_alone_gives_sglangs_own_values(
    install: Install, monkeypatch: pytest.MonkeyPatch, row: Any, page_size: int, steps: int
) -> None:
    host, _ = install("graph")
    assert wrong(row, monkeypatch, page_size, steps) == []
    assert not host.fallbacks


@pytest.mark.parametrize(
    ("row", "page_size", "steps", "strategy"),
    [(ROWS[0], 1, 3, "graph"), (ROWS[0], 16, 5, "share"), (ROWS[0], 64, 2, "graph"), (ROWS[1], 1, 4, "share"), (ROWS[1], 64, 4, "graph")],
    ids=lambda value: getattr(value, "path", value),
)  # fmt: skip
def test_with_a_pool_of_sliding_windows(
    install: Install, monkeypatch: pytest.MonkeyPatch, row: Any, page_size: int, steps: int, strategy: str
) -> None:
    host, _ = install(strategy)
    assert wrong(row, monkeypatch, page_size, steps, strategy == "graph", windows=True) == []
    assert not host.fallbacks


def test_the_kernel_too(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("graph", TritonPrecompute())
    for row, windows in ((ROWS[0], False), (ROWS[1], False), (ROWS[-1], False), (ROWS[0], True), (ROWS[1], True)):
        assert wrong(row, monkeypatch, 64, 3, windows=windows) == []


def test_the_check_can_fail(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("graph")
    monkeypatch.setattr(
        DensePreparation, "_length_offsets", lambda self, batch, exact: tuple(range(len(self._backends)))
    )
    assert any("cache_seqlens_int32" in problem for problem in wrong(ROWS[0], monkeypatch, 64, 3))


@pytest.mark.parametrize(
    ("row", "windows"),
    [*[(row, False) for row in ROWS], (ROWS[0], True)],
    ids=lambda value: getattr(value, "path", value),
)
def test_the_switch_an_error_and_an_undo_give_it_back_to_sglang(
    install: Install, monkeypatch: pytest.MonkeyPatch, row: Any, windows: bool
) -> None:
    host, adapter = install("graph")
    captured, reference = Captured(made(row, windows=windows), monkeypatch), own(row, windows=windows)

    def right(numbers: Any) -> bool:
        """Whether what runs before the graph gives sglang's own values to captured kernels."""
        captured.spoil()
        captured.prepare(*numbers)
        got, want = captured.values(), expected(reference, reference.live(4, *numbers))
        return all(
            torch.equal(ours[name], theirs[name]) for ours, theirs in zip(got, want, strict=True) for name in ours
        )

    assert captured.is_spoiled()  # nothing runs before the graph
    host.switch(False, "test")
    assert right(BATCHES[0])
    there = captured.values()
    with monkeypatch.context() as patch:
        patch.setattr(DensePreparation, "native", False)  # a graph asks nobody, and runs what it has recorded
        replayed = captured.replay()
    assert all(torch.equal(ours[name], was[name]) for ours, was in zip(replayed, there, strict=True) for name in was)
    host.switch(True, "test")
    assert captured.is_spoiled()
    with monkeypatch.context() as patch:
        patch.setattr(DensePreparation, "_point", lambda self: 1 / 0)
        captured.rig.backends[0].forward_metadata = None
        assert right(BATCHES[1])
    assert list(host.fallbacks) == [("sglang", row.path, "replay", "graph", "ZeroDivisionError")]
    assert right(BATCHES[2])
    captured = Captured(captured.rig, monkeypatch)  # anew: ours again
    assert captured.is_spoiled()
    adapter.undo()
    assert right(BATCHES[0])
    captured.replay()
    assert right(BATCHES[3])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.path)
def test_an_error_at_the_capture_leaves_sglangs_own(
    install: Install, monkeypatch: pytest.MonkeyPatch, row: Any
) -> None:
    host, _ = install("graph")
    monkeypatch.setattr(DensePreparation, "_sizes", lambda self: 1 / 0)
    assert wrong(row, monkeypatch, 64, 3, graph=False) == []
    assert ("sglang", row.path, "capture", "graph", "ZeroDivisionError") in host.fallbacks


CHECKED = [
    *[(row, "block_kv_indices" if FLASHMLA in row.path else "page_table") for row in ROWS],
    (ROWS[0], "swa_out_cache_loc"),
    (ROWS[1], "swa_page_table"),
]


@pytest.mark.parametrize("mode", ["before", "graph"])
@pytest.mark.parametrize(("row", "field"), CHECKED, ids=lambda value: getattr(value, "path", value))
def test_verification_finds_what_is_wrong(
    install: Install, monkeypatch: pytest.MonkeyPatch, row: Any, field: str, mode: str
) -> None:
    windows = field.startswith("swa")
    host, adapter = install("graph", verify=1, verify_mode=mode)
    strategy = "share" if mode == "before" else "graph"
    assert {plan.strategy for plan in adapter.paths(host) if plan.path == row.path} == {strategy}
    captured = Captured(made(row, steps=3, windows=windows), monkeypatch)
    reference = own(row, steps=3, windows=windows)

    def replay(numbers: Any) -> None:
        captured.prepare(*numbers)
        if mode == "graph":
            captured.replay()

    for numbers in BATCHES[:3]:
        replay(numbers)
    assert not host.mismatches and not host.fallbacks
    assert host.verifications == {("sglang", row.path, strategy): 3}
    values = getattr(captured.rig.backends[0].forward_metadata, field)
    with monkeypatch.context() as patch:
        run = DensePreparation.record if mode == "graph" else DensePreparation._replay_before

        def spoiling(self: Any, *batch: Any) -> None:
            run(self, *batch)
            values[(0,) * values.dim()] += 1

        patch.setattr(DensePreparation, run.__name__, spoiling)
        if mode == "before":
            captured = Captured(made(row, steps=3, windows=windows), monkeypatch)
            values = getattr(captured.rig.backends[0].forward_metadata, field)
        replay(BATCHES[0])
        captured.prepare(*BATCHES[1])
    assert host.mismatches[("sglang", row.path, strategy, field)] == 1 and not host.on
    want = expected(reference, reference.live(4, *BATCHES[1]))
    assert all(
        torch.equal(ours[name], theirs[name])
        for ours, theirs in zip(captured.values(), want, strict=True)
        for name in ours
    )


@pytest.mark.parametrize(
    ("row", "windows", "made_by_sglang", "kept"),
    [(ROWS[0], False, 12, 1), (ROWS[0], True, 21, 2), (ROWS[2], False, 3, 1)],
)
def test_draft_backends_share_the_page_tables_of_each_pool(
    install: Install, caplog: pytest.LogCaptureFixture, row: Any, windows: bool, made_by_sglang: int, kept: int
) -> None:
    caplog.set_level(logging.INFO, "sglang.srt.plugins.nsa_plugin")
    alone = {table.data_ptr() for table in page_tables(made(row, windows=windows))}
    install("graph")
    shared = {table.data_ptr() for table in page_tables(made(row, windows=windows))}
    assert (len(alone), len(shared)) == (made_by_sglang, kept)
    assert f"{row.path}: 3 draft backends share one page table" in caplog.text and "MiB given back" in caplog.text


@pytest.mark.parametrize("row", [row for row in ROWS if row.draft], ids=lambda row: row.path)
def test_page_tables_that_can_not_be_shared_are_sglangs_own(
    install: Install, monkeypatch: pytest.MonkeyPatch, row: Any
) -> None:
    host, _ = install("graph")
    with monkeypatch.context() as patch:
        patch.setattr(type(row.layout), "tables", lambda self, backend: 1 / 0)
        rig = made(row, steps=3)
    assert len({table.data_ptr() for table in page_tables(rig)}) == len(list(page_tables(rig)))
    assert list(host.fallbacks) == [("sglang", row.path, "capture", "share", "ZeroDivisionError")]
    monkeypatch.setattr(type(row.layout), "captured", lambda self, backend, mode, batch: 1 / 0)
    assert not Captured(rig, monkeypatch).is_spoiled()
    assert ("sglang", row.path, "capture", "graph", "ZeroDivisionError") in host.fallbacks


def page_tables(rig: Dense) -> Iterator[torch.Tensor]:
    for backend in rig.backends:
        if rig.name == "flashmla":
            yield backend.cuda_graph_kv_indices
            continue
        for store in ("decode_cuda_graph_metadata", "target_verify_metadata", "draft_extend_metadata"):
            yield from (value for name, value in getattr(backend, store).items() if "page_table" in str(name))


def test_auto_takes_what_a_gpu_has_run(install: Install) -> None:
    before = {row.backend: dict(vars(type(made(row).owner))) for row in ROWS}
    host, adapter = install("auto")
    plans = {plan.path: plan for plan in adapter.paths(host)}
    for row in ROWS:
        assert (dict(vars(type(made(row).owner))) != before[row.backend]) == row.proved
        assert row.proved or (plans[row.path].strategy, plans[row.path].why) == ("off", UNPROVED)
        assert not row.proved or plans[row.path].strategy == "graph"


def test_the_ledger_has_its_methods_and_an_undo_puts_them_back(install: Install) -> None:
    kinds = {row.backend: type(made(row).owner) for row in ROWS}
    before = {backend: dict(vars(kind)) for backend, kind in kinds.items()}
    host, adapter = install("graph")
    changed = {
        f"{backend}.{name}"
        for backend, kind in kinds.items()
        for name, value in vars(kind).items()
        if value is not before[backend].get(name)
    }
    assert changed == {row.target for row in adapter.ledger() if row.target.rpartition(".")[0] in kinds}
    assert len(changed) == 10 == len([row for row in adapter.ledger() if row.target in changed])
    plans = {plan.path: plan for plan in adapter.paths(host)}
    assert all((plans[row.path].strategy, plans[row.path].why) == ("graph", "") for row in ROWS)
    adapter.undo()
    assert {backend: dict(vars(kind)) for backend, kind in kinds.items()} == before


REFUSALS: dict[str, dict[str, Any]] = {
    "drafts that are trees (--speculative-eagle-topk above 1)": {"topk": 4},
    "the translated slots of unified memory": {"kv_index_translator": SimpleNamespace(is_translating=True)},
    "FlashAttention 4": {"fa_impl_ver": 4},
    "KV caches in shards": {"_kv_shard_pool": object()},
    "encoder-decoder models": {"is_encoder_decoder": True},
    "local attention": {"local_attn_builder": object()},
    "prefill-aware sliding windows": {"is_prefill_aware_swa": True},
    "decode context parallelism": {"dcp_world_size": 2},
    "ragged verification": {},
}
OF_FLASHMLA = ("decode context parallelism", "the translated slots of unified memory", "ragged verification")
LEFT_ALONE = [
    *[(ROWS[1], what) for what in REFUSALS if what != "decode context parallelism"],
    *[(ROWS[3], what) for what in OF_FLASHMLA],
]


@pytest.mark.parametrize(("row", "what"), LEFT_ALONE, ids=lambda value: getattr(value, "path", value))
def test_what_is_not_covered_is_left_to_sglang_by_name(
    install: Install, caplog: pytest.LogCaptureFixture, row: Any, what: str
) -> None:
    caplog.set_level(logging.INFO, "sglang.srt.plugins.nsa_plugin")
    _, adapter = install("graph")
    rig = made(row)
    static = rig.static(4)
    vars(rig.owner).update(REFUSALS[what])
    if not REFUSALS[what]:
        static.spec_info.ragged_verify_layout = object()
    hook = adapter._hooks[f"{row.backend}.{releases.OUT}"]
    hook(lambda *arguments, **keywords: rig.owner, rig.owner, static, in_capture=True)
    assert f"{row.path}: strategy off (not covered: {what})" in caplog.text


def test_every_refusal_is_tried() -> None:
    named = {name for name, _ in (*refusals.FLASH_ATTENTION, *refusals.FLASHMLA)}
    assert {name for name in named if not name.startswith("subclasses")} | {"ragged verification"} == REFUSALS.keys()


def test_a_ragged_batch_takes_a_captured_size_from_the_graph(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("graph")
    row = ROWS[1]
    captured = Captured(made(row), monkeypatch)
    live = captured.rig.live(4, *BATCHES[0])
    live.spec_info.ragged_verify_layout = object()
    called = []
    monkeypatch.setattr(dense, "by_sglang", lambda backends, batch, row: called.append(batch))
    captured.rig.owner.init_forward_metadata_out_graph(live)
    assert called == [live]
    captured.spoil()
    captured.replay()
    assert bool(captured.seen[0].page_table.eq(-7).all())


def test_the_kit() -> None:
    """A draft and a single backend; `make matrix` checks all cases and all lines."""
    engine = DenseEngine([CASES_OF_THE_KIT[0], CASES_OF_THE_KIT[4]])
    assert_conforms(engine, ["faithful", "addresses", "errors"])
