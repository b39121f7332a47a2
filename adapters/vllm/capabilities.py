"""Everything that this adapter needs of vLLM, in one table."""

from __future__ import annotations

import dataclasses
import pkgutil
from typing import Any, Literal

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

SPECULATOR_MODULE = "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator"
SPECULATOR = f"{SPECULATOR_MODULE}.TargetDependentARSpeculator"
INDEXER_MODULE = "vllm.v1.attention.backends.mla.indexer"
INDEXER = f"{INDEXER_MODULE}.DeepseekV32IndexerMetadataBuilder"

STEP_NEEDS: tuple[Need, ...] = (
    Need(f"{SPECULATOR}._generate_fused_drafts", ("num_reqs", "num_tokens_padded", "attn_metadata"),
         "know when a fused draft begins and ends (hooked)"),
    Need(f"{SPECULATOR}._update_draft_decode_metadata", ("attn_metadata", "num_reqs"),
         "write the metadata of a draft step (hooked)"),
    Need("vllm.v1.worker.gpu.block_table.BlockTables.compute_slot_mappings",
         ("idx_mapping", "query_start_loc", "positions", "num_tokens_padded"), "put the step's slots off until then"),
    Need(f"{INDEXER}.update_draft_decode_metadata", ("metadata",), "the indexer's update that the kernel stands for"),
    Need(f"{INDEXER_MODULE}.get_paged_mqa_logits_metadata", ("context_lens", "block_size", "num_sms", "indices"),
         "DeepGEMM's schedule, which stays a call of its own"),
)  # fmt: skip

WATCH_NEEDS: tuple[Need, ...] = (
    Need(f"{SPECULATOR}._fused_multi_step_decode",
         ("num_reqs", "skip_attn", "batch_desc", "num_tokens_across_dp", "seq_lens_cpu_upper_bound", "num_speculative_steps"),
         "see a draft begin (hooked)"),
    Need(f"{SPECULATOR}.advance_draft_positions", (), "know that positions move on from step to step"),
    Need(f"{SPECULATOR}._build_uniform_attn_metadata",
         ("batch_desc", "num_reqs", "num_query_per_req", "seq_lens_cpu_upper_bound", "step"), "rebuild a step's metadata"),
    Need(f"{SPECULATOR_MODULE}.update_draft_inputs",
         ("draft_tokens", "current_draft_step", "hidden_states", "output_draft_tokens", "next_input_hidden_states",
          "input_buffers", "sample_src_positions", "num_reqs", "max_model_len", "num_speculative_steps"),
         "move a rebuild on from step to step"),
)  # fmt: skip
"""What it takes to verify and measure Model Runner V2's drafts; without it they are served all the same."""

INDEXER_FIELDS = frozenset(
    ("block_table", "seq_lens", "decode_lens", "requires_padding", "schedule_metadata", "global_seq_lens",
     "per_req_decode_lens", "decode_is_uniform", "write_max_decode_len", "indices")
)  # fmt: skip
"""Fields of the indexer's decode metadata that are understood: with any other its own update runs."""

_SCHEDULED = "its decode metadata holds a schedule of its own kernels, which has not been shown right in place"
_STATES = "state-space metadata, not examined"
_OTHER_DEVICE = "not for the NVIDIA GPUs that this adapter is tested for, not examined"
_UNEXAMINED = "not examined: no draft with it has been replayed"
LACKING_HOOK: tuple[tuple[str, str], ...] = (
    ("FLASHMLA", _SCHEDULED), ("FLASH_ATTN_MLA", _SCHEDULED), ("FLASHINFER_MLA", _UNEXAMINED), ("CUTLASS_MLA", _UNEXAMINED),
    ("TOKENSPEED_MLA", _UNEXAMINED), ("B12X", _UNEXAMINED), ("HPC_ATTN", _UNEXAMINED), ("TURBOQUANT", _UNEXAMINED),
    ("FLEX_ATTENTION", _UNEXAMINED), ("LINEAR_ATTN", _STATES), ("BAILING_LINEAR_ATTN", _STATES), ("GDN_ATTN", _STATES),
    ("MAMBA1_ATTN", _STATES), ("MAMBA2_ATTN", _STATES), ("SHORT_CONV_ATTN", _STATES), ("PLE_SHORT_CONV_ATTN", _STATES),
    ("CPU_ATTN", _OTHER_DEVICE), ("AMX_MLA", _OTHER_DEVICE), ("XPU_MLA_SPARSE", _OTHER_DEVICE),
    ("ROCM_ATTN", _OTHER_DEVICE), ("ROCM_AITER_UNIFIED_ATTN", _OTHER_DEVICE), ("ROCM_SEGMENTED_ATTN", _OTHER_DEVICE),
    ("ROCM_AITER_MLA", _OTHER_DEVICE), ("ROCM_AITER_MLA_SPARSE", _OTHER_DEVICE),
)  # fmt: skip
"""Backends of 0.33.0 without an update in place to which this adapter gives none, and why: vLLM rebuilds their metadata for
each draft step. `FLASHMLA_SPARSE` gets one, unless `adapter.unsupported` names what is not covered."""


def uncovered_builder(builder: Any) -> str:
    """Empty, or which parallelism of a metadata builder is not covered."""
    for name, meaning in (
        ("dcp_world_size", "decode context parallelism"),
        ("pcp_world_size", "prefill context parallelism"),
    ):
        if getattr(builder, name, 1) > 1:
            return f"{meaning} is not covered"
    return ""


def uncovered_speculator(speculator: Any) -> str:
    """Empty, or why the step of a fused draft is left to vLLM."""
    tables = speculator.block_tables
    if tables.cp_size > 1 or getattr(speculator, "pcp_manager", None) is not None:
        return "context parallelism is not covered"
    return not_vllms(type(tables).compute_slot_mappings)


def not_vllms(function: Any) -> str:
    """Empty, or that a method which would be left out is not vLLM's own: whatever it does must go on."""
    written_in = getattr(function, "__globals__", {}).get("__name__", repr(function))
    if written_in.partition(".")[0] == "vllm":
        return ""
    return f"{getattr(function, '__qualname__', function)} was patched by {written_in}"


def kind_of_group(builder: Any, metadata: Any, num_reqs: int) -> Literal["request map", "indexer", "other"]:
    """Whether the update of an attention group in a draft step is understood, judged by whose method it is.

    `metadata` is what the group's builder made for `num_reqs` requests of one token each.
    """
    update = getattr(type(builder), "update_draft_decode_metadata", None)
    rows = getattr(metadata, "num_decode_tokens", None)
    if rows != num_reqs:
        return "other"
    if update is not None and getattr(update, "only_the_request_map", None) is update:
        return "request map"
    if update is not pkgutil.resolve_name(INDEXER).update_draft_decode_metadata:
        return "other"
    decode = metadata.decode
    fits = (
        builder.dcp_world_size == 1
        and builder.compress_ratio == 1
        and metadata.num_prefills == 0
        and metadata.num_decodes == num_reqs
        and decode is not None
        and frozenset(field.name for field in dataclasses.fields(decode)) <= INDEXER_FIELDS
        and decode.seq_lens.numel() == num_reqs
        and metadata.block_table is not None
    )
    return "indexer" if fits else "other"


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
