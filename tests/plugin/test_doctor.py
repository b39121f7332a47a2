"""The doctor: what it reports, and that it exits 1 exactly if something that was asked for can't be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nsa_plugin.adapters.base import PathPlan
from nsa_plugin.cli import main
from nsa_plugin.doctor import checks
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
    for name in [name for name in os.environ if name.startswith("NSA_PLUGIN_")]:
        monkeypatch.delenv(name)
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
    for name, value in settings.items() if failing != "NSA_PLUGIN_*" else ():
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


def test_no_engine_is_imported_that_is_not_installed_and_no_gpu_is_touched(pytestconfig: pytest.Config) -> None:
    code = (
        "import sys, torch\nfrom nsa_plugin.cli import main\nstatus = main(['doctor', '--json'])\n"
        "from nsa_plugin.doctor.checks import ENGINES, installed\n"
        "assert not [name for name in ENGINES if name in sys.modules and not installed(name)]\n"
        "assert not torch.cuda.is_initialized()\nsys.exit(status)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NSA_PLUGIN_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(pytestconfig.rootpath), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout[done.stdout.index("{") :])["ok"]
