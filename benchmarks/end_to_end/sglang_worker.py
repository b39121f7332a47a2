"""One complete sglang engine, served over JSON lines; see `run.py`, which starts it.

`E2E_CONFIG` (environment, JSON): model (folder), steps (speculative_num_steps), max_batch_size, max_tokens (KV cache),
tp (tensor parallel ranks), dp_attention (whether these share requests, not heads), port, arguments (of the engine, over
those given here).

Ranks reduce with NCCL alone: the engine's own kernels for that may use NVLink multicast, which not every machine allows.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from serving import captured_sizes, serve
from trace_summary import summarise

PROFILED_ROUNDS = 15


def arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Of `Engine`: random weights, NEXTN with a chain of `steps` drafts, CUDA graphs, fp8 cache, no radix cache."""
    return {
        "model_path": config["model"], "load_format": "dummy", "skip_tokenizer_init": True, "random_seed": 1,
        "tp_size": config["tp"], "attn_dp_size": config["tp"] if config["dp_attention"] else 1,
        "disable_custom_all_reduce": True, "enforce_disable_flashinfer_allreduce_fusion": True,
        "speculative_algorithm": "NEXTN", "speculative_num_steps": config["steps"], "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": config["steps"] + 1, "kv_cache_dtype": "fp8_e4m3",
        "max_running_requests": config["max_batch_size"],
        "cuda_graph_bs_decode": captured_sizes(config["max_batch_size"]), "disable_prefill_cuda_graph": True,
        "chunked_prefill_size": 8192, "max_total_tokens": config["max_tokens"], "mem_fraction_static": 0.88,
        "disable_radix_cache": True, "sampling_backend": "pytorch", "grammar_backend": "none", "sleep_on_idle": True,
        "watchdog_timeout": 600, "log_level": "info", "decode_log_interval": 1000, "port": config["port"],
        **config["arguments"],
    }  # fmt: skip


def engine(config: dict[str, Any]) -> Any:
    """The engine, served without its HTTP server."""
    from sglang.srt.entrypoints.engine import Engine

    return Engine(**arguments(config))


def generate(served: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens of a batch of prompts, and when the call started and ended (perf_counter, seconds)."""
    start = time.perf_counter()
    answers = served.generate(
        input_ids=request["prompts"],
        sampling_params={"temperature": 0, "max_new_tokens": request["max_new_tokens"], "ignore_eos": True},
    )
    end = time.perf_counter()
    return {
        "start": start,
        "end": end,
        "tokens": [answer["output_ids"] for answer in answers],
        "rounds": [answer["meta_info"].get("spec_verify_ct") for answer in answers],
    }


def profile(served: Any, request: dict[str, Any]) -> dict[str, Any]:
    """What torch's profiler sees of the scheduler process in some rounds of decoding."""
    folder = Path(request["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    served.start_profile(
        output_dir=str(folder), num_steps=1 + PROFILED_ROUNDS,  # the first reads the prompt
        activities=["CPU", "GPU"], with_stack=False, record_shapes=False,
    )  # fmt: skip
    generate(served, request)
    for _ in range(40):
        if found := list(folder.rglob("*.json.gz")):
            time.sleep(1)
            return summarise(found[0]) | {"rounds": PROFILED_ROUNDS}
        time.sleep(0.5)
    return {"error": f"no trace in {folder}"}


if __name__ == "__main__":
    serve(engine, {"generate": generate, "profile": profile}, lambda served: served.shutdown())
