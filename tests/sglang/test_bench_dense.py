"""The benchmark times sglang's dense backends, and checks what it times; on a CPU graphs are emulated."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from nsa_plugin.adapters.sglang import dense as rows
from nsa_plugin.adapters.sglang import hooked, recorded, releases
from nsa_plugin.bench import sglang_dense
from nsa_plugin.bench.cell import Cell
from nsa_plugin.bench.run import MODES
from nsa_plugin.bench.sglang_dense import SglangDense
from nsa_plugin.cli import main
from nsa_plugin.core import reference
from nsa_plugin.core.errors import InvalidValueError, UnavailableError
from nsa_plugin.rigs.sglang import dense
from nsa_plugin.rigs.sglang.dense import Name

SIZES = ["--bs", "2", "--ctx", "200", "--steps", "3", "--width", "320"]
ALL = ["--mode", "decode", "verify", "extend"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _lacks_nothing() -> Iterator[None]:
    with dense.stand_ins():
        problems = [releases.lacking(row.part) for row in (*rows.ROWS, *recorded.ROWS)]
        if problem := next(filter(None, problems), ""):
            pytest.skip(problem)
    yield


@pytest.fixture
def _emulated_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is launched within a capture is launched at each replay."""

    def capture(work: Callable[[], object]) -> Any:
        with mock.patch.object(hooked, "capturing", lambda: True):
            work()
        return SimpleNamespace(replay=work)

    monkeypatch.setattr(sglang_dense, "capture", capture)
    monkeypatch.setattr(sglang_dense, "has_graphs", lambda: True)


def cell(mode: str, page_size: int = 64, steps: int = 3, context: int = 200) -> Cell:
    return Cell(MODES[mode], 2, context, steps, 320, 5, page_size=page_size)


