"""The table of builders: complete, as read in vLLM's sources; and every further builder with an update in place replayed.

Replayed are frozen metadata, with poisoned buffers and changing batches, against vLLM's rebuild.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import logging
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock
from unittest.mock import MagicMock

import pytest
import torch
from vllm.v1.attention.backends.mla import indexer

from benchmarks.matrix.builders import BACKENDS, bases, classes, metadata_builders, unexamined
from nsa_plugin.adapters.base import UNPROVED
from nsa_plugin.adapters.probe import installed_version, missing
from nsa_plugin.adapters.vllm import builders, releases
from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.adapters.vllm.builder_rows import BuilderRow
from nsa_plugin.adapters.vllm.v2 import step as v2_step
from nsa_plugin.adapters.vllm.v2.updates import METHOD
from nsa_plugin.host import Host
from nsa_plugin.rigs.vllm.drafts import BATCHES
from nsa_plugin.rigs.vllm.v2_draft import DRAFT, Draft
from nsa_plugin.settings import Settings
from tests.vllm.drafts import POISONED, unequal_steps

Install = Callable[..., tuple[Host, VllmAdapter]]
ROWS = {row.backend: row for row in builders.MORE if row not in builders.SCHEDULED_DENSE}
"""The others are tried in test_dense.py."""


def importable(name: str) -> Any:
    """A module of vLLM, whose kernels, which its builder does not need, may be absent."""
    absent = importlib.util.find_spec("flashinfer") is None
    kernels = {name: MagicMock() for name in ("flashinfer", "flashinfer.decode", "flashinfer.utils") if absent}
    with mock.patch.dict(sys.modules, kernels):
        module = importlib.import_module(name)
    sys.modules[name] = module
    return module


def backend(row: BuilderRow) -> Any:
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


def steps(row: BuilderRow, poison: bool) -> tuple[Draft, list[dict[str, torch.Tensor]]]:
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
def test_every_step_equals_a_full_rebuild(install: Install, hopper: None, row: BuilderRow) -> None:
    rebuilt, expected = steps(row, poison=False)
    if rebuilt.fused:
        pytest.skip("this vLLM has an update of its own")
    host, adapter = install()
    draft, got = steps(row, poison=True)
    assert draft.fused and not host.fallbacks
    assert len(got) == len(BATCHES) * 3 and unequal_steps(expected, got) == set()
    adapter.undo()
    assert not steps(row, poison=False)[0].fused


@pytest.mark.parametrize("row", [row for row in builders.MORE if row.changes == "nothing"], ids=lambda row: row.backend)
def test_metadata_that_only_hold_views(row: BuilderRow, hopper: None) -> None:
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
def test_the_comparison_can_fail(
    install: Install, hopper: None, monkeypatch: pytest.MonkeyPatch, row: BuilderRow
) -> None:
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


BASES = ("vllm.v1.attention.backend", "vllm.model_executor.layers.attention.mla_attention",
         "vllm.model_executor.layers.attention.sparse_mla_attention")  # fmt: skip
"""Modules outside the package of backends, from whose classes these derive."""
NEWEST = pytest.mark.skipif(installed_version("vllm") in releases.TESTED[:-1], reason="the table is of a later release")


@functools.cache
def sources() -> dict[str, str]:
    """The source of vLLM's attention backends, by module: many can't be imported without their device."""
    root = Path(indexer.__file__).parents[5]
    paths = [
        *root.glob(f"{BACKENDS.replace('.', '/')}/**/*.py"),
        *(root / f"{base.replace('.', '/')}.py" for base in BASES),
    ]
    return {".".join(path.relative_to(root).with_suffix("").parts): path.read_text() for path in paths}


@functools.cache
def defined() -> dict[str, tuple[str, ast.ClassDef]]:
    """The dotted path and the syntax tree of each of their classes, by its name."""
    found = classes(sources())
    times = Counter(node.name for node in found.values())
    assert not [name for name, count in times.items() if count > 1 and name.endswith(("Backend", "Builder"))]
    return {node.name: (path, node) for path, node in found.items()}


def returns(name: str, method: str) -> str | None:
    """What a method of a class, its own or inherited, returns, if that is a name or a text; None if there is no method."""
    _, node = defined().get(name, ("", None))
    if node is None or name == "AttentionMetadataBuilder":
        return None
    for function in node.body:
        if isinstance(function, ast.FunctionDef) and function.name == method:
            last = function.body[-1]
            value = last.value if isinstance(last, ast.Return) else None
            return str(value.value) if isinstance(value, ast.Constant) else getattr(value, "id", "")
    return next((found for base in bases(node) if (found := returns(base, method)) is not None), None)


@NEWEST
def test_every_builder_of_vllm_has_a_row() -> None:
    assert unexamined({name: text for name, text in sources().items() if name.startswith(BACKENDS)}) == []
    assert builders.ROWS.keys() <= metadata_builders(sources()).keys()


@NEWEST
def test_every_row_has_the_backends_that_vllm_gives_its_builder() -> None:
    found: dict[str, set[str]] = {}
    for name, (path, _) in defined().items():
        if not path.startswith(BACKENDS) or name.startswith("_"):
            continue  # what others derive from
        builder, backend = returns(name, "get_builder_cls"), returns(name, "get_name")
        if builder in defined() and backend and backend.isupper():
            found.setdefault(defined()[builder][0], set()).add(backend)
    named = {path: {name.partition(" (")[0] for name in row.backends} for path, row in builders.ROWS.items()}
    assert found == {path: names for path, names in named.items() if names}


@NEWEST
def test_every_row_says_whether_vllm_itself_updates_it_in_place() -> None:
    theirs = {path for path, node in metadata_builders(sources()).items() if returns(node.name, METHOD) is not None}
    assert {path for path, row in builders.ROWS.items() if row.vllm_updates} == theirs


def test_every_row_is_served_or_left_alone_for_a_reason() -> None:
    assert len(builders.ROWS) == len((*builders.ESSENTIAL, *builders.MORE, *builders.POOLED, *builders.LEFT_ALONE))
    for row in builders.ROWS.values():
        served = (row.changes != "other", row.fields, row.needs, row.refusals)
        assert all(served) != bool(row.left_alone) and (not row.left_alone or not any((*served, row.keeper))), row


@pytest.mark.parametrize("row", [row for row in builders.ROWS.values() if not row.proved], ids=lambda row: row.backend)
def test_one_word_of_a_row_says_that_a_gpu_has_run_it(row: BuilderRow) -> None:
    auto, named = Host(), Host(Settings(strategy="graph"))
    assert (row.left_by(auto), row.left_by(named)) == (UNPROVED, "")
    assert replace(row, proved=True).left_by(auto) == ""


def test_doctor_names_each_backend_once() -> None:
    named = Counter(name for row in builders.REBUILT for name in row.backends)
    assert named["FLASH_ATTN_MLA (XPU)"] and set(named.values()) == {1}
