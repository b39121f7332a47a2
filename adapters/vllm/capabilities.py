"""Everything that this adapter needs of vLLM, in one table."""

from __future__ import annotations

from nsa_plugin.adapters.probe import Need

MODULE = "vllm.v1.attention.backends.mla.flashmla_sparse"
BUILDER = f"{MODULE}.FlashMLASparseMetadataBuilder"
BASE = "vllm.v1.attention.backend.AttentionMetadataBuilder"
TESTED = ("0.32.0", "0.33.0")
"""Releases against which the conformance tests run; others are used, with a warning, if the probe is clean."""

NEEDS: tuple[Need, ...] = (
    Need(f"{BASE}.supports_draft_decode_metadata_update", (), "say that the fused multi-step draft may be chosen (set)"),
    Need(f"{BASE}.update_draft_decode_metadata", ("metadata",), "what the fused draft records per step (provided)"),
    Need(f"{BUILDER}.__init__", ("kv_cache_spec", "layer_names", "vllm_config", "device"), "decide per builder (hooked)"),
    Need(f"{MODULE}.FlashMLASparseMetadata", ("req_id_per_token", "query_start_loc", "num_decode_tokens"),
         "the request map, all that is the builder's own and depends on the batch"),
    Need("vllm.v1.attention.ops.metadata.compute_token_to_req_indices",
         ("query_start_loc", "out", "num_mapped_tokens", "num_tokens"), "compute the request map on the device"),
)  # fmt: skip

V1_MODULE = "vllm.v1.spec_decode.llm_base_proposer"
V1_PROPOSER = f"{V1_MODULE}.SpecDecodeBaseProposer"
V1_NEEDS: tuple[Need, ...] = (
    Need(f"{V1_PROPOSER}._update_positions_dependent_metadata",
         ("positions", "common_attn_metadata", "batch_size", "input_batch_size", "block_size"),
         "compute the positions of all draft steps at the first (replaced)"),
    Need(f"{V1_PROPOSER}.build_per_group_and_layer_attn_metadata", ("common_attn_metadata", "draft_index"),
         "keep metadata from step to step (replaced)"),
    Need("vllm.v1.attention.backend.CommonAttentionMetadata",
         ("seq_lens", "seq_lens_cpu_upper_bound", "max_seq_len", "slot_mapping", "block_table_tensor", "num_reqs",
          "num_actual_tokens", "max_logits_per_req", "_token_to_req_indices_cache", "_num_computed_tokens_cache"),
         "the batch that draft steps move on"),
    Need("vllm.v1.worker.utils.AttentionGroup.build_metadata_for_drafting", ("common_attn_metadata", "draft_index"),
         "build the metadata of a group"),
    Need("vllm.v1.spec_decode.utils.PADDING_SLOT_ID", (), "the slot of tokens that are not stored"),
)  # fmt: skip
"""What Model Runner V1's draft needs; what keeping one builder's metadata needs is in `v1_metadata.KEPT`."""
