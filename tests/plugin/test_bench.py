"""The benchmark runs anywhere and checks what it times."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.tables import bench as markdown
from nsa_plugin import ForwardMode, TokenTable, UnavailableError
from nsa_plugin.bench import run
from nsa_plugin.bench.cell import Cell, recorded_cells
from nsa_plugin.bench.measure import GpuTime, Spread, by_kernel
from nsa_plugin.bench.report import terminal
from nsa_plugin.bench.results import load as load_results
from nsa_plugin.bench.results import save as save_results
from nsa_plugin.cli import main
from nsa_plugin.core import kernels, reference
from nsa_plugin.core.errors import InvalidValueError
from nsa_plugin.core.metadata import PrecomputedMetadata
from nsa_plugin.rigs.sglang import original_loop
from nsa_plugin.trace import Round, load, save

SMALL = [
    "bench",
    "--bs",
    "1",
    "3",
    "--ctx",
    "200",
    "--steps",
    "2",
    "4",
    "--width",
    "512",
    "--mode",
    "decode",
    "verify",
    "extend",
]

ONE_CELL = ["bench", "--bs", "1", "--ctx", "200", "--steps", "2", "--width", "512"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> Path:
        raise UnavailableError("no network in this test")

    monkeypatch.setattr(original_loop, "fetch_wheel", refuse)


def test_it_writes_results_and_a_plot_and_says_that_a_cpu_is_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    data, picture = tmp_path / "b.json", tmp_path / "b.png"
    assert main([*SMALL, "--json", str(data), "--plot", str(picture)]) == 0
    results = json.loads(data.read_text())
    drawn_later = tmp_path / "later.svg"
    assert main(["plot", str(data), str(drawn_later)]) == 0 and "<svg" in drawn_later.read_text()
    assert len(results["cells"]) == 12 and picture.read_bytes().startswith(b"\x89PNG")
    for cell in results["cells"]:
        assert {"copy", "share"} <= cell["contenders"].keys()
        assert all(row["differs"] == [] for row in cell["contenders"].values())
    out = capsys.readouterr().out
    assert "without the original loop" in out
    if not torch.cuda.is_available():
        assert "the times say nothing about a GPU" in " ".join(out.split())


def test_the_same_inputs_for_every_number_of_steps(tmp_path: Path) -> None:
    data = tmp_path / "b.json"
    assert main([*SMALL, "--seed", "5", "--json", str(data)]) == 0
    cells = json.loads(data.read_text())["cells"]
    decode = {(cell["batch_size"], cell["steps"]): cell["bytes"] for cell in cells if cell["mode"] == "decode"}
    assert decode[1, 2] == decode[1, 4] and decode[3, 2] == decode[3, 4]


@pytest.mark.skipif(torch.cuda.is_available(), reason="plants the error in the reference, which a GPU does not use")
def test_a_wrong_value_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right, calls = reference.precompute, []

    def wrong(batch: Any, out: PrecomputedMetadata, *rest: Any) -> None:
        right(batch, out, *rest)
        calls.append(1)
        if len(calls) % 2:  # the contender, then the value that it is compared with
            out.steps[0].nsa_cu_seqlens_k[1] += 1

    monkeypatch.setattr(reference, "precompute", wrong)
    assert main(["bench", "--bs", "2", "--ctx", "100", "--steps", "2", "--width", "256"]) == 1


@pytest.mark.parametrize(
    ("engine", "commands"), [("sglang", ("bench", "demo")), ("vllm", ("bench",))], ids=["sglang", "vllm"]
)
def test_an_engine_that_is_not_there_is_named(
    engine: str, commands: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, engine, None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for command in commands:
        assert main([command, "--engine", engine]) == 2
        out = capsys.readouterr().err
        assert f"--engine {engine} needs {engine} installed" in out and f"pip install 'nsa-plugin[{engine}]'" in out


def test_a_table_without_room_for_draft_tokens_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--width", "64"]) == 2
    assert "--width: expected more than 64 columns" in capsys.readouterr().err


def test_vllm_has_one_mode(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--engine", "vllm", "--mode", "decode", "verify"]) == 2
    assert "--mode: expected decode with --engine vllm, got decode verify" in capsys.readouterr().err


def test_cells_that_were_measured_are_kept_when_a_later_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "b.json"
    run_cell, cells = run._run_cell, []

    def second_fails(cell: Any, *rest: Any) -> Any:
        cells.append(cell)
        if len(cells) == 2:
            raise UnavailableError("planted")
        return run_cell(cell, *rest)

    monkeypatch.setattr(run, "_run_cell", second_fails)
    assert main([*ONE_CELL, "--mode", "decode", "verify", "--json", str(data)]) == 2
    kept = json.loads(data.read_text())
    assert [cell["mode"] for cell in kept["cells"]] == ["decode"] and kept["complete"] is False


def test_ctrl_c_keeps_what_was_measured_and_says_that_it_is_not_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    data, picture = tmp_path / "b.json", tmp_path / "b.svg"
    run_cell, cells = run._run_cell, []

    def second_is_interrupted(cell: Any, *rest: Any) -> Any:
        cells.append(cell)
        if len(cells) == 2:
            raise KeyboardInterrupt
        return run_cell(cell, *rest)

    monkeypatch.setattr(run, "_run_cell", second_is_interrupted)
    both = ["--json", str(data), "--plot", str(picture)]
    assert main([*ONE_CELL, "--mode", "decode", "verify", *both]) == 130
    kept = json.loads(data.read_text())
    assert len(kept["cells"]) == 1 and kept["complete"] is False and kept["planned_cells"] == 2
    said = capsys.readouterr()
    assert "incomplete: 1 of 2 cells" in " ".join(said.out.split()) and "interrupted" in said.err
    assert "incomplete: 1 of 2 cells" in picture.read_text() or "<svg" in picture.read_text()
    assert load_results(data) == kept


@pytest.mark.parametrize("option", ["--json", "--plot"])
@pytest.mark.parametrize("name", ["absent/b.png", ".", "b.xyz", "b"])
def test_what_cant_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, name: str
) -> None:
    pytest.importorskip("matplotlib")
    if option == "--json" and name.startswith("b"):
        pytest.skip("any file may hold JSON")
    monkeypatch.setattr(run, "_run_cell", lambda *rest: pytest.fail("measured"))
    assert main([*ONE_CELL, option, str(tmp_path / name)]) == 2
    said = capsys.readouterr()
    assert str(tmp_path) in said.err and "expected" in said.err and not said.out


@pytest.mark.parametrize(("context", "width"), [("449", "512"), ("1000000", "512")])
def test_a_context_beyond_the_width_is_refused(context: str, width: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--ctx", context, "--width", width]) == 2
    said = capsys.readouterr().err
    assert "--ctx: expected sequences of at most 448 tokens" in said and f"--width {int(context) + 64}" in said


def test_tables_that_exceed_the_memory_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--bs", "1048576", "--ctx", "9", "--width", "1048576"]) == 2
    assert "--bs and --width: expected tables that fit into" in capsys.readouterr().err


def test_a_recorded_trace_gives_the_inputs(tmp_path: Path) -> None:
    trace, data = tmp_path / "trace.jsonl", tmp_path / "b.json"
    save(
        trace,
        [
            Round((70, 1), (2, 0), 1, "draft decode", {2: (0, (9, 4))}),
            Round((71, 65), (2, 1), 2, "draft decode", {1: (0, (7, 8))}),
            Round((90,), (1,), 1, "draft decode", {1: (1, (30,))}),
            Round((73, 66), (2, 1), 2, "target verify", {2: (0, (9, 4)), 1: (0, (7, 30))}),
        ],
    )
    assert main([*ONE_CELL, "--trace", str(trace), "--mode", "decode", "verify", "--json", str(data)]) == 0
    cells = json.loads(data.read_text())["cells"]
    assert [(cell["mode"], cell["batch_size"], cell["context"]) for cell in cells] == [
        ("decode", 1, 90), ("decode", 2, 71), ("target_verify", 2, 73),
    ]  # fmt: skip
    recorded = recorded_cells(ForwardMode.DECODE, load(trace), [2], 512)
    table = recorded[1].batches(torch.device("cpu"))[-1].slots
    assert isinstance(table, TokenTable)
    assert (table.lookup(8, 128, 64)[-2:] // 64).tolist() == [[9, 4], [7, 8]]
    assert main([*ONE_CELL, "--trace", str(trace), "--mode", "extend"]) == 2


@pytest.mark.parametrize("more", [[], ["--engine", "sglang", "--trace", "some.jsonl"]], ids=str)
def test_pooled_index_keys_are_sglangs_and_of_random_inputs(
    more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ONE_CELL, "--index-kpool", "4", *more]) != 0
    assert "--index-kpool: expected 1 without --engine sglang, with --trace, " in capsys.readouterr().err


def test_slots_of_a_cell_are_those_of_whole_pages_of_pools() -> None:
    cell = Cell(ForwardMode.DRAFT_EXTEND, 2, 300, 4, 500, seed=1, index_kpool=4)
    for batch in cell.batches(torch.device("cpu")):
        assert isinstance(batch.slots, TokenTable) and batch.accepted is not None
        table = batch.slots.req_to_token
        assert table.shape == (10, 500) and bool((table[:, ::256] % 256 == 0).all())
        assert bool((table[:, 1:256] == table[:, :1] + torch.arange(1, 256)).all())
        assert bool((batch.seq_lens >= 4).all()) and 1 <= int(batch.accepted.min()) <= int(batch.accepted.max()) <= 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--backend", "fa3"], "--backend: expected dsa without --engine sglang, and with --trace, got fa3"),
        (
            ["--backend", "flashmla", "--engine", "sglang", "--trace", "some.jsonl"],
            "--backend: expected dsa without --engine sglang, and with --trace, got flashmla",
        ),
        (
            ["--backend", "flashmla", "--engine", "sglang", "--page-size", "1"],
            "--page-size: expected 64 with --backend flashmla, got 1",
        ),
        (["--page-size", "1"], "--page-size: expected 64 with --backend dsa, got 1"),
        (
            ["--backend", "fa3", "--engine", "sglang", "--page-size", "48"],
            "--page-size: expected 1 or 16 or 32 or 64 or 128 with --backend fa3, got 48",
        ),
        (["--backend", "fa3", "--engine", "sglang", "--index-kpool", "2"], "--index-kpool: expected 1 "),
    ],
)
def test_a_dense_backend_is_sglangs_with_its_own_pages(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ONE_CELL, *options]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_kernels_are_kept_by_name_and_this_packages_own_are_its_launch() -> None:
    times = [
        ("metadata_kernel", 6.0),
        ("void at::native::copy_kernel<1>", 2.0),
        ("metadata_kernel", 4.0),
        ("x" * 500, 1),
    ]
    events = [SimpleNamespace(name=name, device_time=time) for name, time in times]
    found = by_kernel(events, calls=2)
    assert found == {"metadata_kernel": 5.0, "void at::native::copy_kernel<1>": 1.0, "x" * 120: 0.5}
    gpu = GpuTime(Spread(6.5, 6.5, 6.5), 2, found)
    assert run._by_kernel("graph", gpu) == {"launch_us": 5.0, "gpu_us_by_kernel": found}
    assert run._by_kernel("sglang shipped", gpu) == {"gpu_us_by_kernel": found}
    assert run._by_kernel("graph", GpuTime(gpu.spread, 1, {"sglangs": 1.0})) == {"gpu_us_by_kernel": {"sglangs": 1.0}}
    assert run._by_kernel("graph", None) == {}
    many = {f"kernel {number}": 40.0 - number for number in range(30)} | {"copy_kernel": 0.1}
    kept = run._by_kernel("copy", GpuTime(gpu.spread, 31, many))
    assert kept["launch_us"] == 0.1 and list(kept["gpu_us_by_kernel"]) == [f"kernel {number}" for number in range(12)]


def test_launches_are_this_packages_kernels() -> None:
    folder = Path(str(kernels.__file__)).parent
    sources = "".join(path.read_text() for path in folder.glob("*.py"))
    assert all(f"\ndef {name}(" in sources for name in run.LAUNCHES)


def test_a_launch_is_shown_against_what_it_may_take(tmp_path: Path) -> None:
    file = tmp_path / "b.json"
    assert main([*ONE_CELL, "--ctx", "440", "--json", str(file)]) == 0
    results = load_results(file)
    cell = results["cells"][0]
    cell["batch_size"], cell["context"], cell["floor_us"] = 1, 16384, 20.0
    assert "launch /" not in shown(results) and "launch /" not in markdown(results)
    cell["contenders"]["share"] |= {"gpu_us": 40.0, "launch_us": 24.0, "gpu_us_by_kernel": {"metadata_kernel": 24.0}}
    save_results(file, results)
    assert load_results(file) == results
    assert "launch / (1.3 × floor + 4 µs): share 0.80" in shown(results)
    assert "| floor | launch / (1.3 × floor + 4 µs): share |" in markdown(results)
    assert markdown(results).endswith("| 20.0 | 0.80 |")
    cell["contenders"]["share"]["gpu_us_by_kernel"] = {"metadata_kernel": "long"}
    save_results(file, results)
    with pytest.raises(InvalidValueError, match="gpu_us_by_kernel"):
        load_results(file)


def shown(results: dict[str, Any]) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(terminal(results))
    return console.export_text()
