"""Every further backend that gets an update in place: frozen metadata, poisoned buffers, changing batches, as rebuilt."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock
from unittest.mock import MagicMock

import pytest
import torch
from vllm.v1.attention.backends.mla import indexer

from nsa_plugin.adapters.probe import installed_version, missing
from nsa_plugin.adapters.vllm import backends, in_place
from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.adapters.vllm.in_place import InPlace
from nsa_plugin.adapters.vllm.v2 import step as v2_step
from nsa_plugin.adapters.vllm.v2.updates import METHOD
from nsa_plugin.host import Host
from nsa_plugin.rigs.vllm.drafts import BATCHES
from nsa_plugin.rigs.vllm.v2_draft import DRAFT, Draft
from tests.vllm.drafts import POISONED, unequal_steps

Install = Callable[..., tuple[Host, VllmAdapter]]
ROWS = {row.backend: row for row in in_place.MORE}


def importable(name: str) -> Any:
    """A module of vLLM, whose kernels, which its builder does not need, may be absent."""
    absent = importlib.util.find_spec("flashinfer") is None
    kernels = {name: MagicMock() for name in ("flashinfer", "flashinfer.decode", "flashinfer.utils") if absent}
    with mock.patch.dict(sys.modules, kernels):
        module = importlib.import_module(name)
    sys.modules[name] = module
    return module


def backend(row: InPlace) -> Any:
    """vLLM's backend of a row. In 0.28 one builder is that of both FlashInfer backends for sparse MLA."""
    module = importable(row.module)
    builder = getattr(module, row.builder.rpartition(".")[2], None)
    if builder is None:
        pytest.skip(f"this vLLM has no {row.builder}")
    if problems := missing(row.needs):
        pytest.skip(problems[0])
    found: list[Any] = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and kind.__module__ == row.module and hasattr(kind, "get_builder_cls")
        and not kind.__name__.startswith("_") and kind.get_builder_cls() is builder
    ]  # fmt: skip
    names = [kind.get_name() for kind in found]
    assert all(name.startswith("FLASHINFER_MLA_SPARSE") or name == row.backend for name in names)
    return found[0]


def steps(row: InPlace, poison: bool) -> tuple[Draft, list[dict[str, torch.Tensor]]]:
    """What each draft step of each batch saw."""
    draft = Draft("auto", 4, 4, attention=backend(row))
    seen = []
    for lengths, rejected, first_block in BATCHES:
        for builder in draft.builders if poison else ():
            for name in POISONED:
                if hasattr(builder, name):
                    getattr(builder, name).fill_(3)
        if poison:
            draft.tables.slot_mappings.fill_(3)
        seen += draft.propose(lengths, rejected, first_block)
    return draft, seen


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_every_step_equals_a_full_rebuild(install: Install, hopper: None, row: InPlace) -> None:
    rebuilt, expected = steps(row, poison=False)
    if rebuilt.fused:
        pytest.skip("this vLLM has an update of its own")
    host, adapter = install()
    draft, got = steps(row, poison=True)
    assert draft.fused and not host.fallbacks
    assert len(got) == len(BATCHES) * 3 and unequal_steps(expected, got) == set()
    adapter.undo()
    assert not steps(row, poison=False)[0].fused


