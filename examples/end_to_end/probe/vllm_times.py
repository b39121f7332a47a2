"""What is timed in vLLM's worker: rounds, drafts, and the preparation of metadata (Model Runner V2)."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from host_times import measure, write_when_idle

WORKER = "vllm.v1.worker.gpu.model_runner"
SPECULATOR = "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator.TargetDependentARSpeculator"
TARGETS = (
    ("vllm.v1.worker.gpu.model_states.default.DefaultModelState", "prepare_attn", "verify metadata"),
    (SPECULATOR, "_build_attn_metadata", "draft metadata"),
    (SPECULATOR, "_multi_step_decode", "draft steps, rebuilt"),
    (SPECULATOR, "_fused_multi_step_decode", "draft steps, fused"),
    (SPECULATOR, "propose", "draft"),
    ("vllm.v1.worker.gpu.block_table.BlockTables", "compute_slot_mappings", "slot mappings"),
    ("vllm.v1.worker.gpu.cudagraph_utils.CudaGraphManager", "run_fullgraph", "graph launch"),
    (f"{WORKER}.GPUModelRunner", "sample_tokens", "sample and draft"),
)


def register() -> None:
    """Entry point of `vllm.general_plugins`: time things as soon as the first batch runs, when all plugins are in place."""
    if "E2E_TIMES" not in os.environ:
        return
    if WORKER in sys.modules:
        _watch(sys.modules[WORKER])
    elif not any(isinstance(finder, _WhenWorkerIsImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenWorkerIsImported())


def _watch(module: ModuleType) -> None:
    runner: Any = module.GPUModelRunner
    execute_model = runner.execute_model

    def first(*arguments: Any, **named: Any) -> Any:
        runner.execute_model = execute_model
        for owner, method, name in TARGETS:
            measure(pkgutil.resolve_name(owner), method, name)
        measure(runner, "execute_model", "round")
        write_when_idle()
        return runner.execute_model(*arguments, **named)

    runner.execute_model = first


class _WhenWorkerIsImported(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != WORKER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute: Any = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _watch(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