@pytest.mark.parametrize(("backend", "page_size"), [("fa3", 1), ("flashmla", 64)])
def test_on_a_cpu_it_compares_what_runs_before_a_replay(
    backend: str, page_size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "b.json"
    assert main(["bench", "--engine", "sglang", "--backend", backend, *ALL, *SIZES, "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    assert (results["backend"], results["page_size"]) == (backend, page_size)
    assert results.get("schedule") == ("stand-in" if backend == "flashmla" else None)
    assert f"{backend}, page size {page_size}" in " ".join(capsys.readouterr().out.split())
    wrong = {one["mode"]: {name: row["differs"] for name, row in one["contenders"].items()} for one in results["cells"]}
    both: dict[str, list[str]] = {"sglang shipped": [], "share": []}
    extend = {"sglang shipped": []} if backend == "fa3" else both  # no strategy but graph serves it
    assert wrong == {"decode": both, "target_verify": both, "draft_extend": extend}


@pytest.mark.usefixtures("_emulated_graphs")
@pytest.mark.parametrize(
    ("backend", "mode", "page_size"),
    [
        ("fa3", "decode", 1), ("fa3", "decode", 128), ("fa3", "verify", 64), ("fa3", "extend", 1), ("flashmla", "decode", 64),
        ("flashmla", "extend", 64),
    ],
)  # fmt: skip
def test_a_graph_gives_sglangs_values(backend: Name, mode: str, page_size: int) -> None:
    subject, names = SglangDense(cell(mode, page_size), CPU, backend), []
    for contender in subject.contenders:
        names.append(contender.name)
        assert subject.check(contender) == []
        assert contender.host is not None
        for call in (*contender.host, *contender.gpu):
            call()
    assert names == ["sglang shipped", *(() if (backend, mode) == ("fa3", "extend") else ("share",)), "graph"]
    assert subject.bytes > 0
    subject.close()


@pytest.mark.usefixtures("_emulated_graphs")
@pytest.mark.parametrize("right", [True, False])
def test_words_that_flashmla_does_not_write_are_not_compared(right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its compiled schedule leaves the last words of a row as they were; `torch.empty` fills them in deterministic mode."""
    what_memory_held, flash_mla = itertools.count(1000), dense.flash_mla

    def compiled(*arguments: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tiles, splits = flash_mla(*arguments, **named)
        expected = torch.get_deterministic_debug_mode() > 0
        tiles[:, 5:] = torch.iinfo(torch.int32).max if expected else next(what_memory_held)
        tiles[0, 0] += not (right or expected)
        return tiles, splits

    monkeypatch.setattr(dense, "flash_mla", compiled)
    subject = SglangDense(cell("verify"), CPU, "flashmla")
    found = {contender.name: subject.check(contender) for contender in subject.contenders}
    subject.close()
    wrong = [] if right else ["flashmla_metadata"]
    assert found == {"sglang shipped": [], "share": wrong, "graph": wrong}


@pytest.mark.usefixtures("_emulated_graphs")
def test_what_sglang_records_itself_is_computed_twice_as_shipped_and_once_with_the_plugin() -> None:
    subject, computed = SglangDense(cell("extend", 1), CPU, "fa3"), {}
    for contender in subject.contenders:
        subject.check(contender)
        assert contender.host is not None
        tables = [metadata.page_table for metadata in subject._newest._metadata]
        for table in tables:
            table.fill_(-7)
        contender.host[0]()
        before = any(bool((table != -7).any()) for table in tables)
        contender.gpu[0]()
        computed[contender.name] = before, all(bool((table != -7).any()) for table in tables)
    subject.close()
    assert computed == {"sglang shipped": (True, True), "graph": (False, True)}


@pytest.mark.usefixtures("_emulated_graphs")
@pytest.mark.parametrize("planted", ["page", "fallback"])
def test_a_wrong_value_and_a_path_that_fell_back_are_found(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = SglangDense(cell("verify"), CPU, "fa3")
    contenders = iter(subject.contenders)
    assert subject.check(next(contenders)) == []
    right = reference.precompute

    def wrong(batch: Any, out: Any, *rest: Any) -> None:
        if planted == "fallback":
            raise RuntimeError("planted")
        right(batch, out, *rest)
        out.steps[0].real_page_table[0, 0] += 1

    monkeypatch.setattr(reference, "precompute", wrong)
    if planted == "page":
        assert subject.check(next(contenders)) == ["table"]
    else:
        with pytest.raises(UnavailableError, match="strategy share could not be had"):
            next(contenders)
    subject.close()


def test_the_floor_counts_a_slot_and_a_page_number_for_each_live_page() -> None:
    for mode, more in (("decode", 2), ("verify", 3), ("extend", 0)):
        subject = SglangDense(cell(mode), CPU, "fa3")
        pages = sum(-(-(length + more) // 64) for lens in subject._lens for length in lens.tolist())
        assert subject.bytes == 8 * pages / len(subject._lens)
        subject.close()


def test_sequences_without_room_for_draft_tokens_are_refused() -> None:
    with pytest.raises(InvalidValueError, match="--ctx: expected sequences with room for 64 draft tokens among 312"):
        SglangDense(cell("decode", steps=64, context=256), CPU, "fa3")


def test_a_compiled_schedule_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sys.modules.get(dense.INTERFACE)
    with dense.stand_ins():
        module: Any = importlib.import_module(dense.FLASHMLA)
        real = module.get_mla_metadata = object()
        for compiled in (False, True):
            monkeypatch.setattr(dense, "has_compiled_schedule", lambda compiled=compiled: compiled)
            with dense.stand_ins():
                assert (module.get_mla_metadata is real) is compiled
    assert dense.FLASHMLA not in sys.modules and sys.modules.get(dense.INTERFACE) is before


def test_every_kernel_that_is_imported_has_a_stand_in() -> None:
    if importlib.util.find_spec("sgl_kernel") is not None:
        pytest.skip("the compiled kernels are installed")
    with dense.stand_ins():
        kernels: Any = importlib.import_module("sgl_kernel.quantization.deep")
        assert kernels.any_kernel and importlib.import_module("sgl_kernel").int8_scaled_mm
        with dense.stand_ins():
            assert importlib.import_module("sgl_kernel.quantization.deep") is kernels
        assert sys.modules["sgl_kernel.quantization.deep"] is kernels
    assert not [name for name in sys.modules if name.startswith("sgl_kernel.quantization")]
    assert importlib.util.find_spec("sgl_kernel") is None
