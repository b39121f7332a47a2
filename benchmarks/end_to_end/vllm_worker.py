"""One complete vLLM engine, served over JSON lines; see `run.py`, which starts it.

`E2E_CONFIG` (environment, JSON): model (folder), steps (num_speculative_tokens), max_batch_size, max_tokens (KV cache),
tp (tensor parallel ranks), arguments (of the engine, over those given here).

The engine core runs in this process: all requests of a batch are queued before the first step, so that every run
schedules the same batches, and the profiler sees the work (not with tp above 1, which takes a process per rank). Ranks
reduce with NCCL alone, without NVLink multicast. Needs no FlashInfer, no flash-attention and no network.
"""

from __future__ import annotations

import gzip
import os
import shutil
import time
from pathlib import Path
from typing import Any

from serving import captured_sizes, serve
from trace_summary import summarise

BLOCK = 64
"""Tokens per block of the KV cache, as FLASHMLA_SPARSE asks for."""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
}


def capture_sizes(steps: int, max_batch_size: int) -> list[int]:
    """Numbers of tokens with a captured graph: one per request for a draft step, steps + 1 for a verify round."""
    batches = captured_sizes(max_batch_size)
    return sorted({*batches, *(batch * (steps + 1) for batch in batches)})


def arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Of `vllm.LLM`: random weights, MTP with `steps` drafts, graphs for decode, fp8 cache, no prefix cache.

    The cache has a fixed number of blocks and nothing is profiled, so that engines can start side by side.
    """
    steps, blocks = config["steps"], -(-config["max_tokens"] // BLOCK) + 1  # vLLM keeps one
    return {
        "model": config["model"], "load_format": "dummy", "skip_tokenizer_init": True, "seed": 1, "dtype": "bfloat16",
        "tensor_parallel_size": config["tp"], "disable_custom_all_reduce": True,
        "max_model_len": min(config["max_tokens"], 32768),
        "max_num_seqs": config["max_batch_size"], "max_num_batched_tokens": 8192,
        "kv_cache_dtype": "fp8_ds_mla", "block_size": BLOCK, "enable_prefix_caching": False,
        "num_gpu_blocks_override": blocks, "kv_cache_memory_bytes": 4 << 30, "gpu_memory_utilization": 0.05,
        "attention_config": {"backend": "FLASHMLA_SPARSE", "sparse_mla_force_mqa": True},
        "speculative_config": {"method": "mtp", "num_speculative_tokens": steps},
        "compilation_config": {
            "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": capture_sizes(steps, config["max_batch_size"]),
        },
        "disable_log_stats": True, "per_request_spec_decode_metrics": "summary", **config["arguments"],
    }  # fmt: skip


def generate(served: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens of a batch of prompts, and when the call started and ended (perf_counter, seconds)."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=request["max_new_tokens"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": tokens} for tokens in request["prompts"]]
    start = time.perf_counter()
    answers = served.generate(prompts, greedy, use_tqdm=False)
    end = time.perf_counter()
    outputs = [answer.outputs[0] for answer in answers]
    counts = [output.spec_decode_metrics for output in outputs]
    return {
        "start": start,
        "end": end,
        "tokens": [list(output.token_ids) for output in outputs],
        "rounds": [None if count is None else sum(count.histogram) for count in counts],
    }


def profile(served: Any, request: dict[str, Any]) -> dict[str, Any]:
    """What torch's profiler sees while a batch is generated, and in how many rounds."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    folder = Path(request["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        answer = generate(served, request)
    plain = folder / "trace.json"
    seen.export_chrome_trace(str(plain))
    with plain.open("rb") as source, gzip.open(f"{plain}.gz", "wb", compresslevel=1) as target:
        shutil.copyfileobj(source, target)
    plain.unlink()
    return summarise(Path(f"{plain}.gz")) | {"rounds": max(count or 0 for count in answer["rounds"])}


def engine(config: dict[str, Any]) -> Any:
    """The engine, its logging configured first: `LLM` does so only after it has loaded the plugins, and loses their lines."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import LLM
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging_if_needed

    configure_logging_if_needed(LoggingConfig())
    return LLM(**arguments(config))


if __name__ == "__main__":
    serve(engine, {"generate": generate, "profile": profile}, lambda served: served.llm_engine.engine_core.shutdown())
