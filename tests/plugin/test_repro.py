"""Repro files: what is in them, what is not, and what `nsa-plugin verify` says about them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings

from nsa_plugin import BatchDescriptor, BlockTable, ForwardMode, Geometry, TokenTable, precompute, repro
from nsa_plugin.adapters.reporting import Mismatch
from nsa_plugin.cli import main
from nsa_plugin.core import api
from nsa_plugin.core.draft_steps import DraftLimits, PastEnd
from nsa_plugin.core.errors import InvalidValueError, UnavailableError
from nsa_plugin.core.metadata import VECTORS, live_entries
from nsa_plugin.settings import Settings
from tests.batches import Case, interpreted


def mismatch(batch: BatchDescriptor, geometry: Geometry, field: str = "cu_seqlens_k", engine: int = 0) -> Mismatch:
    """The last step, right but for the first entry of a field: of ours, or with `engine` of the engine's."""
    made = precompute(batch, geometry, impl="reference")
    step = len(made.steps) - 1
    expected, got = (live_entries(made, made.step(step), step) for _ in range(2))
    wrong = got if not engine else expected
    wrong[field] = wrong[field].clone()
    wrong[field][(0,) * wrong[field].dim()] += 1
    return Mismatch("toy", "draft decode", "share", batch, geometry, ((step, expected, got),))


BATCH = BatchDescriptor(
    ForwardMode.DECODE, 3, torch.tensor([70, 3, 600]),
    TokenTable(torch.arange(5 * 1024, dtype=torch.int32).view(5, 1024), torch.tensor([4, 1, 2])), 3, (1, 2, 3),
)  # fmt: skip
GEOMETRY = Geometry(256, 64, 1024, num_sms=2)


@settings(max_examples=20)
@given(interpreted(min_batch_size=1))
def test_any_batch_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, case: Case) -> None:
    path = repro.write(tmp_path_factory.mktemp("repro"), mismatch(case.batch, case.geometry), Settings())
    recorded = repro.load(path)
    step = len(case.batch.offsets) - 1
    for impl in ("reference", "triton"):
        assert repro.recompute(recorded, impl) == {"engine": [], "plugin": [f"step {step}: cu_seqlens_k"]}


@pytest.mark.parametrize("field", ["real_page_table", "page_table_1", "nsa_cache_seqlens"])
def test_verify_exits_1_if_the_engines_values_differ_here_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str
) -> None:
    path = repro.write(tmp_path, mismatch(BATCH, GEOMETRY, field, engine=1), Settings())
    assert main(["verify", str(path)]) == 1
    out = capsys.readouterr().out
    assert "The difference shows here too." in out and field in "".join(out.split())
    path.unlink()
    assert main(["verify", str(repro.write(tmp_path, mismatch(BATCH, GEOMETRY, field), Settings()))]) == 0


def test_only_the_rows_and_columns_that_count_are_stored(tmp_path: Path) -> None:
    path = repro.write(tmp_path, mismatch(BATCH, GEOMETRY), Settings())
    with numpy.load(path) as stored:
        assert stored["table"].shape == (3, 640) and set(stored["requests"]) == {0, 1, 2}
        assert not any("page_table" in name for name in stored.files)  # they were equal
        assert set(stored.files) - {"json"} == {"seq_lens", "table", "requests"} | {
            f"{side}/2/{name}" for side in ("expected", "got") for name in VECTORS
        }


def test_what_is_too_large_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repro, "LIMIT_BYTES", 9000)
    recorded = repro.load(repro.write(tmp_path, mismatch(BATCH, GEOMETRY, "page_table_1"), Settings()))
    assert "got/2/page_table_1" in recorded.facts["left_out"] and (2, "page_table_1") not in recorded.got
    monkeypatch.setattr(repro, "LIMIT_BYTES", 100)
    with pytest.raises(UnavailableError, match="would be too large"):
        repro.write(tmp_path, mismatch(BATCH, GEOMETRY), Settings())


def test_a_block_table_is_stored_in_blocks(tmp_path: Path) -> None:
    slots = BlockTable(torch.arange(3 * 16, dtype=torch.int32).view(3, 16), 64)
    batch = dataclasses.replace(BATCH, slots=slots)
    recorded = repro.load(repro.write(tmp_path, mismatch(batch, GEOMETRY), Settings()))
    assert isinstance(recorded.batch.slots, BlockTable) and recorded.batch.slots.block_table.shape == (3, 10)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    ("past_end", "lengths", "slots"),
    [(PastEnd.CLAMP, [127, 128, 128], [127, 127]), (PastEnd.PAD, [127, 128, 1], [127, -1])],
)
def test_a_draft_that_moves_on_is_computed_as_its_engine_moves(
    tmp_path: Path, impl: api.Impl, past_end: PastEnd, lengths: list[int], slots: list[int]
) -> None:
    """Of the fields by the engine's own names, those that follow from lengths and block table."""
    table = BlockTable(torch.tensor([[0, 1], [2, 3]], dtype=torch.int32), 64)
    batch = BatchDescriptor(ForwardMode.DECODE, 2, torch.tensor([126, 63], dtype=torch.int32), table, 3, (1, 2, 3))
    right = {
        "X.seq_lens": torch.tensor([lengths[2], 66], dtype=torch.int32),
        "slot_mapping": torch.tensor([slots[1], 3 * 64 + 1]),
        "X.decode.decode_lens": torch.tensor([1, 1], dtype=torch.int32),
        "X.block_table": torch.tensor([[0, 1], [2, 3]] if lengths[2] > 64 else [[0, -1], [2, 3]], dtype=torch.int32),
        "X.schedule_metadata": torch.tensor([5]),
    }
    wrong = {name: value + 1 for name, value in right.items()}
    found = Mismatch(
        "vllm",
        "draft step",
        "copy",
        batch,
        Geometry(64, 64, 128, num_sms=2),
        ((2, right, wrong),),
        DraftLimits(128, past_end),
    )
    recorded = repro.load(repro.write(tmp_path, found, Settings()))
    assert recorded.limits == DraftLimits(128, past_end)
    known = sorted(f"step 2: {name}" for name in right if "schedule" not in name)
    assert repro.recompute(recorded, impl) == {"engine": [], "plugin": known}


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04"])
def test_another_file_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    path = tmp_path / "other.npz"
    path.write_bytes(content)
    with pytest.raises(InvalidValueError, match="expected a repro file of nsa-plugin"):
        repro.load(path)
    assert main(["verify", str(path)]) == 2
    assert main(["verify", str(tmp_path / "absent.npz")]) == 2
    assert "absent.npz" in capsys.readouterr().err
    numpy.savez(path.open("wb"), json='{"mode": "decode"}')
    with pytest.raises(InvalidValueError, match="KeyError"):
        repro.load(path)
