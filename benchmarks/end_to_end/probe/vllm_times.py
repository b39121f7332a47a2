"""What is timed in vLLM's worker: rounds, drafts, and the preparation of metadata (Model Runner V2).

Not `BlockTables.compute_slot_mappings`: where somebody else patched that, the plugin leaves the draft's steps to vLLM.
"""

from __future__ import annotations

from host_times import from_first_call

WORKER = "vllm.v1.worker.gpu.model_runner"
SPECULATOR = "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator.TargetDependentARSpeculator"
TARGETS = (
    ("vllm.v1.worker.gpu.model_states.default.DefaultModelState", "prepare_attn", "verify metadata"),
    (SPECULATOR, "_build_attn_metadata", "draft metadata"),
    (SPECULATOR, "_multi_step_decode", "draft steps, rebuilt"),
    (SPECULATOR, "_fused_multi_step_decode", "draft steps, fused"),
    (SPECULATOR, "propose", "draft"),
    ("vllm.v1.worker.gpu.cudagraph_utils.CudaGraphManager", "run_fullgraph", "graph launch"),
    ("vllm.v1.worker.gpu.cudagraph_utils.ModelCudaGraphManager", "run_fullgraph", "verify graph"),
    (f"{WORKER}.GPUModelRunner", "sample_tokens", "sample and draft"),
)


def register() -> None:
    """Entry point of `vllm.general_plugins`."""
    from_first_call(WORKER, "GPUModelRunner", "execute_model", TARGETS)