@pytest.mark.parametrize("row", [row for row in in_place.MORE if row.changes == "nothing"], ids=lambda row: row.backend)
def test_metadata_that_only_hold_views(row: InPlace, hopper: None) -> None:
    """Every tensor of a rebuilt batch is where that of the captured one is: in the runner's buffers."""
    draft = Draft("auto", 4, 3, attention=backend(row))
    captured = draft.graphs.inputs()[0][DRAFT[0]]
    runner = [
        *vars(draft.speculator.input_buffers).values(),
        *draft.tables.input_block_tables,
        draft.tables.slot_mappings,
    ]
    addresses = {value.untyped_storage().data_ptr() for value in runner if isinstance(value, torch.Tensor)}
    for holder in (captured, captured.decode):
        for name, value in vars(holder).items():
            assert not isinstance(value, torch.Tensor) or value.untyped_storage().data_ptr() in addresses, name
    assert captured.num_prefills == 0 and captured.prefill is None


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_the_comparison_can_fail(install: Install, hopper: None, monkeypatch: pytest.MonkeyPatch, row: InPlace) -> None:
    _, expected = steps(row, poison=False)
    install()
    monkeypatch.setattr(v2_step.Step, "run", lambda step: None)
    draft, got = steps(row, poison=True)
    assert not draft.fused or "slots" in unequal_steps(expected, got)


@pytest.mark.parametrize(
    ("row", "builder", "problem"),
    [
        ("FLASHINFER_MLA", {"dcp_world_size": 2}, "decode context parallelism"),
        ("FLASHINFER_MLA", {"non_causal_multi_token_decode": True}, "a non-causal draft"),
        ("FLASHINFER_MLA_SPARSE_SM120", {"use_hisparse": True}, "HiSparse"),
    ],
)
def test_what_is_refused_is_named(row: str, builder: dict[str, Any], problem: str) -> None:
    backend(ROWS[row])
    assert problem in ROWS[row].refused(SimpleNamespace(**builder))


def test_a_field_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    row = ROWS["TOKENSPEED_MLA"]
    known: Any = row.fields
    (path,) = (path for path in known if path.endswith("MLACommonDecodeMetadata"))
    monkeypatch.setitem(known, path, known[path] - {"seq_lens"})
    assert row.refused(SimpleNamespace()) == "MLACommonDecodeMetadata has fields that are not known here: seq_lens"


def test_what_one_backend_lacks_concerns_that_backend_alone(
    install: Install, hopper: None, monkeypatch: pytest.MonkeyPatch, log: Callable[[int], list[str]]
) -> None:
    one, other = backend(ROWS["FLASHINFER_MLA"]), backend(ROWS["TOKENSPEED_MLA"])
    with monkeypatch.context() as patch:
        patch.delattr(sys.modules[ROWS["FLASHINFER_MLA"].module], "FlashInferMLADecodeMetadata")
        install()
    assert not Draft("auto", 4, 3, attention=one).fused
    assert Draft("auto", 4, 3, attention=other).fused
    (line,) = (line for line in log(logging.INFO) if "left as it is" in line)
    assert "draft decode with FLASHINFER_MLA: left as it is" in line and "FlashInferMLADecodeMetadata" in line


INHERITED = {
    "FLASH_ATTN_DIFFKV", "TRITON_ATTN_DIFFKV", "DEEPSEEK_V41_SPARSE_INDEXER", "DEEPSEEK_V4_ROCM_MXFP4_INDEXER",
    "DEEPSEEK_V41_ROCM_MXFP4_INDEXER",
}  # fmt: skip
"""Backends whose builders are subclasses of one with an update."""


@pytest.mark.skipif(installed_version("vllm") != "0.33.0", reason="the table is of 0.33.0")
def test_every_backend_without_an_update_is_named() -> None:
    """Read in the sources, because many of them can't be imported without their device."""
    without: set[str] = set()
    with_update: set[str] = set()
    for source in Path(indexer.__file__).parents[1].rglob("*.py"):
        text = source.read_text()
        if source.parent.name != "prefill":
            names = re.findall(r'def get_name\(\) -> str:\s+return "(\w+)"', text)
            (with_update if f"def {METHOD}" in text else without).update(names)
    named = {name for name, _ in backends.LACKING_HOOK}
    assert len(named) == len(backends.LACKING_HOOK) and not named & with_update
    ours = {row.backend for row in (*in_place.ESSENTIAL, *in_place.MORE)}
    assert named == without - ours - INHERITED - {"FLASH_ATTN"}  # which ROCm's calls itself too
