"""Exact step lengths on the real sglang backends: their values, where they can't be had, and what the log says of them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from nsa_plugin import ForwardMode
from nsa_plugin.adapters.sglang.compare import differences
from nsa_plugin.rigs.sglang import backends as kit
from tests.sglang.batches import (
    CONFIG,
    TABLE,
    TritonPrecompute,
    addresses,
    batch,
    capture_batch,
    record,
    replays,
    wrong,
)
from tests.sglang.conftest import Install

LOGGER = "sglang.srt.plugins.nsa_plugin"


@pytest.mark.parametrize("decode_impl", ["fa3", "flashmla_kv"])
@pytest.mark.parametrize("strategy", ["graph", "share"])
@pytest.mark.parametrize(("num_steps", "plugins"), [(2, ()), (4, ()), (6, ()), (4, (TritonPrecompute(),))])
def test_exact_step_lengths_are_sglangs_values_for_longer_sequences(
    install: Install, monkeypatch: pytest.MonkeyPatch, num_steps: int, strategy: str, decode_impl: str,
    plugins: tuple[object, ...],
) -> None:  # fmt: skip
    """Step i holds what sglang's own code computes for L + i + 1, and nothing else differs."""
    config = kit.Config(decode_impl=decode_impl)
    fresh = kit.make_backend(config, TABLE)
    host, _ = install(strategy, *plugins, step_lengths="exact")
    multi = kit.make_multi_step(config, TABLE, num_steps)
    static = capture_batch("DECODE", 4)
    multi.init_forward_metadata_out_graph(static, in_capture=True)
    if strategy == "graph":
        record(multi, static, monkeypatch)
    held = [backend.forward_metadata for backend in multi.attn_backends]
    assert len({metadata.real_page_table.data_ptr() for metadata in held}) == 1
    assert len({metadata.cache_seqlens_int32.data_ptr() for metadata in held}) == num_steps - 1
    buffers = [addresses(backend) for backend in multi.attn_backends]
    for live in replays("DECODE", CONFIG.width - num_steps):
        static.seq_lens.copy_(live.seq_lens)
        static.req_pool_indices.copy_(live.req_pool_indices)
        multi.init_forward_metadata_out_graph(kit.replay_view(live))
        if strategy == "graph":
            multi.init_forward_metadata_in_graph(static)
        for index, backend in enumerate(multi.attn_backends):
            longer = batch("DECODE", (live.seq_lens + index + 1).tolist(), live.req_pool_indices.tolist())
            expected = kit.engine_metadata(fresh, longer, "DECODE")
            assert differences(expected, backend.forward_metadata, backend, longer, ForwardMode.DECODE) == []
        assert [addresses(backend) for backend in multi.attn_backends] == buffers
    assert not host.fallbacks


def plain(multi: Any, static: Any) -> None:
    pass


def tree(multi: Any, static: Any) -> None:
    multi.topk = 2


def seeded(multi: Any, static: Any) -> None:
    static.spec_info = type("Seed", (), {"dsa_topk_indices": torch.zeros(4, 8)})()


@pytest.mark.parametrize(
    ("change", "of_draft_model", "reason"),
    [
        (tree, {}, "the draft is a tree"),
        (seeded, {}, "all steps use the top-k indices of one"),
        (plain, {"index_share_for_mtp_iteration": True}, "all steps use the top-k indices of one"),
        (plain, {"index_share_for_mtp_iteration": False}, ""),
        (plain, {}, ""),
    ],
)
def test_exact_step_lengths_are_refused_where_steps_have_none(
    install: Install, caplog: pytest.LogCaptureFixture, change: Any, of_draft_model: dict[str, Any], reason: str
) -> None:
    """The draft's tree, its batch (from 0.5.15 on, and not with every worker) or the draft model's configuration says so."""
    caplog.set_level(logging.INFO, LOGGER)
    install("auto", step_lengths="exact")
    multi = kit.make_multi_step(CONFIG, TABLE, 4, **of_draft_model)
    static = capture_batch("DECODE", 4)
    change(multi, static)
    multi.init_forward_metadata_out_graph(static, in_capture=True)
    live = replays("DECODE", CONFIG.width - 4)[0]
    multi.init_forward_metadata_out_graph(kit.replay_view(live))
    values = wrong("DECODE", kit.make_backend(CONFIG, TABLE), live, multi.attn_backends)
    assert bool(values) == (not reason)
    assert sum("with sglang's own step lengths" in line for line in caplog.messages) == bool(reason)
    assert not reason or reason in caplog.text


@pytest.mark.parametrize(
    ("steps", "change", "of_draft_model", "told"),
    [(4, plain, {}, 1), (3, plain, {}, 0), (4, tree, {}, 0), (4, plain, {"index_share_for_mtp_iteration": True}, 0)],
)
def test_the_log_says_once_what_exact_step_lengths_give_where_they_can_be_had(
    install: Install,
    caplog: pytest.LogCaptureFixture,
    steps: int,
    change: Any,
    of_draft_model: dict[str, Any],
    told: int,
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    install("auto")
    multi = kit.make_multi_step(CONFIG, TABLE, steps, **of_draft_model)
    for size in (4, 2):
        static = capture_batch("DECODE", size)
        change(multi, static)
        multi.init_forward_metadata_out_graph(static, in_capture=True)
    lines = [line for line in caplog.messages if "STEP_LENGTHS=exact is not set" in line]
    assert len(lines) == told
    assert all("accepted tokens with 4 steps: +" in line for line in lines)


def test_an_error_of_that_line_is_nobodys(
    install: Install, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    host, _ = install("share")
    monkeypatch.setattr(type(host), "with_exact_lengths", lambda host, steps: 1 // 0)
    multi = kit.make_multi_step(CONFIG, TABLE, 4)
    multi.init_forward_metadata_out_graph(capture_batch("DECODE", 4), in_capture=True)
    assert "draft decode: strategy share" in caplog.text and not host.fallbacks


def test_exact_step_lengths_are_refused_for_a_draft_of_which_nothing_is_known(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    multi = kit.make_multi_step(CONFIG, TABLE, 4)
    install("share", step_lengths="exact")
    multi.init_forward_metadata_out_graph(capture_batch("DECODE", 4), in_capture=True)
    assert "is not known: the draft was made before the plugin was installed" in caplog.text
