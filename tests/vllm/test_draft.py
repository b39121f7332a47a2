"""FlashMLA-sparse in the fused multi-step draft: equal to a full rebuild at every step, and undone without a trace."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.attention.backends.mla.flashmla_sparse import FlashMLASparseMetadataBuilder as Builder
from vllm.v1.attention.ops.metadata import compute_token_to_req_indices

from nsa_plugin.adapters.vllm import capabilities
from nsa_plugin.adapters.vllm.adapter import METHOD, VllmAdapter, request_map, unsupported
from nsa_plugin.host import Host
from nsa_plugin.settings import Settings
from tests.installing import installer
from tests.vllm.harness import Draft

LAYOUTS = {"bf16": ("auto", 4), "fp8 mixed": ("fp8_ds_mla", 4), "fp8 separate": ("fp8_ds_mla", 64)}
BATCHES = (
    ([100, 107, 126, 65], [1, 0, 2, 2], 1),
    ([63, 64, 700], [0, 0, 0], 70),  # padded to the captured size
    ([300], [1], 140),
    ([1000, 1022, 1024, 12], [0, 1, 0, 2], 7),  # at the model's maximal length
)
Install = Callable[..., tuple[Host, VllmAdapter]]


@pytest.fixture
def install() -> Iterator[Install]:
    """Installs the adapter; undoes it after the test."""
    yield from installer(VllmAdapter)


def drafts(layout: str, tokens: int, poison: bool = False) -> tuple[bool, list[dict[str, torch.Tensor]]]:
    """Whether the fused draft was chosen, and what each draft step of each batch saw."""
    draft = Draft(*LAYOUTS[layout], tokens)
    seen = []
    for lengths, rejected, first_block in BATCHES:
        if poison:
            for builder in draft.builders:
                if hasattr(builder, "req_id_per_token_buffer"):
                    builder.req_id_per_token_buffer.fill_(3)
        seen += draft.propose(lengths, [min(count, tokens) for count in rejected], first_block)
    return draft.speculator.supports_decode_metadata_update, seen


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [2, 3, 4, 8])
def test_every_step_equals_a_full_rebuild(install: Install, layout: str, tokens: int) -> None:
    fused, expected = drafts(layout, tokens)
    assert not fused, "stock vLLM rebuilds: that is the reference"
    assert len(expected) == len(BATCHES) * (tokens - 1)
    host, _ = install()
    fused, got = drafts(layout, tokens, poison=True)
    assert fused
    for index, (want, have) in enumerate(zip(expected, got, strict=True)):
        assert want.keys() == have.keys()
        wrong = [name for name in want if not torch.equal(want[name], have[name])]
        assert not wrong, f"step {index}: {wrong}"
    assert not host.fallbacks


def test_the_check_can_fail(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the request map's refresh the poisoned buffer shows."""
    install()
    monkeypatch.setattr(Builder, METHOD, lambda builder, metadata: None)
    _, got = drafts("bf16", 3, poison=True)
    assert any((step["request map"] == 3).any() for step in got if len(step["request map"]) < 4)


def test_undo_restores_the_builder_by_identity_and_install_can_be_repeated(install: Install) -> None:
    before = dict(vars(Builder))
    host, adapter = install()
    assert vars(Builder)["__init__"] is not before["__init__"] and METHOD in vars(Builder)
    assert adapter.install(host) == []
    adapter.undo()
    after = dict(vars(Builder))
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert adapter.install(host) == []


def test_an_error_of_ours_leaves_vllms_results_right(
    install: Install, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, expected = drafts("bf16", 3)
    from vllm.v1.attention.ops import metadata

    def planted(query_start_loc: Any, out: Any, num_mapped_tokens: int, num_tokens: int) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(
        capabilities, "uncovered_speculator", lambda speculator: "the builder's own update is tested here"
    )
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "compute_token_to_req_indices", planted)
        host, _ = install()
    logging.getLogger("vllm").propagate = True
    _, got = drafts("bf16", 3, poison=True)
    assert all(torch.equal(want[name], have[name]) for want, have in zip(expected, got, strict=True) for name in want)
    assert sum(host.fallbacks.values()) > 0
    # One line, which vLLM's logger and the root logger may both hand to the capture.
    errors = {id(record): record.getMessage() for record in caplog.records if record.levelname == "ERROR"}
    assert len(errors) == 1 and all("planted" in line for line in errors.values())


def test_what_is_missing_leaves_the_builder_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backend import AttentionMetadataBuilder

    monkeypatch.delattr(AttentionMetadataBuilder, METHOD)
    before = dict(vars(Builder))
    (problem,) = VllmAdapter().install(Host())
    assert METHOD in problem and dict(vars(Builder)) == before
    (problem,) = VllmAdapter().install(Host(Settings(strategy="share")))
    assert "NSA_PLUGIN_STRATEGY=graph or auto" in problem


@pytest.mark.parametrize(
    ("builder", "problem"),
    [
        ({}, ""),
        ({"dcp_world_size": 2}, "decode context parallelism is not covered"),
        ({"pcp_world_size": 2}, "prefill context parallelism is not covered"),
        ({"use_hisparse": True}, "HiSparse is not covered"),
    ],
)
def test_what_is_not_covered_is_named(builder: dict[str, Any], problem: str) -> None:
    assert unsupported(SimpleNamespace(**builder)) == problem


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.integers(0, 4))
def test_the_request_map_in_plain_torch_is_vllms(rows: list[int], padding: int) -> None:
    starts = torch.tensor([sum(rows[:i]) for i in range(len(rows) + 1)], dtype=torch.int32)
    tokens = sum(rows) + padding
    out, expected = (torch.full((tokens + 1,), -9, dtype=torch.int32) for _ in range(2))
    request_map(starts, out, tokens)
    if tokens:
        compute_token_to_req_indices(starts, expected, tokens, tokens)
    assert torch.equal(out, expected)


AUTOLOAD = """
import logging, sys
logging.basicConfig(level=logging.INFO)
from vllm.plugins import load_general_plugins
name = "vllm.v1.attention.backends.mla.flashmla_sparse"
load_general_plugins()
print("imported by the plugin:", name in sys.modules)
import importlib
builder = importlib.import_module(name).FlashMLASparseMetadataBuilder
print("patched:", "update_draft_decode_metadata" in vars(builder))
"""


@pytest.mark.skipif(
    not any(point.name == "nsa_plugin" for point in entry_points(group="vllm.general_plugins")),
    reason="nsa-plugin is not installed in this environment",
)
@pytest.mark.parametrize(("strategy", "patched"), [("auto", True), ("off", False), ("nonsense", False)])
def test_autoload_through_vllms_own_loader_in_a_fresh_process(strategy: str, patched: bool) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    environment = {**inherited, "NSA_PLUGIN_STRATEGY": strategy, "VLLM_LOGGING_LEVEL": "INFO"}
    done = subprocess.run(
        [sys.executable, "-c", AUTOLOAD], env=environment, capture_output=True, text=True, check=True, cwd="/"
    )
    assert "imported by the plugin: False" in done.stdout
    assert f"patched: {patched}" in done.stdout
    said = done.stdout + done.stderr
    expected = {"auto": "FlashMLA-sparse joins the fused multi-step draft", "off": "off (NSA_PLUGIN_STRATEGY)"}
    assert expected.get(strategy, "expected auto|graph|share|copy|off, got 'nonsense'") in said
