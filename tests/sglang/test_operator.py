"""What an operator does with a process of sglang: ask the doctor, switch off and on by call and by file, read the log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not any(point.name == "nsa_plugin" for point in entry_points(group="sglang.srt.plugins")),
    reason="nsa-plugin is not installed in this environment",
)

PROCESS = """
import logging, os, sys, time
os.environ["TRITON_INTERPRET"] = "1"
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
import torch
from sglang.srt.plugins import load_plugins
load_plugins()
import nsa_plugin
from nsa_plugin.adapters.sglang import preparation
from nsa_plugin.rigs.sglang import backends as kit

native = preparation.native_replay
calls = []
preparation.native_replay = lambda *arguments: (calls.append(1), native(*arguments))
config = kit.Config(width=256)
table = kit.req_to_token(config, torch.device("cpu"))
make = lambda lengths: kit.make_batch("DECODE", torch.tensor(lengths), torch.tensor([1, 2]), 2)

def is_on(multi):
    calls.clear()
    multi.init_forward_metadata_out_graph(kit.replay_view(make([70, 200])))
    return not calls

def until(wanted, multi):
    deadline = time.monotonic() + 60
    while is_on(multi) is not wanted:
        assert time.monotonic() < deadline
        time.sleep(0.1)

with kit.stand_ins():
    multi = kit.make_multi_step(config, table, 4)
    multi.init_forward_metadata_out_graph(make([1, 1]), in_capture=True)
    assert is_on(multi)
    assert nsa_plugin.disable() == [] and not is_on(multi)
    assert nsa_plugin.enable() == [] and is_on(multi)
    file = os.environ["NSA_PLUGIN_SWITCH_FILE"]
    open(file, "w").close()
    until(False, multi)
    os.unlink(file)
    until(True, multi)
print("done")
"""


def environment(pytestconfig: pytest.Config, **settings: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NSA_PLUGIN_")}
    path = os.pathsep.join([str(pytestconfig.rootpath), os.environ.get("PYTHONPATH", "")])
    return {**clean, **settings, "PYTHONPATH": path}


def test_a_running_process_is_switched_by_call_and_by_file(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    settings = {"NSA_PLUGIN_STRATEGY": "share", "NSA_PLUGIN_SWITCH_FILE": str(tmp_path / "off")}
    done = subprocess.run(
        [sys.executable, "-c", PROCESS], env=environment(pytestconfig, **settings), capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1:] == ["done"], done.stderr[-3000:]
    assert done.stdout.count("nsa-plugin: switched off: the engine's own path is used") == 2
    assert f"({tmp_path / 'off'} is there)" in done.stdout and f"({tmp_path / 'off'} is gone)" in done.stdout


def test_the_doctor_about_the_real_sglang(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    settings = {"NSA_PLUGIN_VERIFY": "100", "NSA_PLUGIN_REPRO_DIR": str(tmp_path), "NSA_PLUGIN_STEP_LENGTHS": "exact"}
    done = subprocess.run(
        [sys.executable, "-m", "nsa_plugin", "doctor", "--json"],
        env=environment(pytestconfig, **settings), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["sglang"]["detail"].endswith(": all that is needed is there")
    assert checks["sglang: draft decode"]["detail"].startswith("strategy share (NSA_PLUGIN_VERIFY: ")
    assert checks["NSA_PLUGIN_VERIFY"]["detail"] == "100, from environment"
