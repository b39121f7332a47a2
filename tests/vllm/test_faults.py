"""Faults, one by one, on the real vLLM: its values are right, the log names cause and remedy once, a counter moves.

Errors of our own at capture and in every step, what vLLM lacks, an installation that breaks off, ranks that differ and
unknown settings are in `test_conformance`, `test_v2_step`, `test_v1_proposer`, `test_v1_coverage` and `test_ranks`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import json
import logging
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.compiler.errors import CompilationError
from vllm.config import set_current_vllm_config
from vllm.v1.worker.gpu.input_batch import InputBatch

from nsa_plugin import entry
from nsa_plugin import host as host_module
from nsa_plugin.adapters.base import UNPROVED
from nsa_plugin.adapters.vllm import builders, releases
from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.adapters.vllm.v1 import proposer as v1_proposer
from nsa_plugin.adapters.vllm.v2 import step as v2_step
from nsa_plugin.adapters.vllm.v2 import unfused as v2_unfused
from nsa_plugin.adapters.vllm.v2.target import hooks as v2_target
from nsa_plugin.cli import main
from nsa_plugin.core.draft_steps import bind_draft_steps
from nsa_plugin.core.kernels import draft_steps, step_update
from nsa_plugin.doctor import checks
from nsa_plugin.host import Host
from nsa_plugin.rigs.vllm import v1_draft
from nsa_plugin.rigs.vllm.v2_draft import CAPTURED, Draft
from tests.vllm.drafts import (
    FIRST_IS_REBUILT,
    LARGE,
    LAYOUT,
    OWNERS,
    TOKENS,
    Step,
    assert_same,
    methods,
    proposals,
    unequal,
)

Install = Callable[..., tuple[Host, VllmAdapter]]


class DoesNotCompile:
    """A kernel of ours, on a GPU or with a Triton that is not what it was written for."""

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            raise CompilationError("tl.nothing()", None, "no such function")

        return launch


def test_the_kernel_of_a_step_does_not_compile(
    install: Install, monkeypatch: pytest.MonkeyPatch, log: Any, expected: list[Step]
) -> None:
    monkeypatch.setattr(step_update, "step_update_kernel", DoesNotCompile())
    host, _ = install()
    draft = Draft(*LAYOUT, TOKENS)
    assert unequal(expected, proposals(draft)) == [] and draft.fused
    (line,) = log(logging.ERROR)
    assert "no such function" in line and "NSA_PLUGIN_STRATEGY=off switches the plugin off" in line
    assert host.fallbacks == {("vllm", v2_step.PATH, "capture", "graph", "CompilationError"): 1}


def test_the_kernel_of_v1s_steps_does_not_compile(
    install_v1: Callable[[], Host], monkeypatch: pytest.MonkeyPatch, log: Any, hopper: None
) -> None:
    draft = v1_draft.V1Draft("auto", 4, TOKENS)
    want = v1_draft.reference(draft)
    monkeypatch.setattr(draft_steps, "draft_steps_kernel", DoesNotCompile())
    triton = functools.partial(bind_draft_steps, impl="triton")
    monkeypatch.setattr(host_module, "bind_draft_steps", triton)
    host = install_v1()
    assert_same(want, v1_draft.proposals(draft))
    (line,) = log(logging.ERROR)
    assert "no such function" in line and "NSA_PLUGIN_STRATEGY=off switches the plugin off" in line
    assert host.fallbacks == {("vllm", v1_proposer.PATH, "replay", "copy", "CompilationError"): 1}


@pytest.mark.parametrize("step", range(TOKENS - 1))
def test_a_capture_that_is_stopped_in_the_middle(
    install: Install, monkeypatch: pytest.MonkeyPatch, log: Any, expected: list[Step], step: int
) -> None:
    """vLLM's error reaches vLLM, its block tables are back in their place, and a second attempt captures."""
    host, _ = install()
    draft = Draft(*LAYOUT, TOKENS)
    speculator, calls = draft.speculator, iter(range(100))
    run_model = speculator._run_model

    def out_of_memory(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == step:
            assert isinstance(speculator.block_tables, v2_step.DeferredSlots)
            raise torch.OutOfMemoryError("planted")
        return run_model(*arguments, **keywords)

    with monkeypatch.context() as patch, set_current_vllm_config(draft.config):
        patch.setattr(speculator, "_run_model", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError, match="planted"):
            draft.graphs.body()
    assert speculator.block_tables is draft.tables
    assert unequal(expected, proposals(draft)) == []
    assert not host.fallbacks and not log(logging.WARNING)


def test_batches_larger_than_any_captured_one_take_the_same_step(install: Install, expected: list[Step]) -> None:
    """vLLM then builds metadata for the batch and runs the fused draft without a graph."""
    host, _ = install()
    draft = Draft(*LAYOUT, TOKENS)
    assert len(LARGE[0]) > CAPTURED
    seen = draft.propose(*LARGE)
    assert len(seen) == TOKENS - 1 and all(len(step["slots"]) == len(LARGE[0]) for step in seen)
    assert unequal(expected, expected[: -len(seen)] + seen) == []
    assert not host.fallbacks


@pytest.mark.parametrize("without_attention", [True, False])
def test_a_dummy_batch_between_two_drafts(
    install: Install, monkeypatch: pytest.MonkeyPatch, log: Any, expected: list[Step], without_attention: bool
) -> None:
    """What a rank without requests runs, and what vLLM warms up with."""
    host, _ = install()
    draft = Draft(*LAYOUT, TOKENS)
    proposals(draft)
    width = TOKENS + 1
    batch = InputBatch.make_dummy(CAPTURED + 1, (CAPTURED + 1) * width, draft.buffers, max_query_len=width)
    counts = torch.ones(CAPTURED + 1, dtype=torch.int32)
    state = [torch.zeros(16, dtype=dtype) for dtype in (torch.int64, torch.int32, torch.float32, torch.int64)]
    hidden = torch.zeros((CAPTURED + 1) * width, 128).bfloat16()
    steps: list[None] = []
    run = v2_step.Step.run
    with monkeypatch.context() as patch, set_current_vllm_config(draft.config):
        patch.setattr(v2_step.Step, "run", lambda step: steps.append(run(step)))
        draft.model.record = not without_attention
        metadata, slots = draft.graphs.inputs()
        draft.speculator.propose(
            batch, metadata, slots, hidden, None, counts, counts - 1, *state, dummy_run=True,
            skip_attn_for_dummy_run=without_attention,
        )  # fmt: skip
    assert len(steps) == (0 if without_attention else TOKENS - 1 - FIRST_IS_REBUILT)
    draft.model.record = True
    assert unequal(expected, proposals(draft)) == []
    assert not host.fallbacks and not log(logging.WARNING)


RENAMED = {
    "a field of V2's metadata": (f"{releases.MODULE}.FlashMLASparseMetadata", "req_id_per_token", True),
    "a parameter of V2's speculator": (f"{releases.speculator()}.{v2_step.GENERATE}", "num_reqs", True),
    "a field of V1's batch": ("vllm.v1.attention.backend.CommonAttentionMetadata", "max_seq_len", False),
    "a parameter of V1's proposer": (f"{releases.V1_PROPOSER}.{v1_proposer.BUILD}", "draft_index", False),
}


def with_another_name(found: Any, name: str) -> Any:
    """A dataclass or function of which one field or parameter is called otherwise."""
    if dataclasses.is_dataclass(found):
        fields = [field.name for field in dataclasses.fields(found)]
        return dataclasses.make_dataclass("Renamed", [field for field in fields if field != name] + ["renamed"])
    signature = inspect.signature(found)
    parameters = [part.replace(name="renamed") if part.name == name else part for part in signature.parameters.values()]
    renamed = functools.partial(found)
    renamed.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return renamed


@pytest.mark.parametrize(("path", "name", "v2"), RENAMED.values(), ids=RENAMED)
def test_an_engine_that_was_updated_under_us(
    monkeypatch: pytest.MonkeyPatch, log: Any, path: str, name: str, v2: bool
) -> None:
    """One line names what is missing; the model runner that lacks it keeps all of its methods."""
    owner, _, attribute = path.rpartition(".")
    monkeypatch.setattr(pkgutil.resolve_name(owner), attribute, with_another_name(pkgutil.resolve_name(path), name))
    monkeypatch.setattr(entry, "_hosts", {})
    before = methods()
    entry.register_vllm()
    after = methods()
    for host in entry._hosts.values():
        host.manager.adapters()["vllm"].undo()
    assert after[-1] == before[-1] and (after[:-1] == before[:-1]) == v2
    (line,) = log(logging.WARNING)
    assert path in line and f"found it without {name}; use a release of the engine that has it" in line


@pytest.mark.parametrize("module", [releases.MODULE, releases.speculator().rpartition(".")[0], releases.V1_MODULE])
def test_an_engine_that_can_be_imported_by_half(monkeypatch: pytest.MonkeyPatch, log: Any, module: str) -> None:
    """vLLM sees the error that it would see without the plugin. An import that succeeds later is patched."""
    package, _, name = module.rpartition(".")
    monkeypatch.setattr(importlib.import_module(package), name, sys.modules[module])  # put back after the test
    monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(entry, "_hosts", {})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "vllm.forward_context", None)
        patch.setitem(sys.modules, "vllm.v1.attention.ops.flashmla", None)
        with pytest.raises(ImportError) as stock:
            importlib.import_module(module)
        entry.register_vllm()
        assert module not in sys.modules and importlib.util.find_spec(module) is not None
        with pytest.raises(ImportError) as patched:
            importlib.import_module(module)
    assert str(patched.value) == str(stock.value) and "nsa" not in str(stock.value)
    importlib.import_module(module)
    adapter = entry._hosts["vllm"].manager.adapter("vllm")
    assert isinstance(adapter, VllmAdapter) and not log(logging.WARNING)
    owner = pkgutil.resolve_name(next(owner for owner in OWNERS if owner.startswith(module)))
    with_ours = dict(vars(owner))
    adapter.undo()
    assert any(vars(owner).get(name) is not value for name, value in with_ours.items())


