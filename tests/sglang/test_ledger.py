"""The ledger names every attribute of the real sglang that an installation replaces, and no other."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import pytest

from nsa_plugin.adapters.sglang import ledger, releases
from nsa_plugin.adapters.sglang.adapter import SglangAdapter
from nsa_plugin.adapters.sglang.dense import ROWS as DENSE
from nsa_plugin.adapters.sglang.recorded import ROWS as RECORDED
from tests.sglang.conftest import Install


def attributes() -> dict[str, object]:
    """Every attribute of every module of sglang that is imported, and of every class in it, by dotted path."""
    return dict(_attributes())


def _attributes() -> Iterator[tuple[str, object]]:
    for module_name, module in tuple(sys.modules.items()):
        if not module_name.startswith("sglang.") or not isinstance(module, types.ModuleType):
            continue
        for name, value in tuple(vars(module).items()):
            yield f"{module_name}.{name}", value
            if isinstance(value, type) and value.__module__ == module_name:
                for inner, attribute in tuple(vars(value).items()):
                    yield f"{module_name}.{name}.{inner}", attribute


def test_it_has_a_row_for_every_attribute_that_changes_and_no_other(install: Install) -> None:
    _, adapter = install("auto")  # whatever an installation imports is there from now on
    adapter.undo()
    before, missing = attributes(), object()
    _, adapter = install("auto")
    after = attributes()
    changed = {
        path for path in before.keys() | after.keys() if before.get(path, missing) is not after.get(path, missing)
    }
    assert changed == {row.target for row in adapter.ledger()}
    assert len(adapter.ledger()) == len(changed) >= 5
    adapter.undo()
    assert attributes() == before


def test_every_row_says_why_and_when_it_goes() -> None:
    for row in SglangAdapter().ledger():
        assert row.why.endswith(".") and all((row.upstream, row.gone_when, row.runs)), row


@pytest.mark.parametrize("generation", releases.GENERATIONS, ids=lambda generation: generation.prefix)
def test_each_generation_has_rows_of_its_own_names(
    monkeypatch: pytest.MonkeyPatch, generation: releases.Generation
) -> None:
    monkeypatch.setattr(ledger, "generation", lambda: generation)
    others = (releases.GLUE_GRAPH, *(row.backend for row in (*DENSE, *RECORDED)))
    targets = {row.target for row in ledger.rows() if not row.target.startswith(others)}
    assert targets == {
        *(f"{generation.multi_step}.{entry.method}" for entry in generation.draft_entries),
        *(f"{generation.backend}.{entry.method}" for entry in generation.single_entries),
        f"{generation.multi_step}.init_cuda_graph_state",
        f"{generation.multi_step}.__init__",
    }
