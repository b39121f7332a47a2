"""At start: what the adapter needs of every release of sglang. What differs between releases is in `releases`."""

from __future__ import annotations

from nsa_plugin.adapters.probe import Need

_HOOKS = "sglang.srt.plugins.hook_registry"
_MODES = "sglang.srt.model_executor.forward_batch_info.ForwardMode"

REGISTRY: tuple[Need, ...] = (
    Need(f"{_HOOKS}.HookRegistry.register", ("target", "hook", "hook_type"), "install hooks"),
    Need(f"{_HOOKS}.HookRegistry.apply_hooks", (), "apply hooks"),
    Need(f"{_HOOKS}.HookRegistry._hooks", (), "take hooks back"),
    Need(f"{_HOOKS}.HookRegistry._patched", (), "take hooks back"),
    Need(f"{_HOOKS}._current_plugin_source", (), "know whether hooks are about to be applied"),
    Need(f"{_HOOKS}.HookType.AROUND", (), "install hooks"),
)
"""sglang's way to hook its functions."""

FLASH_ATTENTION = "sglang.srt.layers.attention.flashattention_backend.FlashAttentionBackend"

_FLASH_ATTENTION_REFUSALS: tuple[Need, ...] = (
    Need(f"{FLASH_ATTENTION}._kv_shard_pool", (), "know whether the KV cache is in shards"),
    Need(f"{FLASH_ATTENTION}._maybe_init_local_attn_builder", (), "know whether attention is local"),
)
"""What `refusals.FLASH_ATTENTION` asks that older releases can't answer."""

RECORDED_DRAFT_EXTEND: tuple[Need, ...] = (
    Need(f"{FLASH_ATTENTION}.init_forward_metadata_out_graph", ("forward_batch", "in_capture"),
         "leave out what a CUDA graph computes again", hooked=True),
    Need(f"{FLASH_ATTENTION}.init_forward_metadata_in_graph", ("forward_batch",), "know what is recorded", hooked=True),
    Need(f"{FLASH_ATTENTION}.draft_extend_metadata_captured_in_graph", (), "know that all of it is recorded"),
    *_FLASH_ATTENTION_REFUSALS,
)  # fmt: skip
"""FlashAttention's draft extend, which sglang's own CUDA graphs compute."""

FLASH_ATTENTION_DRAFT = "sglang.srt.layers.attention.flashattention_backend.FlashAttentionMultiStepBackend"
FLASHMLA = "sglang.srt.layers.attention.flashmla_backend.FlashMLABackend"
FLASHMLA_DRAFT = "sglang.srt.layers.attention.flashmla_backend.FlashMLAMultiStepDraftBackend"
INNER_VIEW = "sglang.srt.model_executor.forward_batch_info.build_inner_fb_view"


def _dense(draft: str, backend: str, metadata: str, fields: tuple[str, ...]) -> tuple[Need, ...]:
    return (
        *(
            need
            for owner in (draft, backend)
            for need in (
                Need(f"{owner}.init_forward_metadata_out_graph", ("forward_batch", "in_capture"),
                     "prepare its metadata", hooked=True),
                Need(f"{owner}.init_forward_metadata_in_graph", ("forward_batch",), "record the work in CUDA graphs",
                     hooked=True),
            )
        ),
        Need(f"{draft}.init_cuda_graph_state", ("max_bs", "max_num_tokens"), "share page tables", hooked=True),
        Need(f"{backend}.init_cuda_graph_state", ("max_bs", "max_num_tokens"), "share page tables"),
        Need(metadata, fields, "buffers that captured graphs read"),
        Need(INNER_VIEW, ("forward_batch", "bs", "forward_mode"), "sglang's own values, to fall back on"),
    )  # fmt: skip


DENSE_FLASH_ATTENTION: tuple[Need, ...] = (
    *_dense(FLASH_ATTENTION_DRAFT, FLASH_ATTENTION,
            FLASH_ATTENTION.replace("Backend", "Metadata"),
            ("cache_seqlens_int32", "cu_seqlens_k", "page_table", "swa_page_table", "swa_out_cache_loc")),
    Need(f"{FLASH_ATTENTION}._init_full_cg_decode_metadata", ("forward_batch", "in_capture"),
         "sglang's own values, to fall back on"),
    Need(f"{FLASH_ATTENTION}._spec_read_seq_len_delta", ("forward_mode", "spec_info"), "know how far steps see"),
    Need(f"{FLASH_ATTENTION}._get_swa_write_locations", ("forward_batch",), "know that each step has write slots of its own"),
    *_FLASH_ATTENTION_REFUSALS,
)  # fmt: skip
"""FlashAttention's draft steps and target verify."""
DENSE_FLASHMLA: tuple[Need, ...] = (
    *_dense(FLASHMLA_DRAFT, FLASHMLA, FLASHMLA.replace("Backend", "DecodeMetadata"),
            ("flashmla_metadata", "num_splits", "block_kv_indices", "seq_lens_k")),
    Need(f"{FLASHMLA}._apply_decode_target_verify_metadata",
         ("plan", "bs", "req_pool_indices", "seq_lens", "seq_lens_cpu", "forward_mode"),
         "sglang's own values, to fall back on"),
    Need(f"{FLASHMLA.rpartition('.')[0]}.get_mla_metadata", (), "FlashMLA's schedule"),
)  # fmt: skip
"""FlashMLA's draft steps, target verify and draft extend."""

SHARED: tuple[Need, ...] = (
    Need("{multi_step}.init_cuda_graph_state", ("max_bs", "max_num_tokens"), "share page tables", hooked=True),
    Need("{backend}.init_cuda_graph_state", ("max_bs", "max_num_tokens"), "share page tables"),
    Need("{backend}._compute_flashmla_metadata", ("cache_seqlens", "seq_len_q"), "FlashMLA metadata"),
    Need("{backend}.set_{prefix}_prefill_impl", ("forward_batch",), "per-forward dispatch state"),
    Need("{metadata}",
         ("page_size", "cache_seqlens_int32", "cu_seqlens_k", "page_table_1", "real_page_table",
          "{prefix}_cache_seqlens_int32", "{prefix}_cu_seqlens_k", "{prefix}_seqlens_expanded", "flashmla_metadata",
          "paged_mqa_schedule_metadata"),
         "buffers that captured graphs read"),
    Need(f"{_MODES}.DECODE", (), "tell forward modes apart"),
    Need(f"{_MODES}.TARGET_VERIFY", (), "tell forward modes apart"),
    Need(f"{_MODES}.DRAFT_EXTEND_V2", (), "tell forward modes apart"),
)  # fmt: skip
"""What the backends and their metadata have. Words in braces are those of a `Generation`."""
