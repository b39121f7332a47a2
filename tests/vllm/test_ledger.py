"""The ledger names every attribute of the real vLLM that an installation replaces, and no other."""

from __future__ import annotations

import dataclasses
import pkgutil
import sys
from typing import Any

import pytest

from nsa_plugin.adapters.vllm import ledger, releases
from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.adapters.vllm.v1 import proposer as v1_proposer
from nsa_plugin.adapters.vllm.v2 import choice as v2_choice
from nsa_plugin.adapters.vllm.v2 import unfused as v2_unfused
from nsa_plugin.host import Host
from nsa_plugin.settings import Settings

PARTS = (
    *ledger.v2_essential(), *ledger.v2_more(), *ledger.v2_target(), ledger.v2_not_fused(), ledger.v1_proposals(),
)  # fmt: skip
ABSENT = object()


def attributes() -> dict[str, Any]:
    """Every attribute of every module of vLLM that is imported, and of every class in them, by dotted path."""
    found: dict[str, Any] = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "vllm":
            continue
        for key, value in list(vars(module).items()):
            found[f"{name}.{key}"] = value
            if isinstance(value, type) and value.__module__ == name:
                found |= {f"{name}.{value.__qualname__}.{own}": attribute for own, attribute in vars(value).items()}
    return found


def replaced(before: dict[str, Any]) -> set[str]:
    """What is another object than before, or was not there, or is there no more."""
    now = attributes()
    return {path for path in before.keys() | now.keys() if now.get(path, ABSENT) is not before.get(path, ABSENT)}


@pytest.fixture
def before() -> dict[str, Any]:
    """Every attribute, with everything imported that is ever patched."""
    for part in PARTS:
        try:
            pkgutil.resolve_name(part.owner)
        except (ImportError, AttributeError):  # not in this release, or not on this machine
            assert not part.essential
    return attributes()


@pytest.mark.parametrize("strategy", ["auto", "copy"])
def test_what_is_replaced_is_in_the_ledger_and_an_undo_puts_it_back(before: dict[str, Any], strategy: str) -> None:
    adapter = VllmAdapter()
    could = {row.target for row in adapter.ledger()}
    assert adapter.install(Host(Settings(strategy=strategy))) == []
    try:
        rows = adapter.ledger()
        changed = replaced(before)
    finally:
        adapter.undo()
    targets = [row.target for row in rows]
    assert changed == set(targets) and len(targets) == len(changed)
    assert {f"{releases.V1_PROPOSER}.{v1_proposer.UPDATE}", f"{releases.speculator()}.{v2_unfused.LOOP}"} < changed
    assert changed == could if strategy == "auto" else changed < could
    assert not replaced(before)
    assert {row.target for row in adapter.ledger()} == could


def test_every_row_says_why_and_until_when() -> None:
    for part in PARTS:
        for row in part.rows:
            assert row.target.rpartition(".")[0] == part.owner
            assert all(len(text) > len("at start") for text in dataclasses.astuple(row)), row


def test_what_is_made_and_is_not_in_the_ledger_is_not_patched(
    before: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = v2_choice.hooks
    monkeypatch.setattr(
        v2_choice, "hooks", lambda *arguments: {**hooks(*arguments), "propose": lambda speculator: None}
    )
    adapter = VllmAdapter()
    (problem,) = adapter.install(Host())
    assert "the ledger is wrong" in problem and "propose" in problem
    assert not replaced(before)
