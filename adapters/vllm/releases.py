"""Runs at start and at capture: what the adapter needs of vLLM, and what vLLM's releases do differently.

Whatever some releases do in another way is a function or a table here. "X goes with N" marks the older way, X, and the
last release that needs it, N. To drop a release, search for its number and take the older ways out. The rest of the adapter
asks here, and asks no object of vLLM's what it has.
"""

from __future__ import annotations

import functools
import importlib.util
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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
"""Where the fused draft of Model Runner V2 is. The second, which rebuilds the metadata of its first step, goes with 0.31."""
UPDATE_STEP = "_update_draft_decode_metadata"
"""The first one's method that asks every attention group. The second one's loop asks them itself: see `asks_groups`."""
FUSED_UPDATE = Need(
    f"{SPECULATORS[0]}.{UPDATE_STEP}",
    ("attn_metadata", "num_reqs"),
    "a fused draft whose first step is updated, too (0.32)",
)
"""What rows take that were tried from vLLM 0.32 on only."""
CHOOSE = {SPECULATORS[0]: "_configure_decode_metadata_update", SPECULATORS[1]: "_configure_fused_multi_step_decode"}
"""By speculator, its method that chooses the fused draft. The second goes with 0.31."""
BUILDS = ("_build_uniform_attn_metadata", "_build_draft_attn_metadata")
"""A speculator's method that builds the metadata of a step. The second goes with 0.28."""


@functools.cache
def speculator() -> str:
    """The one of `SPECULATORS` that the installed vLLM has, else the first. Imports nothing. The choice goes with 0.31."""
    found = importlib.util.find_spec("vllm")
    folders = [] if found is None else [Path(folder).parent for folder in found.submodule_search_locations or ()]
    for path in SPECULATORS:
        module = path.rpartition(".")[0].replace(".", "/")
        if any((folder / f"{module}.py").exists() for folder in folders):
            return path
    return SPECULATORS[0]


def has_update(speculator: str) -> bool:
    """Whether the speculator at a dotted path has `UPDATE_STEP`. That it may not goes with 0.31."""
    return speculator == SPECULATORS[0]


def asks_groups(owner: type) -> bool:
    """Whether the loop of a speculator asks every attention group itself, without `UPDATE_STEP`. That goes with 0.31."""
    return not hasattr(owner, UPDATE_STEP)


class EveryGroup:
    """Stands for all attention groups of a speculator whose loop asks each of them itself. It goes with 0.31."""

    def __init__(self, groups: Any, update: Callable[..., None]) -> None:
        self.groups, self.update_draft_decode_metadata = groups, update


def update_groups(speculator: Any, attn_metadata: Any, num_reqs: int, groups: Any, *args: Any, **kwargs: Any) -> None:
    """What a loop that asks every attention group does for the metadata of a step. It goes with 0.31."""
    for group in (group for same_cache in groups for group in same_cache):
        group.update_draft_decode_metadata(attn_metadata, *args, **kwargs)


def builds(speculator: Any) -> str:
    """The one of `BUILDS` that a speculator has. The choice goes with 0.28."""
    return next(name for name in BUILDS if hasattr(speculator, name))


def captured_steps(speculator: Any, batch_desc: Any) -> int:
    """Draft tokens that the graph of a size was captured with. The same for all graphs: that goes with 0.32."""
    return getattr(batch_desc, "num_speculative_tokens", 0) or int(speculator.num_speculative_steps)


def vllms_request_map() -> Callable[[torch.Tensor, torch.Tensor, int], None] | None:
    """vLLM's own kernel for the request map, called with `query_start_loc`, `out` and the number of tokens.

    None where vLLM computes the map on the host: that goes with 0.31.
    """
    try:
        compute = pkgutil.resolve_name("vllm.v1.attention.ops.metadata.compute_token_to_req_indices")
    except (ImportError, AttributeError):
        return None
    return lambda query_start_loc, out, tokens: compute(query_start_loc, out, tokens, tokens)


def slot_block_sizes(tables: Any) -> torch.Tensor:
    """Tokens per block of each KV-cache group of `BlockTables`. A tensor of kernel blocks beside it goes with 0.31."""
    sizes: torch.Tensor = getattr(tables, "kernel_block_sizes_tensor", tables.block_sizes_tensor)
    return sizes


def slots_enabled(tables: Any) -> torch.Tensor:
    """Which KV-cache groups of `BlockTables` have slots: bool [groups]. That all of them do goes with 0.28."""
    enabled: torch.Tensor | None = getattr(tables, "slot_mapping_enabled", None)
    return torch.ones_like(tables.block_sizes_tensor, dtype=torch.bool) if enabled is None else enabled


