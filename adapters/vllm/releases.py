"""Everything that this adapter needs of vLLM, in one table."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

from nsa_plugin.adapters.probe import Need

MODULE = "vllm.v1.attention.backends.mla.flashmla_sparse"
BUILDER = f"{MODULE}.FlashMLASparseMetadataBuilder"
BASE = "vllm.v1.attention.backend.AttentionMetadataBuilder"
TESTED = ("0.28.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0")
"""Releases that `make matrix` found faithful; others are used, with a warning, if the probe is clean."""

NEEDS: tuple[Need, ...] = (
    Need(f"{BASE}.supports_draft_decode_metadata_update", (), "say that the fused multi-step draft may be chosen (set)"),
    Need(f"{BASE}.update_draft_decode_metadata", ("metadata",), "what the fused draft records per step (provided)"),
)  # fmt: skip

INDEXER_MODULE = "vllm.v1.attention.backends.mla.indexer"
INDEXER = f"{INDEXER_MODULE}.DeepseekV32IndexerMetadataBuilder"

SPECULATORS = (
    "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator.TargetDependentARSpeculator",
    "vllm.v1.worker.gpu.spec_decode.autoregressive.speculator.AutoRegressiveSpeculator",
)
"""Where the fused draft of Model Runner V2 is; the second, of vLLM 0.28 to 0.31, rebuilds the metadata of its first step."""
UPDATE = "_update_draft_decode_metadata"
"""The first one's method that asks every attention group; the second one's loop does it itself."""


@functools.cache
def speculator() -> str:
    """The one of `SPECULATORS` that the installed vLLM has, else the first. Imports nothing."""
    found = importlib.util.find_spec("vllm")
    folders = [] if found is None else [Path(folder).parent for folder in found.submodule_search_locations or ()]
    for path in SPECULATORS:
        module = path.rpartition(".")[0].replace(".", "/")
        if any((folder / f"{module}.py").exists() for folder in folders):
            return path
    return SPECULATORS[0]


SLOTS = Need(
    "vllm.v1.worker.gpu.block_table.BlockTables.compute_slot_mappings",
    ("idx_mapping", "query_start_loc", "positions", "num_tokens_padded"),
    "put the step's slots off until its metadata is written",
)


def step_needs(speculator: str) -> tuple[Need, ...]:
    """What one kernel per step of a fused draft needs of the speculator at a dotted path."""
    update = Need(
        f"{speculator}.{UPDATE}", ("attn_metadata", "num_reqs"), "write the metadata of a draft step", hooked=True
    )
    return (
        Need(f"{speculator}._generate_fused_drafts", ("num_reqs", "num_tokens_padded", "attn_metadata"),
             "know when a fused draft begins and ends", hooked=True,
             known=("slot_mappings", "num_tokens_across_dp", "cudagraph_runtime_mode", "num_speculative_steps")),
        *((update,) if speculator == SPECULATORS[0] else ()),
        SLOTS,
    )  # fmt: skip


UPDATE_INPUTS = f"{SPECULATORS[0].rpartition('.')[0]}.update_draft_inputs"
WATCH_NEEDS: tuple[Need, ...] = (
    Need(f"{SPECULATORS[0]}._fused_multi_step_decode",
         ("num_reqs", "skip_attn", "batch_desc", "num_tokens_across_dp", "seq_lens_cpu_upper_bound", "num_speculative_steps"),
         "see a draft begin"),
    Need(f"{SPECULATORS[0]}.advance_draft_positions", (), "know that positions move on from step to step"),
    Need(f"{SPECULATORS[0]}._build_uniform_attn_metadata",
         ("batch_desc", "num_reqs", "num_query_per_req", "seq_lens_cpu_upper_bound", "step"), "rebuild a step's metadata"),
    Need(UPDATE_INPUTS,
         ("draft_tokens", "current_draft_step", "hidden_states", "output_draft_tokens", "next_input_hidden_states",
          "input_buffers", "sample_src_positions", "num_reqs", "max_model_len", "num_speculative_steps"),
         "move a rebuild on from step to step"),
)  # fmt: skip
"""What it takes to verify and measure Model Runner V2's drafts; without it they are served all the same."""


def groups_of(speculator: Any) -> list[Any]:
    """The attention groups of a draft, of all its KV-cache groups."""
    return [group for same_cache in speculator.attn_groups for group in same_cache]


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


V1_MODULE = "vllm.v1.spec_decode.llm_base_proposer"
V1_PROPOSER = f"{V1_MODULE}.SpecDecodeBaseProposer"
V1_NEEDS: tuple[Need, ...] = (
    Need(f"{V1_PROPOSER}._update_positions_dependent_metadata",
         ("positions", "common_attn_metadata", "batch_size", "input_batch_size", "block_size"),
         "compute the positions of all draft steps at the first", hooked=True),
    Need(f"{V1_PROPOSER}.build_per_group_and_layer_attn_metadata", ("common_attn_metadata", "draft_index"),
         "keep metadata from step to step", hooked=True),
    Need("vllm.v1.attention.backend.CommonAttentionMetadata",
         ("seq_lens", "seq_lens_cpu_upper_bound", "max_seq_len", "slot_mapping", "block_table_tensor", "num_reqs",
          "num_actual_tokens", "max_logits_per_req", "_token_to_req_indices_cache", "_num_computed_tokens_cache"),
         "the batch that draft steps move on"),
    Need("vllm.v1.attention.backend.AttentionMetadataBuilder.build_for_drafting", ("common_attn_metadata", "draft_index"),
         "build the metadata of a group"),
    Need("vllm.v1.spec_decode.utils.PADDING_SLOT_ID", (), "the slot of tokens that are not stored"),
)  # fmt: skip
"""What Model Runner V1's draft needs; what keeping one builder's metadata needs is in its row of `builders`."""