PROCESSES = """
import logging, multiprocessing, os
import torch

torch.set_num_threads(1)
from nsa_plugin.rigs.vllm.drafts import BATCHES
from nsa_plugin.rigs.vllm.v2_draft import Draft


def drafts(fused):
    draft = Draft("auto", 4, 3)
    assert draft.fused == fused
    steps = [step for batch in BATCHES for step in draft.propose(*batch)]
    return [{name: value.tolist() for name, value in step.items()} for step in steps]


def load():
    import vllm.plugins
    lines = []
    logger = logging.getLogger("vllm.plugins.nsa_plugin")
    logger.addFilter(lambda record: lines.append(record.getMessage()) or True)
    for _ in range(2):
        vllm.plugins.plugins_loaded = False
        vllm.plugins.load_general_plugins()
    assert len(lines) == 1 and "FlashMLA-sparse joins the fused multi-step draft" in lines[0], lines


def work(expected, loaded):
    if not loaded:
        load()
    from nsa_plugin import entry
    lines = []
    logging.getLogger("vllm.plugins.nsa_plugin").addFilter(lambda record: lines.append(record.getMessage()) or True)
    assert drafts(True) == expected
    said = sum("FlashMLA-sparse joins the fused multi-step draft" in line for line in lines)
    assert said == int(loaded), "a forked process says it in its own log, once"
    assert list(entry._hosts) == ["vllm"] and not entry._hosts["vllm"].fallbacks


def together(method, expected, count, loaded):
    context = multiprocessing.get_context(method)
    workers = [context.Process(target=work, args=(expected, loaded)) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return [worker.exitcode for worker in workers]


if __name__ == "__main__":
    os.environ["VLLM_PLUGINS"] = ""
    expected = drafts(False)
    del os.environ["VLLM_PLUGINS"]
    codes = together("spawn", expected, 1, False)
    load()
    print(codes + together("fork", expected, 8, True))
"""


