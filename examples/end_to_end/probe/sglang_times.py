"""What is timed in sglang's scheduler process: rounds, drafts, and the preparation of metadata."""

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

SCHEDULER = "sglang.srt.managers.scheduler"
BACKEND = "sglang.srt.layers.attention.dsa_backend"
TARGETS = (
    (f"{BACKEND}.DeepseekSparseAttnMultiStepBackend", "init_forward_metadata_out_graph", "draft metadata"),
    (f"{BACKEND}.DeepseekSparseAttnBackend", "init_forward_metadata_out_graph", "verify and extend metadata"),
    ("sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker", "draft", "draft"),
    ("sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker", "_draft_extend_for_decode", "extend"),
    ("sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2", "verify", "verify"),
)


def register() -> None:
    """Entry point of `sglang.srt.plugins`: time things as soon as the first batch runs, when all plugins are in place."""
    if "E2E_TIMES" in os.environ:
        sys.meta_path.insert(0, _WhenSchedulerIsImported())
        if SCHEDULER in sys.modules:
            _watch(sys.modules[SCHEDULER])


def _watch(module: ModuleType) -> None:
    scheduler: Any = module.Scheduler  # type: ignore[attr-defined]
    run_batch = scheduler.run_batch

    def first(*arguments: Any, **named: Any) -> Any:
        scheduler.run_batch = run_batch
        for owner, method, name in TARGETS:
            measure(pkgutil.resolve_name(owner), method, name)
        measure(scheduler, "run_batch", "round")
        write_when_idle()
        return scheduler.run_batch(*arguments, **named)

    scheduler.run_batch = first


class _WhenSchedulerIsImported(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != SCHEDULER:
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
