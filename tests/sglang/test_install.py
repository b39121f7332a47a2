"""What of installing and undoing is sglang's own affair; the adapter contract itself is in test_conformance.py."""

from __future__ import annotations

import logging
import pkgutil
from typing import Any

import pytest
import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from nsa_plugin import ForwardMode
from nsa_plugin.adapters.probe import installed_version
from nsa_plugin.adapters.sglang import releases, reports
from nsa_plugin.rigs.sglang import backends as kit
from tests.sglang.batches import CONFIG, TABLE, batch, capture_batch
from tests.sglang.conftest import Install

CLASSES = [pkgutil.resolve_name(path) for path in (releases.DSA.multi_step, releases.DSA.backend)]
METHOD = "init_forward_metadata_out_graph"
TARGET = f"{releases.DSA.multi_step}.{METHOD}"
LOGGER = "sglang.srt.plugins.nsa_plugin"


def methods() -> list[dict[str, Any]]:
    return [dict(vars(cls)) for cls in CLASSES]


def test_probe_of_the_installed_release_is_clean() -> None:
    assert releases.probe() == []
    assert releases.lacking("graph") == releases.lacking("draft extend") == ""
    assert installed_version("sglang") in releases.TESTED


def test_other_plugins_hooks_on_the_same_method_stay(install: Install) -> None:
    calls: list[str] = []
    original = CLASSES[0].__dict__[METHOD]

    def theirs(function: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append("theirs")
        return function(*args, **kwargs)

    HookRegistry.register(TARGET, theirs, HookType.AROUND)
    HookRegistry.apply_hooks()
    try:
        _, adapter = install("auto")
        multi = kit.make_multi_step(CONFIG, TABLE, 3)
        multi.init_forward_metadata_out_graph(capture_batch("DECODE", 1), in_capture=True)
        assert calls == ["theirs"]
        adapter.undo()
        multi.init_forward_metadata_out_graph(batch("DECODE", [9], [1]))
        assert calls == ["theirs"] * 2
        assert CLASSES[0].__dict__[METHOD].__wrapped__ is original
    finally:
        HookRegistry._hooks.pop(TARGET, None)
        HookRegistry._patched.discard(TARGET)
        setattr(CLASSES[0], METHOD, original)


def test_a_release_without_the_static_draft_extend_keeps_it(
    monkeypatch: pytest.MonkeyPatch, install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(CLASSES[1], "_refresh_topk_v2_plan")
    caplog.set_level(logging.INFO, LOGGER)
    before = methods()
    host, adapter = install("auto")
    assert "draft extend is left to sglang: looked for" in adapter.summary()
    plans = {plan.path: plan.strategy for plan in adapter.paths(host)}
    assert [plans.pop(path) for path in reports.PATHS.values()] == ["graph", "graph", "off"]
    assert {strategy for path, strategy in plans.items() if "FlashMLA" in path} == {"off"}
    backend = kit.make_backend(CONFIG, TABLE)
    backend._refresh_topk_v2_plan = lambda metadata: None  # sglang's own code calls it here
    for mode in ("TARGET_VERIFY", "DRAFT_EXTEND_V2"):
        backend.init_forward_metadata_out_graph(capture_batch(mode, 2), in_capture=True)
    assert [line for line in caplog.messages if "strategy" in line] == ["nsa-plugin: target verify: strategy graph"]
    adapter.undo()
    assert methods() == before


def test_what_is_not_covered_is_left_alone_by_name(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    host, _ = install("auto")
    backend = kit.make_backend(CONFIG, TABLE)
    backend.init_forward_metadata_out_graph(capture_batch("DECODE", 2), in_capture=True)  # decode without a draft
    multi = kit.make_multi_step(CONFIG, TABLE, 3)
    multi.init_forward_metadata_out_graph(capture_batch("DECODE", 2), in_capture=True)
    served = [line for line in caplog.messages if "strategy" in line]
    assert served == ["nsa-plugin: draft decode: strategy graph, without the wide page table, which nothing reads"]
    assert not host.fallbacks


def test_no_draft_backend_at_all(install: Install) -> None:
    host, _ = install("auto")
    multi = kit.make_multi_step(CONFIG, TABLE, 1)
    multi.init_forward_metadata_out_graph(capture_batch("DECODE", 2), in_capture=True)
    assert not host.fallbacks


@pytest.mark.parametrize("strategy", ["graph", "share", "copy"])
def test_undo_gives_every_backend_its_own_metadata_back(install: Install, strategy: str) -> None:
    """As if the plugin had never been there."""
    own = kit.make_multi_step(CONFIG, TABLE, 4)
    own.init_forward_metadata_out_graph(capture_batch("DECODE", 2), in_capture=True)
    _, adapter = install(strategy)
    multi = kit.make_multi_step(CONFIG, TABLE, 4)
    multi.init_forward_metadata_out_graph(capture_batch("DECODE", 2), in_capture=True)
    adapter.undo()
    for kind in (own, multi):
        held = [backend.decode_cuda_graph_metadata[2] for backend in kind.attn_backends]
        assert len({id(metadata) for metadata in held}) == 3
        assert all(
            backend.forward_metadata is metadata for backend, metadata in zip(kind.attn_backends, held, strict=True)
        )
        assert all(vars(backend).keys() == vars(own.attn_backends[0]).keys() for backend in kind.attn_backends)


def test_the_reference_also_equals_sglangs_plain_torch_path(monkeypatch: pytest.MonkeyPatch, install: Install) -> None:
    """Where sglang takes no CUDA kernel at all (its path for other devices), decode metadata is the same."""
    from sglang.srt.layers.attention import dsa_backend
    from sglang.srt.layers.attention.dsa import dsa_metadata_manager

    for module in (dsa_backend, dsa_metadata_manager):
        monkeypatch.setattr(module, "is_cuda", lambda: False)
    plain = kit.make_backend(CONFIG, TABLE)
    kit.engine_metadata(plain, capture_batch("DECODE", 3), "DECODE")
    install("auto")
    multi = kit.make_multi_step(CONFIG, TABLE, 3)
    multi.init_forward_metadata_out_graph(capture_batch("DECODE", 3), in_capture=True)
    live = batch("DECODE", [900, 64, 1], [1, 5, 0])
    multi.init_forward_metadata_out_graph(live)
    expected = kit.engine_metadata(plain, live, "DECODE")
    for backend in multi.attn_backends:
        assert kit.differences(expected, backend.forward_metadata, backend, live, ForwardMode.DECODE) == []
    assert isinstance(expected.page_table_1, torch.Tensor)
