"""Whatever the command line is given: no traceback, a message on stderr, a status that is not 0."""

from __future__ import annotations

import argparse
import copy
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nsa_plugin
from nsa_plugin import cli, launch_lines
from nsa_plugin.bench import results, run
from nsa_plugin.bench.plots import plot
from nsa_plugin.core.errors import InvalidValueError
from nsa_plugin.hookspec import hookimpl
from nsa_plugin.settings import NAMES, PREFIX

ROOT = Path(__file__).parents[2]
NONSENSE = ("", "²", "-1", "1e9", "9" * 5000, "nan", "nothing", "\x00", "/", "/absent/file", "a b", "ü" * 300)
GOOD = {
    "machine": "CPU", "date": "2026-01-01", "versions": {"torch": "2"}, "engine": "none",
    "cells": [
        {
            "mode": "decode", "batch_size": 1, "context": 4096, "steps": steps, "bytes": 4e4, "floor_us": 6.0,
            "contenders": {
                "copy": {"host_us": 9.0, "host_spread_us": [8.0, 11.0], "gpu_us": 5.0, "kernels": 1.0, "differs": []},
                "a $ sign": {"host_us": None, "gpu_us": 7.0, "kernels": 1.0, "differs": None},
            },
        }
        for steps in (2, 4, 8)
    ],
}  # fmt: skip


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every subcommand."""
    found = [action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0].choices)


def needed(command: argparse.ArgumentParser, tmp_path: Path) -> list[str]:
    """Words for the positional arguments."""
    words = []
    for action in command._actions:
        if not action.option_strings:
            words.append(str(next(iter(action.choices))) if action.choices else str(tmp_path / "absent.png"))
    return words


def cases() -> Iterator[tuple[str, int]]:
    for name, command in commands().items():
        for index, action in enumerate(command._actions):
            if action.nargs != 0:
                yield name, index


def run_main(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Status and stderr of a command; what is raised would be a traceback."""
    capsys.readouterr()
    try:
        status = cli.main(words)
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, capsys.readouterr().err


