"""Every live value equals what sglang's own per-backend code computes, in every mode, for any number of steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa_plugin import ForwardMode, hookimpl
from nsa_plugin.adapters.sglang import paths
from nsa_plugin.adapters.sglang.describe import describe
from nsa_plugin.core import api
from nsa_plugin.testing import sglang_backends as kit
from tests.sglang.conftest import Install

CONFIG = kit.Config()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TABLE = kit.req_to_token(CONFIG, DEVICE)
FIELDS = ("cache_seqlens_int32", "cu_seqlens_k", "page_table_1", "real_page_table", "dsa_cache_seqlens_int32",
          "dsa_cu_seqlens_k", "dsa_seqlens_expanded", "paged_mqa_schedule_metadata", "topk_v2_plan")  # fmt: skip


class TritonPrecompute:
    """Makes the plugin use its kernels on a CPU too, where `auto` means the reference."""

    @hookimpl
    def nsa_plugin_bind_precompute(self, batch: Any, geometry: Any, out: Any) -> Any:
        return api.bind_precompute(batch, out, impl="triton")

    @hookimpl
    def nsa_plugin_bind_copy(self, source: Any, destinations: Any) -> Any:
        return api.bind_copy(source, destinations, impl="triton")


def batch(mode: str, seq_lens: list[int], requests: list[int], lengths: torch.dtype = torch.int64) -> Any:
    tokens = len(seq_lens) * (1 if mode == "DECODE" else CONFIG.draft_tokens)
    return kit.make_batch(
        mode, torch.tensor(seq_lens, dtype=lengths, device=DEVICE), torch.tensor(requests, device=DEVICE), tokens
    )


def capture_batch(mode: str, size: int) -> Any:
    """As sglang's runners capture: every request at the fill length 1, request 0."""
    return batch(mode, [1] * size, [0] * size)


def replays(mode: str, longest: int) -> list[Any]:
    """Batches of four: page edges, long, a shrinking one, one padded by two requests, an idle one padded by four."""
    return [
        batch(mode, [63, 64, 65, 600], [3, 1, 0, 6]),
        batch(mode, [longest, 20, 257, 900], [2, 5, 7, 8]),
        batch(mode, [5, 7, 2, 1], [9, 1, 2, 3]),
        batch(mode, [300, 511, 1, 1], [4, 2, 0, 0]),
        batch(mode, [1, 1, 1, 1], [0, 0, 0, 0]),
    ]


