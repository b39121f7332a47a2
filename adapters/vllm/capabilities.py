"""Everything that this adapter needs of vLLM, in one table."""

from __future__ import annotations

from nsa_plugin.adapters.probe import Need

MODULE = "vllm.v1.attention.backends.mla.flashmla_sparse"
BUILDER = f"{MODULE}.FlashMLASparseMetadataBuilder"
BASE = "vllm.v1.attention.backend.AttentionMetadataBuilder"
TESTED = ("0.32.0", "0.33.0")
"""Releases that `make matrix` found faithful; others are used, with a warning, if the probe is clean."""

NEEDS: tuple[Need, ...] = (
    Need(f"{BASE}.supports_draft_decode_metadata_update", (), "say that the fused multi-step draft may be chosen (set)"),
    Need(f"{BASE}.update_draft_decode_metadata", ("metadata",), "what the fused draft records per step (provided)"),
    Need(f"{BUILDER}.__init__", ("kv_cache_spec", "layer_names", "vllm_config", "device"), "decide per builder (hooked)"),
    Need(f"{MODULE}.FlashMLASparseMetadata", ("req_id_per_token", "query_start_loc", "num_decode_tokens"),
         "the request map, all that is the builder's own and depends on the batch"),
    Need("vllm.v1.attention.ops.metadata.compute_token_to_req_indices",
         ("query_start_loc", "out", "num_mapped_tokens", "num_tokens"), "compute the request map on the device"),
)  # fmt: skip