@pytest.mark.parametrize(("name", "index"), list(cases()))
def test_nonsense_for_any_argument_of_any_command_is_refused(
    name: str, index: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_run_cell", lambda *rest: pytest.fail("measured"))
    monkeypatch.setattr("nsa_plugin.demo.run._play", lambda *rest: pytest.fail("played"))
    monkeypatch.chdir(tmp_path)
    command = commands()[name]
    action = command._actions[index]
    if action.dest in ("model", "json", "plot", "picture", "readme"):
        pytest.skip("any text is a model's name; names of outputs have tests of their own")
    for word in NONSENSE:
        words = needed(command, tmp_path)
        if action.option_strings:
            words = [*words, f"{action.option_strings[0]}={word}"]
        else:
            words[[a for a in command._actions if not a.option_strings].index(action)] = word
        status, said = run_main([name, *words], capsys)
        assert status not in (0, 1) and said and "Traceback" not in said, word


FILES = {
    "empty": b"",
    "binary": bytes(range(256)),
    "text": b"hello",
    "list": b"[]",
    "number": b"1",
    "foreign": b'{"name": "x"}',
    "deep": b"[" * 100_000,
    "long number": b"9" * 5000,
    "no cells": json.dumps({**GOOD, "cells": []}).encode(),
    "pickle": pickle.dumps({"a": 1}),
}


@pytest.fixture(params=[*FILES, "npz", "npy", "npz of objects", "npz of json"])
def foreign(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file that no command wrote."""
    path = tmp_path / "foreign"
    if request.param in FILES:
        path.write_bytes(FILES[request.param])
    else:
        with path.open("wb") as file:
            if request.param == "npy":
                numpy.save(file, numpy.zeros(3))
            elif request.param == "npz":
                numpy.savez(file, a=numpy.zeros(3))
            elif request.param == "npz of objects":
                numpy.savez(file, json=numpy.array([{}], dtype=object))
            else:
                numpy.savez(file, json=json.dumps({"block_size": None, "mode": "decode"}), seq_lens=numpy.zeros(1))
    return path


def test_a_foreign_file_is_refused_by_every_command_that_reads_one(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (
        ["plot", str(foreign), str(tmp_path / "p.png")],
        ["verify", str(foreign)],
        ["demo", "--trace", str(foreign)],
        ["bench", "--trace", str(foreign)],
        ["bench", "--original-wheel", str(foreign)],
    ):
        status, said = run_main(words, capsys)
        assert status == 2 and str(foreign) in said and "expected" in said, words
        assert "pickle" not in said and not (tmp_path / "p.png").exists()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_results_with_one_wrong_entry_are_refused_and_others_can_be_drawn(data: st.DataObject, tmp_path: Path) -> None:
    wrong = copy.deepcopy(GOOD)
    holder: Any = wrong
    while True:
        key = data.draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
        if not isinstance(holder[key], dict | list) or not holder[key] or data.draw(st.booleans()):
            break
        holder = holder[key]
    bad: list[Any] = [None, -1, "x", [], {}, True, 1e300, float("nan"), float("inf"), "a\x00b", 10**400]
    holder[key] = data.draw(st.sampled_from(bad))
    path = tmp_path / "r.json"
    path.write_text(json.dumps(wrong))
    try:
        found = results.load(path)
    except InvalidValueError as error:
        assert str(path) in str(error)
        return
    plot(found, tmp_path / "p.svg")


def test_version_and_help_and_settings_do_not_import_torch() -> None:
    code = "import sys; from nsa_plugin.cli import main\ntry: main({})\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    for words in (["--version"], ["--help"], ["bench", "--help"], ["settings"], ["launch", "sglang"]):
        command = [sys.executable, "-c", code.format(words)]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert done.returncode == 0, done.stderr


def test_every_public_name_is_found_and_others_are_not() -> None:
    assert set(nsa_plugin.__all__) <= set(dir(nsa_plugin))
    named = [name for names in nsa_plugin._EXPORTS.values() for name in names]
    assert sorted([*named, "__version__"]) == sorted(nsa_plugin.__all__)
    for name in nsa_plugin.__all__:
        assert getattr(nsa_plugin, name) is not None
    assert nsa_plugin.hookimpl is hookimpl
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        nsa_plugin.absent  # noqa: B018


def test_nothing_is_cut_at_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NSA_PLUGIN_REPRO_DIR", "/" + "x" * 90)
    assert cli.main(["settings"]) == 0
    out = capsys.readouterr().out
    assert all(PREFIX + name in out for name in NAMES.values()) and "…" not in out and out.count("x") >= 90
    assert cli.main(["plugins"]) == 0
    out = capsys.readouterr().out
    assert "nsa_plugin_bind_precompute" in out and "…" not in out
    arguments = ["--bs", "1", "--ctx", "200", "--steps", "2", "--width", "512"]
    monkeypatch.setattr(run, "_original_wheel", lambda *rest: None)
    assert cli.main(["bench", *arguments]) == 0
    out = capsys.readouterr().out
    assert "…" not in out and "differs" in out and max(map(len, out.splitlines())) <= 80


def test_settings_says_where_each_value_comes_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSA_PLUGIN_VERIFY", "7")
    assert cli.main(["settings"]) == 0
    rows = capsys.readouterr().out
    assert re.search(r"NSA_PLUGIN_VERIFY\W+7\W+environment", rows)
    assert re.search(r"NSA_PLUGIN_STRATEGY\W+auto\W+default", rows)
    monkeypatch.setenv("NSA_PLUGIN_METRICS", "promtheus")
    assert cli.main(["settings"]) == 1 and "did you mean prometheus?" in capsys.readouterr().err
    monkeypatch.setenv("NSA_PLUGIN_STRATEGY", "gaph")
    assert cli.main(["settings"]) == 2 and "did you mean graph?" in capsys.readouterr().err


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_a_completion_script_knows_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as stop:
        cli.main(["--print-completion", shell])
    out = capsys.readouterr().out
    assert not stop.value.code and all(name in out for name in commands())


def test_without_shtab_the_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    status, said = run_main(["--print-completion", "bash"], capsys)
    assert status == 2 and "pip install 'nsa-plugin[completion]'" in said


def test_ctrl_c_gives_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*rest: object) -> None:
        raise KeyboardInterrupt

    for target in ("nsa_plugin.demo.run._play", "nsa_plugin.commands.plugins"):
        monkeypatch.setattr(target, interrupted)
    for words in (["demo"], ["plugins"]):
        assert run_main(words, capsys) == (130, "nsa-plugin: interrupted\n")


@pytest.mark.parametrize(("engine", "script"), [("sglang", "sglang/launch.sh"), ("vllm", "vllm/serve.sh")])
def test_the_example_scripts_start_the_line(engine: str, script: str, tmp_path: Path) -> None:
    program = launch_lines.words(engine)[0]
    for name, text in (
        (program, '#!/bin/sh\nprintf "%s\\n" "$@"\n'),
        ("nsa-plugin", f'#!/bin/sh\nexec {sys.executable} -m nsa_plugin "$@"\n'),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MODEL": "my model",
        "TP": "2",
    }
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / script), "--port", "1 2"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    words = done.stdout.splitlines()
    expected = [*launch_lines.words(engine, "my model")[1:]]
    assert words[: len(expected)] == expected
    assert words[-4:] == ["--tp-size" if engine == "sglang" else "--tensor-parallel-size", "2", "--port", "1 2"]
