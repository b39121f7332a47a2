"""What a release lacks for dense backends: a part is taken as a whole, or left to sglang by the name of what is missing."""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest

from nsa_plugin.adapters.sglang.adapter import DENSE_ROWS
from nsa_plugin.adapters.sglang.releases import PARTS, lacking
from nsa_plugin.rigs.sglang.dense import stand_ins
from nsa_plugin.rigs.sglang.flash_attention import DraftExtend, Sizes
from nsa_plugin.testing.engine import without
from tests.sglang.batches import record
from tests.sglang.conftest import Install


@pytest.fixture(autouse=True)
def _running() -> Iterator[None]:
    with stand_ins():
        if problem := next((problem for row in DENSE_ROWS if (problem := lacking(row.part))), ""):
            pytest.skip(problem)
        yield


NEEDS = {need.path: need for row in DENSE_ROWS for need in PARTS[row.part]}
INHERITED = ("draft_extend_metadata_captured_in_graph",)
"""What sglang's base class has, too."""


def methods() -> dict[str, Any]:
    """Every attribute of the dense classes, by target."""
    kinds = dict.fromkeys(row.backend for row in DENSE_ROWS)
    return {f"{kind}.{name}": value for kind in kinds for name, value in vars(pkgutil.resolve_name(kind)).items()}


def test_a_part_that_lacks_something_is_left_to_sglang_as_a_whole(install: Install) -> None:
    removable = [path for path in NEEDS if not path.endswith(INHERITED)]
    assert len(removable) > 20
    for path in removable:
        with without(path):
            _is_left_to_sglang_as_a_whole(install, path)


def _is_left_to_sglang_as_a_whole(install: Install, missing: str) -> None:
    before = methods()
    host, adapter = install("graph")
    after = methods()
    plans = {plan.path: plan for plan in adapter.paths(host)}
    left = {row.path for row in DENSE_ROWS if plans[row.path].strategy == "off"}
    assert left == {row.path for row in DENSE_ROWS if missing in {need.path for need in PARTS[row.part]}}
    assert all(f"looked for {missing}" in plans[path].why for path in left)
    kinds = {row.backend for row in DENSE_ROWS if row.path not in left}
    changed = {target for target in after if after[target] is not before.get(target)}
    assert {target.rpartition(".")[0] for target in changed} == kinds
    assert changed == {row.target for row in adapter.ledger() if row.target.rpartition(".")[0] in kinds}
    adapter.undo()
    assert methods() == before


def test_a_backend_that_can_not_be_asked_is_left_to_sglang(
    install: Install, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sglang.srt.plugins.nsa_plugin")
    host, _ = install("graph")
    made = DraftExtend(Sizes())
    static = made.static(4)
    made.backend.init_forward_metadata_out_graph(static, in_capture=True)
    del made.backend.fa_impl_ver
    record(made.backend, static, monkeypatch)
    assert "strategy off (not covered: a backend that could not be asked (AttributeError" in caplog.text
    assert not host.fallbacks
