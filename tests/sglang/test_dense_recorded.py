"""FlashAttention's draft extend: the graph that sglang records computes it, and nothing computes it before a replay."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from nsa_plugin.adapters.sglang import ledger, refusals, releases
from nsa_plugin.adapters.sglang.recorded import ROWS, RecordedGraph
from nsa_plugin.adapters.sglang.registry import beneath_hooks
from nsa_plugin.rigs.sglang.flash_attention import DraftExtend, Sizes, stand_ins
from nsa_plugin.rigs.sglang.recorded_engine import CASES, RecordedEngine
from nsa_plugin.testing.conformance import assert_conforms
from tests.sglang.batches import record
from tests.sglang.conftest import Install

(ROW,) = ROWS
VECTORS, TABLES = ROW.vectors, ROW.tables
BATCHES = (
    ([17, 64, 65, 300], [3, 1, 2, 6], [4, 1, 2, 4]),
    ([311, 4, 128, 129], [2, 5, 7, 4], [3, 4, 4, 1]),
    ([5, 63], [7, 3], [1, 2]),  # padded by two requests
    ([200], [1], [4]),
)


@pytest.fixture(autouse=True)
def module() -> Iterator[Any]:
    with stand_ins() as backends:
        yield backends


@pytest.fixture(autouse=True)
def _lacks_nothing(module: Any) -> None:
    if problem := releases.lacking(ROW.part):
        pytest.skip(problem)


def captured(monkeypatch: pytest.MonkeyPatch, made: DraftExtend, size: int = 4) -> Any:
    """What sglang's runner does at a capture; returns the static batch."""
    static = made.static(size)
    made.backend.init_forward_metadata_out_graph(static, in_capture=True)
    made.backend.init_forward_metadata_in_graph(static)  # a warm-up, which records nothing
    record(made.backend, static, monkeypatch)
    return static


def spoil(metadata: Any) -> None:
    """All but the zero that running sums begin with, which sglang's computation before a replay never writes."""
    for name in (*VECTORS, *TABLES, *ROW.slots):
        if (value := getattr(metadata, name)) is not None:
            value[1 if name.startswith("cu_") else 0 :] = -7


def live_values(metadata: Any, page_size: int, tokens: int) -> dict[str, torch.Tensor]:
    lengths = metadata.cache_seqlens_int32
    values = {name: getattr(metadata, name).clone() for name in VECTORS}
    for name in TABLES:
        if (table := getattr(metadata, name)) is not None:
            unread = torch.arange(table.shape[1]) * page_size >= lengths[:, None]
            values[name] = table.masked_fill(unread, -1)
    if metadata.swa_out_cache_loc is not None:
        values["swa_out_cache_loc"] = metadata.swa_out_cache_loc[:tokens].clone()
    return values


def untouched(made: DraftExtend, live: Any) -> bool:
    """Whether a preparation writes no tensor of the metadata."""
    metadata = made.backend.draft_extend_metadata[live.batch_size]
    spoil(metadata)
    made.backend.init_forward_metadata_out_graph(live)
    return bool((metadata.cache_seqlens_int32 == -7).all() and (metadata.page_table == -7).all())


@pytest.mark.parametrize("sliding_window", [False, True])
@pytest.mark.parametrize("page_size", [1, 16, 64, 128])
def test_the_graph_alone_gives_what_sglang_computes_before_it(
    install: Install, monkeypatch: pytest.MonkeyPatch, page_size: int, sliding_window: bool
) -> None:
    host, _ = install("graph")
    made = DraftExtend(Sizes(page_size, sliding_window))
    backend, static = made.backend, captured(monkeypatch, made)
    own = beneath_hooks(type(backend).init_forward_metadata_out_graph)
    for seq_lens, requests, extend in BATCHES:
        live = made.live(4, seq_lens, requests, extend)
        own(backend, live)
        metadata = backend.forward_metadata
        tokens = len(live.out_cache_loc)
        expected = live_values(metadata, page_size, tokens)
        left, bound = metadata.max_seq_len_k, backend.forward_metadata
        backend.forward_metadata, backend.forward_metadata_spec_decode_expand, metadata.max_seq_len_k = None, 1, 0
        assert untouched(made, live)
        assert backend.forward_metadata is bound and metadata.max_seq_len_k == left
        assert backend.forward_metadata_spec_decode_expand is None
        backend.init_forward_metadata_in_graph(static)  # the replay
        got = live_values(metadata, page_size, tokens)
        assert got.keys() == expected.keys()
        assert [name for name in got if not torch.equal(got[name], expected[name])] == []
        rows = torch.tensor(seq_lens)
        assert torch.equal(got["cache_seqlens_int32"][: len(rows)], rows.int())
    assert not host.fallbacks


