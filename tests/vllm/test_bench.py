"""`nsa-plugin bench --engine vllm` on the real vLLM: every contender is there, checked, and a wrong value is found."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_plugin.adapters.vllm.v2 import step as v2_step
from nsa_plugin.cli import main
from nsa_plugin.core import reference
from nsa_plugin.core.metadata import PrecomputedMetadata
from nsa_plugin.trace import Round, save

CELL = ["bench", "--engine", "vllm", "--bs", "3", "--ctx", "400", "--steps", "3", "--width", "512", "--seed", "7"]
CHECKED = ["vllm shipped", "metadata kept", "vllm in place", "graph"]


def measured(path: Path, *more: str, status: int = 0) -> Any:
    """The results of a run."""
    assert main([*CELL, *more, "--json", str(path)]) == status
    return json.loads(path.read_text())


def test_every_contender_is_checked_and_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = measured(tmp_path / "b.json")
    assert results["engine"] == "vllm" and results["versions"]["vllm"] and results["machine"] == "CPU"
    (cell,) = results["cells"]
    assert [cell[key] for key in ("mode", "batch_size", "context", "steps", "width")] == ["decode", 3, 400, 3, 512]
    rows = cell["contenders"]
    assert list(rows) == [*CHECKED, "no metadata"]
    assert [rows[name]["differs"] for name in rows] == [[], [], [], [], None]
    assert all(row["host_us"] > 0 and row["gpu_us"] is None for row in rows.values())
    assert cell["bytes"] == 2 * (32 * 3 + 8 * 2) and cell["floor_us"] == cell["bytes"] / results["copy_bytes_per_us"]
    assert "the times say nothing about a GPU" in " ".join(capsys.readouterr().out.split())


def test_one_wrong_value_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init, run = v2_step.Step.__init__, v2_step.Step.run
    slots: dict[v2_step.Step, torch.Tensor] = {}

    def remember(step: v2_step.Step, speculator: Any, *rest: Any) -> None:
        init(step, speculator, *rest)
        slots[step] = speculator.block_tables.slot_mappings

    def wrong(step: v2_step.Step) -> None:
        run(step)
        slots[step][0, 1] += 1

    monkeypatch.setattr(v2_step.Step, "__init__", remember)
    monkeypatch.setattr(v2_step.Step, "run", wrong)
    (cell,) = measured(tmp_path / "b.json", status=1)["cells"]
    found = ["context slots", "indexer slots", "slots"]
    differs = [cell["contenders"][name]["differs"] for name in CHECKED]
    assert differs == [[], found, [], found]


def test_a_step_that_is_left_to_vllm_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody has patched what the plugin would leave out: "graph" would be vLLM's own update."""
    from vllm.v1.worker.gpu.block_table import BlockTables

    right = BlockTables.compute_slot_mappings

    @functools.wraps(right)
    def theirs(*args: Any, **kwargs: Any) -> Any:
        return right(*args, **kwargs)

    monkeypatch.setattr(BlockTables, "compute_slot_mappings", theirs)
    assert main([*CELL, "--json", str(tmp_path / "b.json")]) == 2
    assert "the one kernel could not be had" in capsys.readouterr().err


def test_a_rebuild_that_is_not_the_reference_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.precompute

    def wrong(batch: Any, out: PrecomputedMetadata, *rest: Any) -> None:
        right(batch, out, *rest)
        positions = out.steps[1].positions
        assert positions is not None
        positions[1] += 1

    monkeypatch.setattr(reference, "precompute", wrong)
    (cell,) = measured(tmp_path / "b.json")["cells"]
    assert [cell["contenders"][name]["differs"] for name in CHECKED] == [["positions"], [], [], []]


def test_a_recorded_trace_gives_the_inputs(tmp_path: Path) -> None:
    rounds = [
        Round((70, 100 + number), (2, 0), 1, "draft decode", {2: (0, (9, 4)), 0: (0, (3, 8))}) for number in range(3)
    ]
    save(tmp_path / "trace.jsonl", rounds)
    (cell,) = measured(tmp_path / "b.json", "--trace", str(tmp_path / "trace.jsonl"))["cells"]
    assert (cell["batch_size"], cell["context"]) == (2, 102)
    assert [cell["contenders"][name]["differs"] for name in CHECKED] == [[], [], [], []]
