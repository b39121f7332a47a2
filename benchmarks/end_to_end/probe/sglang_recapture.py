"""sglang's scheduler process captures its decode graphs anew, as after a weight update, as often as a file asks for."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any


def register() -> None:
    """Entry point of `sglang.srt.plugins`; does nothing without `E2E_TIMES`."""
    if "E2E_TIMES" not in os.environ:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.run_batch", run_batch, HookType.AROUND)


def run_batch(original: Any, scheduler: Any, *arguments: Any, **named: Any) -> Any:
    """Before a batch: if the file "recapture" is there, capture so many times; write what torch holds after each."""
    asked = Path(os.environ["E2E_TIMES"]) / "recapture"
    if asked.exists():
        times = int(asked.read_text())
        asked.unlink()
        held = [_recapture(scheduler.tp_worker.model_runner) for _ in range(times)]
        asked.with_name("recaptured.json").write_text(json.dumps(held))
    return original(scheduler, *arguments, **named)


def _recapture(runner: Any) -> int:
    import torch

    torch.cuda.synchronize()
    runner.recapture_decode_cuda_graph()
    torch.cuda.synchronize()
    gc.collect()
    return torch.cuda.memory_allocated()