def test_only_what_was_recorded_over_these_buffers_is_left_out(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("graph")
    made = DraftExtend(Sizes())
    static = made.static(4)
    made.backend.init_forward_metadata_out_graph(static, in_capture=True)
    made.backend.init_forward_metadata_in_graph(static)
    assert not untouched(made, made.live(4, *BATCHES[0]))  # nothing was captured
    captured(monkeypatch, made)
    assert untouched(made, made.live(4, *BATCHES[0]))
    assert not untouched(made, _other(made.live(4, *BATCHES[0]), "seq_lens"))
    assert not untouched(made, _other(made.live(4, *BATCHES[0]), "req_pool_indices"))
    foreign = made.live(4, *BATCHES[0])
    foreign.spec_info.extend_seq_lens_tensor = foreign.spec_info.extend_seq_lens_tensor.clone()
    assert not untouched(made, foreign)
    del foreign.spec_info.extend_seq_lens_tensor
    assert not untouched(made, foreign)
    held, live = made.backend.draft_extend_metadata, made.live(4, *BATCHES[0])
    made.backend.draft_extend_metadata = {**held, 4: dataclasses.replace(held[4])}  # not what the graph writes
    assert not untouched(made, live)
    made.backend.draft_extend_metadata = held
    assert untouched(made, live)
    made.backend.init_forward_metadata_out_graph(static, in_capture=True)  # captured anew, and nothing recorded since
    assert not untouched(made, made.live(4, *BATCHES[0]))


def _other(live: Any, name: str) -> Any:
    setattr(live, name, getattr(live, name).clone())
    return live


@pytest.mark.parametrize("strategy", ["share", "copy"])
def test_other_settings_leave_it_to_sglang(
    install: Install, monkeypatch: pytest.MonkeyPatch, module: Any, strategy: str
) -> None:
    method = module.FlashAttentionBackend.init_forward_metadata_out_graph
    host, adapter = install(strategy)
    hooked = strategy == "share"  # for target verify, which is in another table
    made = DraftExtend(Sizes())
    captured(monkeypatch, made)
    assert not untouched(made, made.live(4, *BATCHES[0]))
    assert (module.FlashAttentionBackend.init_forward_metadata_out_graph is not method) == hooked
    assert any(row.target.startswith(ROW.backend) for row in adapter.ledger()) == hooked
    (plan,) = (plan for plan in adapter.paths(host) if plan.path == ROW.path)
    assert (plan.strategy, plan.why) == ("off", "NSA_PLUGIN_STRATEGY asks for another strategy")


def test_the_ledger_has_its_methods_and_an_undo_puts_them_back(
    install: Install, monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    kind = module.FlashAttentionBackend
    before = dict(vars(kind))
    host, adapter = install("graph")
    changed = {f"{ROW.backend}.{name}" for name in before if vars(kind)[name] is not before[name]}
    assert changed == {row.target for row in adapter.ledger() if row.target.startswith(ROW.backend)}
    assert changed == {row.target for row in ledger.rows() if row.target.startswith(ROW.backend)} and len(changed) == 2
    (plan,) = (plan for plan in adapter.paths(host) if plan.path == ROW.path)
    assert (plan.strategy, plan.why, plan.gpus) == ("graph", "", frozenset({"9"}))
    made = DraftExtend(Sizes())
    captured(monkeypatch, made)
    assert untouched(made, made.live(4, *BATCHES[0]))
    adapter.undo()
    assert dict(vars(kind)) == before and not untouched(made, made.live(4, *BATCHES[0]))
    assert not [name for name in vars(made.backend) if "nsa_plugin" in name]


def test_the_switch_acts_at_the_next_replay(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    host, adapter = install("graph", on=False)
    made = DraftExtend(Sizes())
    captured(monkeypatch, made)
    for on in (False, True, False, True):
        host.switch(on, "test")
        assert untouched(made, made.live(4, *BATCHES[0])) == on
    assert adapter.switch(True) == []


def test_an_error_of_ours_leaves_the_batch_and_the_rest_to_sglang(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, _ = install("graph")
    made = DraftExtend(Sizes())
    captured(monkeypatch, made)
    with monkeypatch.context() as patch:
        patch.setattr(RecordedGraph, "reads", lambda self, batch: 1 / 0)
        assert not untouched(made, made.live(4, *BATCHES[0]))
    assert not untouched(made, made.live(4, *BATCHES[0]))
    assert list(host.fallbacks) == [("sglang", ROW.path, "replay", "graph", "ZeroDivisionError")]
    with monkeypatch.context() as patch:
        patch.setattr(RecordedGraph, "_describe", lambda self, batch: 1 / 0)
        captured(monkeypatch, made)
    assert not untouched(made, made.live(4, *BATCHES[0]))
    assert ("sglang", ROW.path, "capture", "graph", "ZeroDivisionError") in host.fallbacks


@pytest.mark.parametrize("sliding_window", [False, True])
def test_verification_compares_the_two_computations_of_sglang(
    install: Install, monkeypatch: pytest.MonkeyPatch, module: Any, sliding_window: bool
) -> None:
    host, _ = install("graph", verify=2)
    made = DraftExtend(Sizes(16, sliding_window))
    captured(monkeypatch, made)
    for number, numbers in enumerate(BATCHES):
        assert untouched(made, made.live(4, *numbers)) == bool(number % 2)
    assert host.verifications == {("sglang", ROW.path, "graph"): 2} and not host.mismatches and not host.fallbacks
    right = module.draft_extend_set_metadata

    def wrong(**arguments: Any) -> None:
        right(**arguments)
        arguments["page_table"][0, 0] += 1

    with mock.patch.object(module, "draft_extend_set_metadata", wrong):
        made.backend.init_forward_metadata_out_graph(made.live(4, *BATCHES[0]))
    assert host.mismatches == {("sglang", ROW.path, "graph", "page_table"): 1} and not host.on
    assert not untouched(made, made.live(4, *BATCHES[0]))


def test_observers_and_the_log_are_told(
    install: Install, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from nsa_plugin import hookimpl

    seen: list[Any] = []

    class Watcher:
        @hookimpl
        def nsa_plugin_observe_replays(self, engine: str, path: str, strategy: str, batch: Any) -> Any:
            return (lambda live: seen.append(live)) if path == ROW.path else None

    caplog.set_level(logging.INFO, "sglang.srt.plugins.nsa_plugin")
    install("graph", Watcher())
    made = DraftExtend(Sizes())
    captured(monkeypatch, made)
    made.backend.init_forward_metadata_out_graph(made.live(4, *BATCHES[1]))
    (batch,) = seen
    assert batch.seq_lens.tolist() == BATCHES[1][0] and batch.extend_lens.tolist() == BATCHES[1][2]
    assert f"{ROW.path}: strategy graph, as sglang records it" in caplog.text


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("mode", ["DECODE", "DRAFT_EXTEND_V2"])
def test_unknown_parameters_reach_sglangs_own_methods(install: Install, mode: str, by_name: bool) -> None:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    _, adapter = install("graph")
    made = DraftExtend(Sizes())
    batch = made.live(4, *BATCHES[0])
    batch.forward_mode = ForwardMode[mode]
    hooks = {target: hook for target, hook in adapter._hooks.items() if target.startswith(ROW.backend)}
    for target, hook in hooks.items():
        known: dict[str, Any] = {"forward_batch": batch} | ({"in_capture": True} if "out_graph" in target else {})
        original = mock.Mock()
        if by_name:
            hook(original, made.backend, **known, added=7)
        else:
            hook(original, made.backend, *known.values(), 7)
        (call,) = original.call_args_list
        assert [*call.args[1:], *call.kwargs.values()] == [*known.values(), 7] and call.args[0] is made.backend
    assert len(hooks) == 2


REFUSALS: dict[str, dict[str, Any]] = {
    "subclasses of FlashAttentionBackend": {},
    "drafts that are trees (--speculative-eagle-topk above 1)": {"topk": 4},
    "FlashAttention 4": {"fa_impl_ver": 4},
    "the translated slots of unified memory": {"kv_index_translator": mock.Mock(is_translating=True)},
    "KV caches in shards": {"_kv_shard_pool": object()},
    "encoder-decoder models": {"is_encoder_decoder": True},
    "local attention": {"local_attn_builder": object()},
    "prefill-aware sliding windows": {"is_prefill_aware_swa": True},
    "what sglang does not record": {"draft_extend_metadata_captured_in_graph": lambda: False},
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_is_not_covered_is_left_to_sglang_by_name(
    install: Install, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, module: Any, what: str
) -> None:
    assert REFUSALS.keys() == {name for name, _ in (*refusals.FLASH_ATTENTION, refusals.UNRECORDED)}
    caplog.set_level(logging.INFO, "sglang.srt.plugins.nsa_plugin")
    host, _ = install("graph")
    kind = module.FlashAttentionBackend
    made = DraftExtend(Sizes(), kind=kind if REFUSALS[what] else type("Musa", (kind,), {}))
    static = made.static(4)
    made.backend.init_forward_metadata_out_graph(static, in_capture=True)
    with monkeypatch.context() as patch:
        for name, value in REFUSALS[what].items():
            patch.setattr(made.backend, name, value)
        record(made.backend, static, patch)
    assert not untouched(made, made.live(4, *BATCHES[0]))
    assert f"{ROW.path}: strategy off (not covered: {what})" in caplog.text and not host.fallbacks


def test_the_kit() -> None:
    """A page size with and without sliding windows; `make matrix` checks all cases and all lines."""
    assert_conforms(RecordedEngine([CASES[0], CASES[-1]]), ["faithful", "addresses", "errors", "switch"])