def record(owner: Any, static: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What sglang's runners do inside a capture. Without a GPU the stream says that it is being captured."""
    with monkeypatch.context() as patch:
        patch.setattr(paths, "capturing", lambda: True)
        owner.init_forward_metadata_in_graph(static)


def set_static(static: Any, live: Any) -> None:
    """As sglang's runners: the live batch is copied into the buffers that the graph was captured with."""
    static.seq_lens.copy_(live.seq_lens)
    static.req_pool_indices.copy_(live.req_pool_indices)


@pytest.mark.parametrize("decode_impl", ["fa3", "flashmla_kv"])
@pytest.mark.parametrize(
    ("mode", "num_steps"), [("DECODE", 2), ("DECODE", 4), ("DECODE", 9), ("TARGET_VERIFY", 1), ("DRAFT_EXTEND_V2", 1)]
)
def test_graph_leaves_a_replay_nothing_but_the_recorded_work(
    install: Install, monkeypatch: pytest.MonkeyPatch, mode: str, num_steps: int, decode_impl: str
) -> None:
    """Before the graph runs nothing is written; what it recorded computes the whole of every backend's metadata."""
    config = kit.Config(decode_impl=decode_impl)
    reference = kit.make_backend(config, TABLE)
    host, _ = install("graph")
    owner: Any = kit.make_multi_step(config, TABLE, num_steps) if mode == "DECODE" else kit.make_backend(config, TABLE)
    backends = owner.attn_backends if mode == "DECODE" else [owner]
    static = capture_batch(mode, 4)
    owner.init_forward_metadata_out_graph(static, in_capture=True)
    owner.init_forward_metadata_in_graph(static)  # warm-up
    record(owner, static, monkeypatch)
    buffers = [addresses(backend) for backend in backends]
    for live in replays(mode, CONFIG.width - CONFIG.draft_tokens):
        before = backends[0].forward_metadata.cache_seqlens_int32.clone()
        set_static(static, live)
        owner.init_forward_metadata_out_graph(kit.replay_view(live))
        assert torch.equal(backends[0].forward_metadata.cache_seqlens_int32, before)
        owner.init_forward_metadata_in_graph(static)  # stands for the replay of the captured graph
        expected = kit.engine_metadata(reference, live, mode)
        for backend in backends:
            ours = paths.MODES[mode]
            assert kit.differences(expected, backend.forward_metadata, backend, live, ours) == []
        assert [addresses(backend) for backend in backends] == buffers
    assert not host.fallbacks


def test_graph_without_a_recording_prepares_before_the_replay(install: Install) -> None:
    """A runner that never calls the in-graph method gets its metadata like with `share`."""
    reference = kit.make_backend(CONFIG, TABLE)
    host, _ = install("graph")
    multi = kit.make_multi_step(CONFIG, TABLE, 4)
    multi.init_forward_metadata_out_graph(capture_batch("DECODE", 4), in_capture=True)
    for live in replays("DECODE", CONFIG.width):
        multi.init_forward_metadata_out_graph(kit.replay_view(live))
        expected = kit.engine_metadata(reference, live, "DECODE")
        for backend in multi.attn_backends:
            assert kit.differences(expected, backend.forward_metadata, backend, live, ForwardMode.DECODE) == []
    assert not host.fallbacks


def test_a_recording_that_fails_steps_down_to_share_with_one_line(
    install: Install, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reference = kit.make_backend(CONFIG, TABLE)
    install("graph")
    multi = kit.make_multi_step(CONFIG, TABLE, 4)
    static = capture_batch("DECODE", 4)
    multi.init_forward_metadata_out_graph(static, in_capture=True)
    with monkeypatch.context() as patch:
        patch.setattr(paths.Preparation, "record", lambda self: 1 / 0)
        multi.init_forward_metadata_in_graph(static)
    assert [record.getMessage().split(";")[0] for record in caplog.records if record.levelname == "ERROR"] == [
        "nsa-plugin: draft decode: strategy graph failed at capture (ZeroDivisionError: division by zero)"
    ]
    live = batch("DECODE", [300, 511, 1, 1], [4, 2, 0, 0])
    multi.init_forward_metadata_out_graph(kit.replay_view(live))
    expected = kit.engine_metadata(reference, live, "DECODE")
    for backend in multi.attn_backends:
        assert kit.differences(expected, backend.forward_metadata, backend, live, ForwardMode.DECODE) == []


@pytest.mark.parametrize("num_steps", [2, 4, 9])
def test_draft_backends_hold_one_page_table_and_give_the_others_back(
    install: Install, num_steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "sglang.srt.plugins.nsa_plugin")
    install("auto")
    multi = kit.make_multi_step(CONFIG, TABLE, num_steps)
    tables = {backend.decode_cuda_graph_metadata["page_table"].data_ptr() for backend in multi.attn_backends}
    assert len(tables) == 1
    size = CONFIG.max_batch_size * CONFIG.width * 4 / 2**20
    said = [line for line in caplog.messages if "given back" in line]
    assert said == (
        [
            f"nsa-plugin: draft decode: {num_steps - 1} draft backends share one page table; "
            f"{size * (num_steps - 2):.1f} MiB given back"
        ]
        if num_steps > 2
        else []
    )


def addresses(backend: Any) -> dict[str, int]:
    metadata = backend.forward_metadata
    return {name: getattr(metadata, name).data_ptr() for name in FIELDS if getattr(metadata, name) is not None}


@pytest.mark.parametrize("decode_impl", ["fa3", "flashmla_kv"])
@pytest.mark.parametrize("strategy", ["share", "copy"])
@pytest.mark.parametrize(
    ("num_steps", "plugins"),
    [(steps, ()) for steps in (2, 3, 4, 6, 9)] + [(steps, (TritonPrecompute(),)) for steps in (2, 4)],
)
def test_multi_step_draft(
    install: Install, num_steps: int, strategy: str, decode_impl: str, plugins: tuple[object, ...]
) -> None:
    config = kit.Config(decode_impl=decode_impl)
    reference = kit.make_backend(config, TABLE)
    host, _ = install(strategy, *plugins)
    multi = kit.make_multi_step(config, TABLE, num_steps)
    multi.init_forward_metadata_out_graph(capture_batch("DECODE", 4), in_capture=True)
    buffers = [addresses(backend) for backend in multi.attn_backends]
    held = [backend.forward_metadata for backend in multi.attn_backends]
    assert len({metadata.real_page_table.data_ptr() for metadata in held}) == (
        1 if strategy == "share" else num_steps - 1
    )
    assert all((metadata.page_table_1 is None) == (strategy == "share") for metadata in held)
    for live in replays("DECODE", CONFIG.width):
        multi.init_forward_metadata_out_graph(kit.replay_view(live))
        expected = kit.engine_metadata(reference, live, "DECODE")
        for backend in multi.attn_backends:
            assert backend.forward_metadata is backend.decode_cuda_graph_metadata[4]
            assert kit.differences(expected, backend.forward_metadata, backend, live, ForwardMode.DECODE) == []
        assert [addresses(backend) for backend in multi.attn_backends] == buffers
    assert not host.fallbacks


@pytest.mark.parametrize("decode_impl", ["fa3", "flashmla_kv"])
@pytest.mark.parametrize("strategy", ["share", "copy"])
@pytest.mark.parametrize(
    ("mode", "ours"),
    [("TARGET_VERIFY", ForwardMode.TARGET_VERIFY), ("DRAFT_EXTEND_V2", ForwardMode.DRAFT_EXTEND)],
)
@pytest.mark.parametrize("plugins", [(), (TritonPrecompute(),)], ids=["auto", "triton"])
def test_target_verify_and_draft_extend(
    install: Install, mode: str, ours: ForwardMode, strategy: str, decode_impl: str, plugins: tuple[object, ...]
) -> None:
    config = kit.Config(decode_impl=decode_impl)
    reference = kit.make_backend(config, TABLE)
    host, _ = install(strategy, *plugins)
    backend = kit.make_backend(config, TABLE)
    backend.init_forward_metadata_out_graph(capture_batch(mode, 4), in_capture=True)
    buffers = addresses(backend)
    for live in replays(mode, CONFIG.width - (CONFIG.draft_tokens if mode == "TARGET_VERIFY" else 0)):
        backend.init_forward_metadata_out_graph(kit.replay_view(live))
        expected = kit.engine_metadata(reference, live, mode)
        assert kit.differences(expected, backend.forward_metadata, backend, live, ours) == []
        assert backend.forward_metadata.page_table_1 is not None
        assert addresses(backend) == buffers
    assert not host.fallbacks


@pytest.mark.parametrize("lengths", [torch.int32, torch.int64])
@pytest.mark.parametrize("page_size", [1, 64])
def test_page_sizes_length_dtypes_and_longer_runner_buffers(
    install: Install, page_size: int, lengths: torch.dtype
) -> None:
    """Runners hand over buffers of their largest batch; page size 1 makes both page tables one."""
    config = kit.Config(page_size=page_size)
    table = kit.req_to_token(config, DEVICE)
    reference = kit.make_backend(config, table)
    install("auto")
    multi = kit.make_multi_step(config, table, 4)
    multi.init_forward_metadata_out_graph(capture_batch("DECODE", 2), in_capture=True)
    live = batch("DECODE", [70, 300, 5, 5, 5, 5], [3, 1, 2, 2, 2, 2], lengths)
    live.batch_size = 2
    multi.init_forward_metadata_out_graph(kit.replay_view(live))
    expected = kit.engine_metadata(reference, batch("DECODE", [70, 300], [3, 1]), "DECODE")
    for backend in multi.attn_backends:
        metadata = backend.forward_metadata
        assert (
            kit.differences(expected, metadata, backend, batch("DECODE", [70, 300], [3, 1]), ForwardMode.DECODE) == []
        )
        assert (metadata.real_page_table is metadata.page_table_1) == (page_size == 1)


def test_several_captured_sizes_each_keep_their_own_plan(install: Install) -> None:
    install("auto")
    reference = kit.make_backend(CONFIG, TABLE)
    multi = kit.make_multi_step(CONFIG, TABLE, 4)
    for size in (4, 2, 1):
        multi.init_forward_metadata_out_graph(capture_batch("DECODE", size), in_capture=True)
    for seq_lens, requests in (([9], [3]), ([400, 3, 70, 1], [1, 2, 3, 0]), ([5, 600], [4, 2]), ([800], [2])):
        live = batch("DECODE", seq_lens, requests)
        multi.init_forward_metadata_out_graph(kit.replay_view(live))
        expected = kit.engine_metadata(reference, live, "DECODE")
        for backend in multi.attn_backends:
            assert kit.differences(expected, backend.forward_metadata, backend, live, ForwardMode.DECODE) == []


def test_shipped_code_leaves_three_backends_stale_and_ours_none(install: Install) -> None:
    """Upstream's fused copy to three backends skips their DeepGEMM schedule and top-k plan (steps above 3)."""
    stale: dict[str, list[list[str]]] = {}
    for which in ("shipped", "ours"):
        reference = kit.make_backend(CONFIG, TABLE)
        if which == "ours":
            install("auto")
        multi = kit.make_multi_step(CONFIG, TABLE, 6)
        multi.init_forward_metadata_out_graph(capture_batch("DECODE", 4), in_capture=True)
        live = batch("DECODE", [600, 20, 1000, 300], [2, 5, 7, 0])
        multi.init_forward_metadata_out_graph(kit.replay_view(live))
        expected = kit.engine_metadata(reference, live, "DECODE")
        stale[which] = [
            kit.differences(expected, backend.forward_metadata, backend, live, ForwardMode.DECODE)
            for backend in multi.attn_backends
        ]
    assert stale["shipped"] == [["paged_mqa_schedule_metadata", "topk_v2_plan"]] * 3 + [[]] * 2
    assert stale["ours"] == [[]] * 5


def test_describe_takes_both_batch_types_and_copies_no_tensor() -> None:
    backend = kit.make_backend(CONFIG, TABLE)
    live = batch("TARGET_VERIFY", [70, 3], [1, 2])
    for given in (live, kit.replay_view(live, padding=1)):
        described = describe(given, backend=backend, mode=ForwardMode.TARGET_VERIFY)
        assert described.seq_lens is live.seq_lens
        assert described.slots.req_pool_indices is live.req_pool_indices  # type: ignore[union-attr]
        assert described.slots.req_to_token is backend.req_to_token  # type: ignore[union-attr]
        assert (described.batch_size, described.draft_tokens) == (2, CONFIG.draft_tokens)