def ones_of(decode: Any) -> tuple[str, ...]:
    """Fields of the indexer's decode metadata that hold the query length of each request. A single one goes with 0.28."""
    names = ("decode_lens", "per_req_decode_lens")
    return tuple(name for name in names if getattr(decode, name, None) is not None)


def indexer_table(metadata: Any) -> torch.Tensor:
    """The block table that the indexer's rows are made of.

    Metadata without that field, of which the rebuild of a draft's first step has copied the rows, goes with 0.31.
    """
    table: torch.Tensor = getattr(metadata, "block_table", metadata.decode.block_table)
    return table


def states_per_block(spec: Any) -> int:
    """Entries of an indexer's KV-cache block, as DeepGEMM counts them. The name `storage_block_size` goes with 0.28."""
    return int(spec.num_states if hasattr(spec, "num_states") else spec.storage_block_size)


def tokens_per_state(builder: Any) -> int:
    """Tokens that an entry of an indexer's cache stands for; more than one where keys are pooled. No such number goes with 0.28."""
    return int(getattr(builder, "compress_ratio", 1))


def build_group(group: Any, batch: Any, draft_index: int) -> Any:
    """What vLLM itself builds for an attention group in a draft step. Asking the builder, not the group, goes with 0.31."""
    if hasattr(group, "build_metadata_for_drafting"):
        return group.build_metadata_for_drafting(common_attn_metadata=batch, draft_index=draft_index)
    return group.get_metadata_builder().build_for_drafting(common_attn_metadata=batch, draft_index=draft_index)


def maps_blocks(group: Any) -> bool:
    """Whether an attention group maps its block table to kernel blocks at every build. A group that can't goes with 0.31."""
    return getattr(group, "kernel_block_size", None) is not None


def table_block_size(group: Any) -> int:
    """Tokens per entry of the block table that an attention group's builder gets."""
    return int(group.kernel_block_size if maps_blocks(group) else group.get_metadata_builder().kv_cache_spec.block_size)


def mapped_table(group: Any) -> torch.Tensor | None:
    """Where an attention group maps its block table to; None if it does not. A group that can't goes with 0.31."""
    table: torch.Tensor | None = getattr(group, "kernel_block_table", None)
    return table


SLOTS = Need(
    "vllm.v1.worker.gpu.block_table.BlockTables.compute_slot_mappings",
    ("idx_mapping", "query_start_loc", "positions", "num_tokens_padded"),
    "put the step's slots off until its metadata is written",
)


def step_needs(speculator: str) -> tuple[Need, ...]:
    """What one kernel per step of a fused draft needs of the speculator at a dotted path."""
    update = Need(
        f"{speculator}.{UPDATE_STEP}", ("attn_metadata", "num_reqs"), "write the metadata of a draft step", hooked=True
    )
    return (
        Need(f"{speculator}._generate_fused_drafts", ("num_reqs", "num_tokens_padded", "attn_metadata"),
             "know when a fused draft begins and ends", hooked=True,
             known=("slot_mappings", "num_tokens_across_dp", "cudagraph_runtime_mode", "num_speculative_steps")),
        *((update,) if has_update(speculator) else ()),
        SLOTS,
    )  # fmt: skip


FUSED_DRAFT = Need(
    f"{SPECULATORS[0]}._fused_multi_step_decode",
    ("num_reqs", "skip_attn", "batch_desc", "num_tokens_across_dp", "seq_lens_cpu_upper_bound", "num_speculative_steps"),
    "see a draft begin",
)  # fmt: skip
UPDATE_INPUTS = f"{SPECULATORS[0].rpartition('.')[0]}.update_draft_inputs"
GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils.CudaGraphManager"
WATCH_NEEDS: tuple[Need, ...] = (
    FUSED_DRAFT,
    Need(GRAPHS, (), "leave graphs out of what is kept"),
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
    """The attention groups of a draft, of all its KV-cache groups, whether or not `EveryGroup` stands for them now."""
    found = [group for same_cache in speculator.attn_groups for group in same_cache]
    if found and isinstance(found[0], EveryGroup):
        return [group for same_cache in found[0].groups for group in same_cache]
    return found


def uncovered_speculator(speculator: Any) -> str:
    """Empty, or why the step of a fused draft is left to vLLM. A speculator without `pcp_manager` goes with 0.28."""
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
