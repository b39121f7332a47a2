"""The end-to-end driver with a stand-in for the engine: turns, comparison of tokens, figures, table."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "benchmarks" / "end_to_end"
WORKER = """
import json, os, pathlib, sys, time
sys.path.insert(0, os.environ["PYTHONPATH"].split(os.pathsep)[0])
import host_times
config = json.loads(os.environ["E2E_CONFIG"])
strategy = os.environ.get("NSA_PLUGIN_STRATEGY")
if strategy == "off" and config["steps"] == 8:
    sys.exit("planted: this one does not start")
class Scheduler:
    def prepare(self):
        pass
    def run_batch(self):
        self.prepare()
        time.sleep(0.0005)
host_times.from_first_call("__main__", "Scheduler", "run_batch", [("__main__.Scheduler", "prepare", "draft metadata")])
scheduler = Scheduler()
print("nsa-plugin: loaded", file=sys.stderr)
print("Capture draft decode CUDA graph end. elapsed=2.5 s, mem usage=1 GB", file=sys.stderr)
print("Capture draft extend CUDA graph end. elapsed=1.5 s, mem usage=1 GB", file=sys.stderr)
print(json.dumps({"ready": True, "start_s": 0.1}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["op"] == "quit":
        break
    if request["op"] == "profile":
        seen = {"kernels": 150, "launches": 75, "graph_launches": 45, "gpu_busy_us": 1.0, "wall_us": 4.0, "rounds": 15}
        print(json.dumps({"error": "planted"} if config["steps"] == 8 else seen), flush=True)
        continue
    start = time.perf_counter()
    for _ in range(request["max_new_tokens"]):
        scheduler.run_batch()
    wrong = WRONG and strategy == "auto"
    tokens = [[prompt[0]] * (request["max_new_tokens"] - 1) + [7 + wrong] for prompt in request["prompts"]]
    answer = {"start": start, "end": time.perf_counter(), "tokens": tokens, "rounds": [len(one) for one in tokens]}
    print(json.dumps(answer), flush=True)
time.sleep(1)
if config["tp"] == 2:  # a second rank, slower by 300 µs
    folder = pathlib.Path(os.environ["E2E_TIMES"])
    own = json.loads(next(folder.glob("times_*.json")).read_text())
    other = {name: [[start, seconds + 300e-6] for start, seconds in entries] for name, entries in own.items()}
    (folder / "times_other.json").write_text(json.dumps(other))
"""


def example_with(worker: str, tmp_path: Path) -> Path:
    """A copy of the example with a worker in place of sglang's."""
    example = tmp_path / "example"
    shutil.copytree(EXAMPLE, example)
    (example / "sglang_worker.py").write_text(worker)
    return example


def command(script: str, tmp_path: Path, *options: str) -> list[str]:
    """A command line that writes to r.json."""
    folders = [
        "--plugin",
        str(tmp_path),
        "--probe",
        str(tmp_path / "example" / "probe"),
        "--out",
        str(tmp_path / "out"),
    ]
    return [sys.executable, script, *folders, "--json", str(tmp_path / "r.json"), *options]


RUN = ("--prompt", "16", "--new-tokens", "60", "--seconds-per-cell", "0")


def drive(tmp_path: Path, worker: str, *options: str) -> tuple[str, dict[str, Any], Path]:
    """Run the driver; what it printed, its results, and the folder it ran in."""
    example = example_with(worker, tmp_path)
    line = command("run.py", tmp_path, *RUN, "--steps", "4", "8", "--batch", "1", "2", *options)
    done = subprocess.run(line, cwd=example, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "planted: this one does not start" in done.stdout
    return done.stdout, json.loads((tmp_path / "r.json").read_text()), example


def test_steps_without_any_engine_are_left_out(tmp_path: Path) -> None:
    one_less = WORKER.replace('strategy == "off" and config["steps"] == 8', 'config["steps"] == 8')
    out, found, _ = drive(tmp_path, f"WRONG = False\n{one_less}")
    assert [(cell["steps"], cell["batch"]) for cell in found["cells"]] == [(4, 1), (4, 2)]
    assert out.count("steps 8: left out, no engine for it is up") == 2


@pytest.mark.parametrize("wrong", [False, True])
def test_it_takes_turns_compares_and_reports(tmp_path: Path, wrong: bool) -> None:
    _, found, example = drive(tmp_path, f"WRONG = {wrong}\n{WORKER}")
    assert [(cell["steps"], cell["batch"]) for cell in found["cells"]] == [(4, 1), (4, 2), (8, 1), (8, 2)]
    for cell in found["cells"]:
        variants = ["no plugin", "off", "auto"] if cell["steps"] == 4 else ["no plugin", "auto"]
        assert list(cell["variants"]) == variants
        for name, figures in cell["variants"].items():
            assert figures["same_tokens"] == (name != "auto" or not wrong)
            assert figures["first_difference"][0] == [None if figures["same_tokens"] else 59] * cell["batch"]
            assert 400 < figures["round_us_median"] < figures["round_us_p99"] * 1.001
            assert figures["round us"]["per_round"] == 1 and figures["rounds"] == [60] * cell["batch"]
    assert any("nsa-plugin: loaded" in line for line in found["logs"]["4 auto"])
    table = report(tmp_path, example)
    assert "slowest rank" not in table
    assert table.count("differ" if wrong else "same") == 4 and "| 4 | 16 | 2 |" in table
    assert "`auto` against no plugin, over 4 cells: " in table and "`off` against no plugin, over 2 cells: " in table
    assert (
        "| 4 | off | 10 | 5 | 3 | 25 % | 4 s | – |" in table and "| 8 | auto | – | – | – | planted | 4 s | – |" in table
    )


def report(tmp_path: Path, example: Path) -> str:
    """The table of a run."""
    command = [sys.executable, "report.py", str(tmp_path / "r.json")]
    return subprocess.run(command, cwd=example, capture_output=True, text=True, check=True).stdout


def test_a_stopped_run_keeps_what_it_measured(tmp_path: Path) -> None:
    example = example_with(f"WRONG = False\n{WORKER}", tmp_path)
    line = command("run.py", tmp_path, *RUN, "--steps", "4", "--batch", *["1"] * 200)
    process = subprocess.Popen(line, cwd=example, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    cells = (line for line in process.stdout if "1 turns" in line)
    for _ in range(2):  # when the second is over, the first is kept
        next(cells)
    while process.poll() is None:
        process.terminate()
        time.sleep(0.2)
    found = json.loads((tmp_path / "r.json").read_text())
    assert process.returncode == 1 and 1 <= len(found["cells"]) < 200
    assert all(figures["round_us_median"] for figures in found["cells"][0]["variants"].values())


def test_ranks_are_compared(tmp_path: Path) -> None:
    _, found, example = drive(tmp_path, f"WRONG = False\n{WORKER}", "--tp", "2")
    for cell in found["cells"]:
        for figures in cell["variants"].values():
            assert figures["draft metadata us"]["per_round"] == figures["round us"]["per_round"] == 1
            assert figures["draft metadata us"]["spread_median"] == pytest.approx(300)
            assert figures["round_us_median"] > 400  # of each rank by itself: between two ranks there would be none
    assert report(tmp_path, example).count("draft metadata: slowest rank over fastest 300 µs (p99 300 µs)") == 3


@pytest.mark.parametrize("planted", ["", "a token", "a line of the log"])
def test_two_engines_side_by_side_are_compared_with_one_alone(tmp_path: Path, planted: str) -> None:
    worker = WORKER.replace('strategy == "auto"', '"verified-1" in os.environ["E2E_TIMES"]')
    if planted == "a line of the log":
        worker = worker.replace("nsa-plugin: loaded", "nsa-plugin: draft: … its own values are used, …")
    example = example_with(f"WRONG = {planted == 'a token'}\n{worker}", tmp_path)
    line = command("side_by_side.py", tmp_path, "--new-tokens", "20")
    done = subprocess.run(line, cwd=example, capture_output=True, text=True, timeout=120)
    assert done.returncode == bool(planted), done.stdout + done.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["ok"] is not bool(planted)
    assert len(found["trouble"]) == (2 if planted == "a line of the log" else 0)
    assert found["same_tokens"] == [[True] * 6, [planted != "a token"] * 6]


def test_a_model_brings_arguments_and_a_run_names_its_variants(tmp_path: Path) -> None:
    told = 'print("nsa-plugin:", strategy, os.environ.get("GIVEN"), os.environ["TRITON_CACHE_AUTOTUNING"], json.dumps(config["arguments"]), file=sys.stderr)'
    example = example_with(
        f"WRONG = False\n{WORKER}".replace("scheduler = Scheduler()", f"scheduler = Scheduler()\n{told}"), tmp_path
    )
    model = example / "model_glm5_next"
    line = command(
        "run.py", tmp_path, *RUN, "--steps", "4", "--batch", "1", "--variants", "no plugin", "graph", "--model", str(model),
        "--environment", "GIVEN=this", "--arguments", '{"page_size": 1}',
    )  # fmt: skip
    done = subprocess.run(line, cwd=example, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    wanted = json.loads((model / "sglang.json").read_text()) | {"page_size": 1}
    assert (
        wanted["context_length"]
        == json.loads((model / "config.json").read_text())["text_config"]["max_position_embeddings"]
    )
    for variant, strategy in (("no plugin", None), ("graph", "graph")):
        assert found["cells"][0]["variants"][variant]["same_tokens"]
        said = next(line for line in found["logs"][f"4 {variant}"] if "nsa-plugin:" in line and "this" in line)
        assert said == f"nsa-plugin: {strategy} this 1 {json.dumps(wanted)}"


def test_accepted_lengths_are_compared_prompt_by_prompt(tmp_path: Path) -> None:
    faster = (
        'max(1, len(one) - 1 - 20 * (os.environ.get("NSA_PLUGIN_STEP_LENGTHS") == "exact") - one[0] % 3) for one in'
    )
    worker = WORKER.replace('"rounds": [len(one) for one in', f'"rounds": [{faster}')
    example = example_with(f"WRONG = False\n{worker}", tmp_path)
    (tmp_path / "prompts.json").write_text(json.dumps({"prompts": [[number] * 9 for number in range(10, 22)]}))
    options = (
        "--prompts",
        str(tmp_path / "prompts.json"),
        "--steps",
        "2",
        "8",
        "--variants",
        "no plugin",
        "auto",
        "exact",
    )
    line = command("acceptance.py", tmp_path, *options, "--new-tokens", "60")
    done = subprocess.run(line, cwd=example, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    for found in json.loads((tmp_path / "r.json").read_text())["steps"].values():
        assert found["no plugin"]["accepted"] == pytest.approx(59 / 58)
        same, exact = (found[variant]["against no plugin"] for variant in ("auto", "exact"))
        assert same["ratio"] == 1 and same["interval"] == [1, 1] and same["prompts in fewer rounds"] == 0
        assert exact["ratio"] == pytest.approx(58 / 38)
        assert exact["interval"][0] < exact["ratio"] < exact["interval"][1]
        assert (exact["prompts in fewer rounds"], exact["prompts with the same tokens"], exact["prompts"]) == (
            12,
            12,
            12,
        )


def test_what_it_is_worth_is_measured_unit_by_unit(tmp_path: Path) -> None:
    told = 'print("nsa-plugin: 512.0 MiB given back", file=sys.stderr)'
    example = example_with(
        f"WRONG = False\n{WORKER}".replace("scheduler = Scheduler()", f"scheduler = Scheduler()\n{told}"), tmp_path
    )
    unit = "8_layers_width_1048576"
    options = ("--warm", "--most", "12", "--new-tokens", "30", "--plan", "gpu", "--units", unit)
    done = subprocess.run(
        command("worth.py", tmp_path, *options), cwd=example, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / f"r_{unit}.json").read_text())
    assert (found["layers"], found["width"], found["given_back_gib"]) == (8, 1048576, 0.5)
    config = json.loads((tmp_path / "out" / "models" / unit / "config.json").read_text())
    assert (config["num_hidden_layers"], config["max_position_embeddings"]) == (8, 1048576)
    assert [cell["batch"] for cell in found["cells"]] == [1, 32, 128]
    for cell in found["cells"]:
        assert set(cell["variants"]) == {"no plugin", "no plugin again", "auto"}
        for figures in cell["variants"].values():
            assert len(figures["tokens_per_s_all"]) == len(figures["round_us_by_turn"]) == figures["turns"] == 12
            assert figures["same_tokens"] and "first_difference" not in figures
    table = subprocess.run(
        [sys.executable, "report.py", str(tmp_path / f"r_{unit}.json")],
        cwd=example, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert table.count("rounds/s") == 6 and table.count("12 pairs") == 12  # of tokens and of rounds


def test_a_unit_that_no_plan_has_is_refused_by_name(tmp_path: Path) -> None:
    example = example_with(f"WRONG = False\n{WORKER}", tmp_path)
    line = command("worth.py", tmp_path, "--plan", "curve", "--units", "3_layers")
    done = subprocess.run(line, cwd=example, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "2_layers" in done.stderr and "got 3_layers" in done.stderr
