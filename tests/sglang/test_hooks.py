"""The hooks themselves: what they pass through, what other plugins patch beside them, which device is asked."""

from __future__ import annotations

import functools
import pkgutil
from typing import Any
from unittest import mock

import pytest
import torch

from nsa_plugin.adapters.sglang import hooked, registry, releases
from nsa_plugin.adapters.sglang.adapter import SglangAdapter
from nsa_plugin.adapters.sglang.releases import nsa_batch_to_capture, nsa_batch_to_replay
from nsa_plugin.host import Host
from nsa_plugin.rigs.sglang import backends as kit
from tests.sglang.batches import CONFIG, TABLE, batch, capture_batch
from tests.sglang.conftest import Install


@pytest.mark.parametrize("by_name", [False, True])
def test_unknown_parameters_reach_sglangs_own_method(install: Install, by_name: bool) -> None:
    """Of every hook: a release that adds a parameter gets it, however it is passed."""
    _, adapter = install("auto")
    for target, replacement in adapter._hooks.items():
        name = target.rpartition(".")[2]
        owner = kit.make_multi_step(CONFIG, TABLE, 3) if "MultiStep" in target else kit.make_backend(CONFIG, TABLE)
        capturing = capture_batch("TARGET_VERIFY", 2)
        known: dict[str, Any] = {
            "init_cuda_graph_state": {"max_bs": 4, "max_num_tokens": 4},
            "init_forward_metadata_out_graph": {"forward_batch": capturing, "in_capture": True},
            "init_forward_metadata_in_graph": {"forward_batch": capturing},
            "__init__": {"model_runner": mock.Mock(), "topk": 1, "speculative_num_steps": 3},
            "run": {"attn_backend": owner, "fb_view": capturing, "key": 2},
            "is_captured": {"key": 2},
        }[name]
        original = mock.Mock(return_value=False)
        subject = mock.Mock() if name in ("run", "is_captured") else owner
        if by_name:
            replacement(original, subject, **known, added=7)
        else:
            replacement(original, subject, *known.values(), 7)
        (call,) = original.call_args_list
        bound = [*call.args[1:], *call.kwargs.values()]
        assert call.args[0] is subject and bound[-1] == 7 and bound[:-1] == list(known.values()), target


def test_unknown_parameters_of_the_older_methods() -> None:
    lengths = torch.tensor([5, 6])
    captured = nsa_batch_to_capture(2, 8, "pool", lengths, None, "mode", "spec", 7, added=7)
    live = nsa_batch_to_replay(2, "pool", lengths, 11, None, "mode", "spec", "cpu", None, 7, added=7)
    assert captured.batch_size == live.batch_size == 2


def test_anothers_patch_under_the_hook_stays(monkeypatch: pytest.MonkeyPatch, install: Install) -> None:
    """`functools.wraps` makes it look like a hook; undo and a second installation take off hooks only."""
    target = f"{releases.generation().multi_step}.init_forward_metadata_out_graph"
    owner, _, name = target.rpartition(".")
    cls = pkgutil.resolve_name(owner)
    own = cls.__dict__[name]

    @functools.wraps(own)
    def patched(*arguments: Any, **keywords: Any) -> Any:
        return own(*arguments, **keywords)

    monkeypatch.setattr(cls, name, patched)
    for _ in range(2):
        _, adapter = install("auto")
        assert registry.beneath_hooks(cls.__dict__[name]) is patched and cls.__dict__[name] is not patched
        adapter.undo()
        assert cls.__dict__[name] is patched


def test_anothers_patch_over_the_hook_stays_and_ours_does_nothing(
    monkeypatch: pytest.MonkeyPatch, install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    target = f"{releases.generation().multi_step}.init_forward_metadata_out_graph"
    owner, _, name = target.rpartition(".")
    cls = pkgutil.resolve_name(owner)
    own = cls.__dict__[name]
    _, adapter = install("share")
    hook = cls.__dict__[name]

    @functools.wraps(hook)
    def patched(*arguments: Any, **keywords: Any) -> Any:
        return hook(*arguments, **keywords)

    assert registry.beneath_hooks(patched) is own
    setattr(cls, name, patched)
    try:
        adapter.undo()
        assert cls.__dict__[name] is patched and f"another patch covers the hook of {target}" in caplog.text
        multi = kit.make_multi_step(CONFIG, TABLE, 3)
        multi.init_forward_metadata_out_graph(capture_batch("DECODE", 2), in_capture=True)
        held = [backend.forward_metadata for backend in multi.attn_backends]
        assert len({metadata.real_page_table.data_ptr() for metadata in held}) == 2
        (problem,) = SglangAdapter().install(Host())
        assert f"sglang's own hooks on {target}, found another patch over them" in problem
    finally:
        setattr(cls, name, own)
        HookRegistry._patched.discard(target)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "npu"])
def test_capturing_asks_the_device_that_torch_runs_on(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    for there, under_capture in ((True, True), (True, False), (False, True)):
        device = mock.Mock(
            is_available=lambda there=there: there, is_current_stream_capturing=lambda answer=under_capture: answer
        )
        device.__name__ = kind
        monkeypatch.setattr(torch, "get_device_module", lambda device=device: device)
        assert hooked.capturing() == (there and under_capture)
    monkeypatch.setattr(torch, "get_device_module", lambda: torch.cpu)
    assert not hooked.capturing()


@pytest.mark.parametrize("graph_type", ["CUDAGraph", "XPUGraph", "NPUGraph"])
def test_rehearsing_takes_the_graph_of_the_device(
    monkeypatch: pytest.MonkeyPatch, install: Install, graph_type: str
) -> None:
    device = mock.MagicMock(spec=["is_available", "Stream", "current_stream", "stream", graph_type])
    monkeypatch.setattr(torch, "get_device_module", lambda *_: device)
    monkeypatch.setattr(hooked, "capturing", lambda: False)
    host, _ = install("graph")
    owner = kit.make_backend(CONFIG, TABLE)
    owner.init_forward_metadata_out_graph(batch("TARGET_VERIFY", [1, 1], [0, 0]), in_capture=True)
    graph = getattr(device, graph_type)
    graph().capture_begin.assert_called_once()
    graph().capture_end.assert_called_once()
    assert not host.fallbacks


def test_no_graph_where_sglang_prepares_on_another_stream(monkeypatch: pytest.MonkeyPatch, install: Install) -> None:
    """It may overwrite the lengths that draft, verify and extend share before a graph has read them."""
    monkeypatch.setenv("SGLANG_ENABLE_OVERLAP_PLAN_STREAM", "1")
    host, adapter = install("auto")
    plans = [plan for plan in adapter.paths(host) if "Flash" not in plan.path]
    assert {plan.strategy for plan in plans} == {"share"}
    assert all("SGLANG_ENABLE_OVERLAP_PLAN_STREAM" in plan.why for plan in plans)