@pytest.mark.skipif(
    not any(point.name == "nsa_plugin" for point in entry_points(group="vllm.general_plugins")),
    reason="nsa-plugin is not installed in this environment",
)
def test_worker_processes(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """vLLM loads plugins in each, or more than once in one, or they inherit ours: their drafts are right."""
    script = tmp_path / "workers.py"
    script.write_text(PROCESSES)
    left_out = ("VLLM_PLUGINS", "NSA_PLUGIN_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    clean["PYTHONPATH"] = os.pathsep.join([str(pytestconfig.rootpath), os.environ.get("PYTHONPATH", "")])
    clean["VLLM_LOGGING_LEVEL"] = "INFO"  # the plugin's line is looked for
    done = subprocess.run([sys.executable, str(script)], env=clean, capture_output=True, text=True)
    assert done.stdout.strip().splitlines()[-1:] == [str([0] * 9)], done.stderr[-3000:]


def test_the_doctor_lists_both_model_runners_and_what_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["doctor", "--json"]) == 0
    found = {check["name"]: check["detail"] for check in json.loads(capsys.readouterr().out)["checks"]}
    paths = {name.removeprefix("vllm: "): detail for name, detail in found.items() if name.startswith("vllm: ")}
    left = {
        f"draft decode with {name}": f"left to the engine ({row.left_alone})"
        for row in builders.REBUILT
        for name in row.backends
    }
    left |= {f"draft decode with {builders.FLASHINFER_SPARSE_SM90.backend}": f"left to the engine ({UNPROVED})"}
    for row in (builders.KPOOL_TAIL, builders.FLASHMLA_DENSE):
        assert paths.pop(f"draft decode with {row.backend}").startswith("strategy graph")
    kernels = paths.pop(f"draft decode with {builders.FLASH_ATTN_MLA.backend}")  # compiled: another test may stand in
    assert kernels.startswith(("left to the engine (looked for vllm.v1.attention.backends.mla.flash", "strategy graph"))
    assert paths.pop("launch line").startswith("vllm serve")
    assert paths.pop("draft decode (Model Runner V2)").startswith("strategy graph")
    assert paths.pop(f"{v2_unfused.PATH} (Model Runner V2)").startswith("strategy copy")
    assert paths.pop(v1_proposer.PATH).startswith("strategy copy")
    for path in (v2_target.PATH, v2_target.FIRST_PASS):
        assert paths.pop(f"{path} (Model Runner V2)").startswith("strategy graph")
    assert paths == left


def test_the_doctor_says_what_verification_changes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("NSA_PLUGIN_VERIFY", "1000")
    monkeypatch.setenv("NSA_PLUGIN_REPRO_DIR", str(tmp_path))
    monkeypatch.setattr(checks, "_gpus", lambda: ["H100"])

    def doctor() -> dict[str, str]:
        assert main(["doctor", "--json"]) == 0
        return {check["name"]: check["detail"] for check in json.loads(capsys.readouterr().out)["checks"]}

    path = "vllm: draft decode (Model Runner V2)"
    found = doctor()
    assert found[path].startswith("strategy copy (NSA_PLUGIN_VERIFY: what a CUDA graph computes can't be repaired")
    assert found[f"vllm: {v1_proposer.PATH}"].startswith("strategy copy")
    assert "vllm: NSA_PLUGIN_VERIFY" not in found
    monkeypatch.setattr(releases, "WATCH_NEEDS", (dataclasses.replace(releases.WATCH_NEEDS[0], path="vllm.absent"),))
    assert "NSA_PLUGIN_VERIFY can't be had: looked for vllm.absent" in doctor()[path]
