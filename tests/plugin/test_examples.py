"""Every example runs, or is what its engine's own parser accepts."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nsa_plugin import launch_lines
from nsa_plugin.settings import Settings

SCRIPTS = {"sglang": "examples/sglang/launch.sh", "vllm": "examples/vllm/serve.sh"}


def command(pytestconfig: pytest.Config, tmp_path: Path, engine: str) -> tuple[list[str], dict[str, str]]:
    """What a launch script would execute, and the NSA_PLUGIN_ variables that it sets."""
    for program in ("python3", "vllm"):
        stub = tmp_path / program
        dump = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
        stub.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(dump)} "$@"\n')
        stub.chmod(0o755)
    ours = tmp_path / "nsa-plugin"
    ours.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m nsa_plugin "$@"\n')
    ours.chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("NSA_PLUGIN_", "PROMETHEUS_"))}
    done = subprocess.run(
        [shutil.which("bash") or "bash", str(pytestconfig.rootpath / SCRIPTS[engine]), "--port", "1234"],
        env={**clean, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": _path(pytestconfig)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    arguments, environment = json.loads(done.stdout)
    return arguments, environment


@pytest.mark.parametrize("engine", SCRIPTS)
def test_launch_scripts_set_settings_that_there_are(pytestconfig: pytest.Config, tmp_path: Path, engine: str) -> None:
    arguments, environment = command(pytestconfig, tmp_path, engine)
    settings = Settings.from_environment(environment)
    assert settings.metrics == {"prometheus"}
    assert arguments[-2:] == ["--port", "1234"]
    assert (engine == "vllm") == ("PROMETHEUS_MULTIPROC_DIR" in environment)


@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs sglang")
def test_sglangs_parser_accepts_its_script(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    import argparse

    from sglang.srt.server_args import ServerArgs

    arguments, _ = command(pytestconfig, tmp_path, "sglang")
    assert arguments[:2] == ["-m", "sglang.launch_server"]
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    found = parser.parse_args(arguments[2:])
    assert (found.speculative_num_steps, found.speculative_eagle_topk, found.port) == (launch_lines.STEPS, 1, 1234)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm")
def test_vllms_parser_accepts_its_script(
    pytestconfig: pytest.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    places = ("vllm.entrypoints.common.cli_args", "vllm.entrypoints.openai.cli_args")  # from 0.33, before
    place = next(name for name in places if _there(name.rpartition(".")[0]) and _there(name))
    make_arg_parser = importlib.import_module(place).make_arg_parser

    arguments, _ = command(pytestconfig, tmp_path, "vllm")
    assert arguments[0] == "serve"
    found = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments[1:])
    assert (found.speculative_config["num_speculative_tokens"], found.port) == (launch_lines.STEPS, 1234)


def _path(pytestconfig: pytest.Config) -> str:
    return os.pathsep.join([str(pytestconfig.rootpath), os.environ.get("PYTHONPATH", "")])


def _there(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def test_the_offline_example(pytestconfig: pytest.Config) -> None:
    done = subprocess.run(
        [sys.executable, str(pytestconfig.rootpath / "examples/offline/precompute_once.py")],
        env={**os.environ, "PYTHONPATH": _path(pytestconfig)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "see: [75, 3005]" in done.stdout and "keeps: [75, 2048]" in done.stdout
