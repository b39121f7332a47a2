"""What is timed in sglang's scheduler process: rounds, drafts, and the preparation of metadata."""

from __future__ import annotations

from host_times import from_first_call

BACKEND = "sglang.srt.layers.attention.dsa_backend"
TARGETS = (
    (f"{BACKEND}.DeepseekSparseAttnMultiStepBackend", "init_forward_metadata_out_graph", "draft metadata"),
    (f"{BACKEND}.DeepseekSparseAttnBackend", "init_forward_metadata_out_graph", "verify and extend metadata"),
    ("sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker", "draft", "draft"),
    ("sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker", "_draft_extend_for_decode", "extend"),
    ("sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2", "verify", "verify"),
)


def register() -> None:
    """Entry point of `sglang.srt.plugins`."""
    from_first_call("sglang.srt.managers.scheduler", "Scheduler", "run_batch", TARGETS)
