"""What of the fused draft is vLLM's own affair; the adapter contract itself is in test_conformance.py."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_plugin.adapters.vllm import releases
from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.adapters.vllm.builders import FLASHMLA_SPARSE
from nsa_plugin.adapters.vllm.releases import vllms_request_map
from nsa_plugin.adapters.vllm.v2.updates import request_map
from nsa_plugin.host import Host
from nsa_plugin.settings import Settings


@pytest.mark.parametrize("strategy", ["auto", "graph", "share", "copy", "off"])
def test_each_model_runner_is_patched_where_the_strategy_allows(strategy: str) -> None:
    owners = [pkgutil.resolve_name(name) for name in (releases.BUILDER, releases.V1_PROPOSER)]
    before = [dict(vars(owner)) for owner in owners]
    adapter = VllmAdapter()
    problems = adapter.install(Host(Settings(strategy=strategy)))
    patched = [dict(vars(owner)) != attributes for owner, attributes in zip(owners, before, strict=True)]
    summary = adapter.summary()
    adapter.undo()
    assert patched == [strategy in ("auto", "graph"), strategy != "off"]
    assert bool(problems) == (strategy == "off")
    assert ("Model Runner V2" in summary, "Model Runner V1" in summary) == tuple(patched)


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
    assert FLASHMLA_SPARSE.refused(SimpleNamespace(**builder)) == problem


@pytest.mark.skipif(vllms_request_map() is None, reason="this vLLM computes the request map on the host")
@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.integers(0, 4))
def test_the_request_map_in_plain_torch_is_vllms(rows: list[int], padding: int) -> None:
    starts = torch.tensor([sum(rows[:i]) for i in range(len(rows) + 1)], dtype=torch.int32)
    tokens = sum(rows) + padding
    out, expected = (torch.full((tokens + 1,), -9, dtype=torch.int32) for _ in range(2))
    request_map(starts, out, tokens)
    if tokens and (vllms := vllms_request_map()) is not None:
        vllms(starts, expected, tokens)
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
def test_autoload_through_vllms_own_loader_in_a_fresh_process() -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    environment = {**inherited, "NSA_PLUGIN_STRATEGY": "auto", "VLLM_LOGGING_LEVEL": "INFO"}
    done = subprocess.run(
        [sys.executable, "-c", AUTOLOAD], env=environment, capture_output=True, text=True, check=True, cwd="/"
    )
    assert "imported by the plugin: False" in done.stdout
    assert "patched: True" in done.stdout
    assert "FlashMLA-sparse joins the fused multi-step draft" in done.stdout + done.stderr
