"""The doctor: what it reports, and that it exits 1 exactly if something that was asked for can't be had."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from nsa_plugin.adapters.base import PathPlan
from nsa_plugin.adapters.ledger import LedgerRow
from nsa_plugin.cli import main
from nsa_plugin.doctor import checks, loading
from nsa_plugin.host import BuiltIn


class Toy:
    """An adapter that is clean, or not."""

    name = "sglang"
    features: frozenset[str] = frozenset()
    problems: tuple[str, ...] = ()
    plans: tuple[PathPlan, ...] = (PathPlan("draft decode", "graph", ""),)

    new: tuple[str, ...] = ()

    def probe(self) -> list[str]:
        return list(self.problems)

    def untested(self) -> list[str]:
        return list(self.new)

    def paths(self, host: Any) -> list[PathPlan]:
        return list(self.plans)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> type[Toy]:
    """The doctor sees one engine, with this adapter, and one GPU."""
    kind = type("Mine", (Toy,), {})
    for name in [name for name in os.environ if name.startswith(("NSA_PLUGIN_", "SGLANG_PLUGINS", "VLLM_PLUGINS"))]:
        monkeypatch.delenv(name)
    points = [EntryPoint("nsa_plugin", "nsa_plugin.entry:register_sglang", "sglang.srt.plugins")]
    monkeypatch.setattr(loading, "entry_points", lambda group: [point for point in points if point.group == group])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(BuiltIn, "nsa_plugin_adapters", BuiltIn.nsa_plugin_adapters)
    monkeypatch.setattr("nsa_plugin.host.SglangAdapter", kind)
    monkeypatch.setattr(checks, "installed_version", lambda name: "9.9" if name == "sglang" else "unknown")
    monkeypatch.setattr(checks, "_gpus", lambda: ["H100"])
    return kind


def report(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, str]]]:
    status = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] == (status == 0)
    return status, {check["name"]: check for check in found["checks"]}


def test_a_clean_engine(toy: type[Toy], capsys: pytest.CaptureFixture[str]) -> None:
    status, found = report(capsys)
    assert status == 0
    assert found["sglang"]["detail"] == "9.9: all that is needed is there"
    assert found["sglang: draft decode"]["detail"] == "strategy graph"
    assert found["NSA_PLUGIN_STRATEGY"]["detail"] == "auto, from default"
    assert found["nsa_plugin_adapters"]["detail"] == "built-in"
    assert main(["doctor"]) == 0
    assert "All that was asked for can be had." in capsys.readouterr().out


def test_what_is_untested_is_a_note(toy: type[Toy], capsys: pytest.CaptureFixture[str]) -> None:
    toy.new = ("x.prepare has parameters that no tested release has: stream; they are passed on",)
    status, found = report(capsys)
    assert status == 0 and found["sglang: untested"]["status"] == "note"
    assert found["sglang: untested"]["detail"] == toy.new[0]
    del toy.new

    def raises(adapter: Toy) -> list[str]:
        raise RuntimeError("half an engine")

    toy.untested = raises  # type: ignore[assignment,method-assign]
    assert (
        "can't say what is untested (RuntimeError: half an engine)" in report(capsys)[1]["sglang: untested"]["detail"]
    )


def test_what_exact_step_lengths_gave_is_said_where_they_can_be_had(
    toy: type[Toy], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "sglang: exact step lengths"
    assert line not in report(capsys)[1]
    monkeypatch.setattr(toy, "features", frozenset({"step_lengths"}))
    said = report(capsys)[1][line]
    assert (
        said["status"] == "ok" and "with 4 steps: +1.5 %" in said["detail"] and "with 7 steps: +5.2 %" in said["detail"]
    )
    monkeypatch.setenv("NSA_PLUGIN_STEP_LENGTHS", "exact")
    assert line not in report(capsys)[1]


@pytest.mark.parametrize(
    ("settings", "failing"),
    [
        ({"STRATEGY": "fast"}, "NSA_PLUGIN_*"),
        ({"STRATEGY": "copy"}, "sglang: draft decode"),
        ({"VERIFY": "9", "REPRO_DIR": "/tmp"}, "sglang: NSA_PLUGIN_VERIFY"),
        ({"STEP_LENGTHS": "exact"}, "sglang: NSA_PLUGIN_STEP_LENGTHS"),
        ({"PLUGINS": "absent"}, "NSA_PLUGIN_PLUGINS"),
        ({"REPRO_DIR": "/etc/hostname/x"}, "NSA_PLUGIN_REPRO_DIR"),
        ({"SWITCH_FILE": "/no/such/file"}, "NSA_PLUGIN_SWITCH_FILE"),
    ],
)
def test_what_was_asked_for_and_cant_be_had_fails(
    toy: type[Toy], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, str], failing: str,
) -> None:  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(f"NSA_PLUGIN_{name}", value)
    status, found = report(capsys)
    assert status == 1
    assert [name for name, check in found.items() if check["status"] == "fail"] == [failing]
    assert found[failing]["fix"]
    if failing == "NSA_PLUGIN_*":
        assert "sglang" in found and "sglang: draft decode" not in found, "no path is served with such a setting"
        return
    for name, value in settings.items():
        assert found[f"NSA_PLUGIN_{name}"]["detail"].startswith(f"{value}, from environment")


def test_a_problem_of_an_installed_engine_fails_unless_switched_off(
    toy: type[Toy], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.problems = ("looked for x.y (a use), found nothing; use a release that has it",)
    toy.plans = (PathPlan("draft decode", "off", "x.y is missing"),)
    status, found = report(capsys)
    assert status == 1 and found["sglang"]["fix"] == "use a release that has it"
    assert found["sglang: draft decode"]["detail"] == "left to the engine (x.y is missing)"
    monkeypatch.setenv("NSA_PLUGIN_STRATEGY", "off")
    assert report(capsys)[0] == 0


def test_a_strategy_that_one_of_several_paths_can_have_is_had(
    toy: type[Toy], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSA_PLUGIN_STRATEGY", "graph")
    toy.plans = (PathPlan("draft decode", "graph", ""), PathPlan("target verify", "off", "not covered"))
    status, found = report(capsys)
    assert status == 0
    assert (found["sglang: target verify"]["status"], found["sglang: draft decode"]["status"]) == ("note", "ok")


def test_a_probe_that_raises_is_a_problem_with_a_fix(toy: type[Toy], capsys: pytest.CaptureFixture[str]) -> None:
    def half(self: Toy) -> list[str]:
        raise ImportError("half of an engine")

    toy.probe = half  # type: ignore[method-assign]
    status, found = report(capsys)
    assert status == 1 and "ImportError: half of an engine" in found["sglang"]["detail"]


def test_graph_without_a_gpu(
    toy: type[Toy], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_gpus", list)
    status, found = report(capsys)
    assert status == 0 and "none was found" in found["sglang: draft decode"]["detail"]
    monkeypatch.setenv("NSA_PLUGIN_STRATEGY", "graph")
    assert report(capsys)[0] == 1


def test_gpus_are_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100, 81559 MiB, 580.1, 9.0'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert checks._gpus() == ["NVIDIA H100, 81559 MiB, 580.1, 9.0"]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert checks._gpus() == []


@pytest.mark.parametrize(
    ("variable", "value", "left_out"),
    [
        ("SGLANG_PLUGINS", "other", True),
        ("SGLANG_PLUGINS", "other, nsa_plugin", False),
        ("SGLANG_PLUGINS", "", False),  # sglang reads the empty list as none at all
        ("VLLM_PLUGINS", "other", True),
        ("VLLM_PLUGINS", "other,nsa_plugin", False),
        ("VLLM_PLUGINS", "other, nsa_plugin", True),  # vLLM strips nothing
        ("VLLM_PLUGINS", "", True),
    ],
)
def test_an_engine_that_would_not_load_the_plugin_fails(
    toy: type[Toy], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    variable: str, value: str, left_out: bool,
) -> None:  # fmt: skip
    engine = variable.partition("_")[0].lower()
    monkeypatch.setattr(toy, "name", engine)
    monkeypatch.setattr(checks, "installed_version", lambda name: "9.9" if name == engine else "unknown")
    monkeypatch.setattr(loading, "entry_points", lambda group: [EntryPoint("nsa_plugin", "x:y", group)])
    monkeypatch.setenv(variable, value)
    status, found = report(capsys)
    name = f"{engine}: {variable}"
    assert status == int(left_out)
    assert found[name]["status"] == "fail" if left_out else name not in found or found[name]["status"] == "ok"
    monkeypatch.setenv("NSA_PLUGIN_STRATEGY", "off")
    assert report(capsys)[0] == 0
    if left_out:
        fix = found[name]["fix"].removeprefix(f"export {variable}=").removesuffix(", or unset it")
        monkeypatch.setenv("NSA_PLUGIN_STRATEGY", "auto")
        monkeypatch.setenv(variable, fix)
        assert report(capsys)[0] == 0, "the fix mends it"


def test_a_plugin_that_is_on_the_path_and_not_installed_fails(
    toy: type[Toy], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "entry_points", lambda group: [])
    status, found = report(capsys)
    assert status == 1 and "pip install" in found["sglang: entry point"]["fix"]


def test_without_an_engine_nothing_is_had(
    toy: type[Toy], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "installed_version", lambda name: "unknown")
    status, found = report(capsys)
    assert status == 1 and found["any"]["status"] == "fail" and found["any"]["fix"]
    monkeypatch.setenv("NSA_PLUGIN_STRATEGY", "off")
    assert report(capsys)[0] == 0


def test_the_switch_file_is_read(
    toy: type[Toy], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "off"
    monkeypatch.setenv("NSA_PLUGIN_SWITCH_FILE", str(file))
    assert report(capsys)[0] == 0
    file.touch()
    status, found = report(capsys)
    assert status == 1
    assert (found["switch file"]["status"], found["switch file"]["fix"]) == ("off", f"rm {file}")
    assert main(["doctor"]) == 1
    assert "Switched off for now" in capsys.readouterr().out
    assert main(["doctor", "--check"]) == 0, "it must not keep an engine from starting"
    assert f"Switched off for now: {file} is there" in capsys.readouterr().out


def test_one_line_for_init_containers(
    toy: type[Toy], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loud(adapter: Toy) -> list[str]:
        os.write(1, b"an engine's print")
        os.write(2, b"an engine's warning")
        return list(adapter.problems)

    monkeypatch.setattr(toy, "probe", loud)
    assert main(["doctor", "--check"]) == 0
    out, err = capfd.readouterr()
    assert out.endswith(": All that was asked for can be had; sglang: draft decode: strategy graph\n")
    assert (out.count("\n"), err) == (1, "")
    toy.problems = ("looked for x.y (a use), found nothing; use a release that has it",)
    monkeypatch.setenv("NSA_PLUGIN_PLUGINS", "absent")
    assert main(["doctor", "--check"]) == 1
    out, err = capfd.readouterr()
    assert "sglang: 9.9: looked for x.y (a use), found nothing; use a release that has it (and 1 more" in out
    assert (out.count("\n"), err.count("engine")) == (1, 0)
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capfd.readouterr().out)["ok"] is False


def test_what_matters_here_comes_first_and_the_rest_with_all(
    toy: type[Toy], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_gpus", lambda: ["NVIDIA H100, 81559 MiB, 580.1, 9.0"])
    toy.plans = (
        PathPlan("draft decode", "graph", ""),
        PathPlan("draft with HOPPER_ATTN", "off", "it plans on the host", frozenset({"9"})),
        PathPlan("draft with NEWER_ATTN", "off", "it plans on the host", frozenset({"10"})),
        PathPlan("draft with MAMBA", "off", "of other models", frozenset()),
    )
    assert main(["doctor"]) == 0
    short = capsys.readouterr().out
    assert main(["doctor", "--all"]) == 0
    complete = capsys.readouterr().out
    assert short.index("draft decode") < short.index("HOPPER_ATTN") < short.index("H100")
    assert "more lines" in short and "more lines" not in complete
    for rest in ("NEWER_ATTN", "MAMBA", "NSA_PLUGIN_LOG_LEVEL", "nsa_plugin_describe", "launch_server", "pluggy"):
        assert rest not in short and rest in complete
    monkeypatch.setattr(checks, "_gpus", lambda: ["a GPU that names no capability"])
    assert main(["doctor"]) == 0
    assert "NEWER_ATTN" in capsys.readouterr().out, "who does not know leaves nothing out"


ROW = LedgerRow("engine.Backend.prepare", "computes once", "not proposed", "the engine does so", "every draft")


def test_the_ledger_of_patches_is_printed_if_the_adapter_offers_one(
    toy: type[Toy], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--patches"]) == 0
    assert "patches of" not in capsys.readouterr().out
    toy.ledger = lambda adapter: (ROW,)  # type: ignore[attr-defined]
    assert main(["doctor"]) == 0
    assert ROW.target not in capsys.readouterr().out
    for flag in ("--patches", "--all"):
        assert main(["doctor", flag]) == 0
        out = capsys.readouterr().out
        assert "patches of sglang" in out and all(text in out for text in vars(ROW).values())
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["patches"] == {"sglang": [vars(ROW)]}

    def raises(adapter: Toy) -> list[object]:
        raise RuntimeError("half a ledger")

    toy.ledger = raises  # type: ignore[attr-defined]
    assert main(["doctor", "--patches"]) == 0
    assert "RuntimeError: half a ledger" in capsys.readouterr().out


def test_no_engine_is_imported_that_is_not_installed_and_no_gpu_is_touched(pytestconfig: pytest.Config) -> None:
    code = (
        "import sys, torch\nfrom nsa_plugin.cli import main\nstatus = main(['doctor', '--json'])\n"
        "from nsa_plugin.doctor.checks import ENGINES, installed\n"
        "assert status == int(not any(map(installed, ENGINES)))\n"
        "assert not [name for name in ENGINES if name in sys.modules and not installed(name)]\n"
        "assert not torch.cuda.is_initialized()"
    )
    left_out = ("NSA_PLUGIN_", "SGLANG_PLUGINS", "VLLM_PLUGINS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    environment["PYTHONPATH"] = os.pathsep.join([str(pytestconfig.rootpath), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout)["ok"], bool), "nothing but JSON, whatever an engine prints"


def test_a_long_name_is_folded_and_not_cut(toy: type[Toy], capsys: pytest.CaptureFixture[str]) -> None:
    long = ".".join(["engine", "package" * 9, "Backend" * 9, "prepare"])
    toy.ledger = lambda adapter: (replace(ROW, target=long),)  # type: ignore[attr-defined]
    assert main(["doctor", "--patches"]) == 0
    out = capsys.readouterr().out
    assert long in re.sub(r"[\s│]", "", out) and max(map(len, out.splitlines())) <= 80
