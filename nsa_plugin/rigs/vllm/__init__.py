"""vLLM's real drafts without a worker.

`drafts` has what both model runners are tried with, `stand_ins` what a CPU lacks. `v1_draft` and `v2_draft` are the drafts,
`v2_replay` those whose CUDA graph is really captured, `v1_engine` and `v2_engine` what the conformance kit sees of them.
"""
