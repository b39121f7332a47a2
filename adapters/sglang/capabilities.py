"""Everything that this adapter needs of sglang, in one table, and the probe that checks all of it."""

from __future__ import annotations

import importlib

from nsa_plugin.adapters.probe import Need, missing

BACKEND_MODULE = "sglang.srt.layers.attention.dsa_backend"
BACKEND = f"{BACKEND_MODULE}.DeepseekSparseAttnBackend"
MULTI_STEP = f"{BACKEND_MODULE}.DeepseekSparseAttnMultiStepBackend"
METADATA = f"{BACKEND_MODULE}.DSAMetadata"
TESTED = ("0.5.13", "0.5.14", "0.5.15.post1", "0.5.18", "0.5.20", "0.5.22", "0.5.23")
"""Releases that `make matrix` found faithful; others are used, with a warning, if the probe is clean."""

PLAIN_FIELDS = (
    "page_size", "cache_seqlens_int32", "cu_seqlens_k", "page_table_1", "real_page_table", "dsa_cache_seqlens_int32",
    "dsa_cu_seqlens_k", "dsa_seqlens_expanded", "flashmla_metadata", "paged_mqa_schedule_metadata",
    "paged_mqa_ctx_lens_2d",
)  # fmt: skip
FORWARD_ARGUMENTS = ("bs", "req_pool_indices", "seq_lens", "seq_lens_cpu", "forward_mode", "spec_info")


NEEDS: tuple[Need, ...] = (
    Need("sglang.srt.plugins.hook_registry.HookRegistry.register", ("target", "hook", "hook_type"), "install hooks"),
    Need("sglang.srt.plugins.hook_registry.HookRegistry.apply_hooks", (), "apply hooks"),
    Need("sglang.srt.plugins.hook_registry.HookRegistry._hooks", (), "take hooks back"),
    Need("sglang.srt.plugins.hook_registry.HookRegistry._patched", (), "take hooks back"),
    Need("sglang.srt.plugins.hook_registry._current_plugin_source", (), "know whether hooks are about to be applied"),
    Need("sglang.srt.plugins.hook_registry.HookType.AROUND", (), "install hooks"),
    Need(f"{MULTI_STEP}.init_forward_metadata_out_graph", ("forward_batch", "in_capture"), "prepare a draft (hooked)"),
    Need(f"{MULTI_STEP}.init_forward_metadata_in_graph", ("forward_batch",), "record that in its graph (hooked)"),
    Need(f"{MULTI_STEP}.init_cuda_graph_state", ("max_bs", "max_num_tokens"), "share page tables (hooked)"),
    Need(f"{BACKEND}.init_forward_metadata_out_graph", ("forward_batch", "in_capture"),
         "prepare target verify and draft extend (hooked)"),
    Need(f"{BACKEND}.init_forward_metadata_in_graph", ("forward_batch",), "record that in their graphs (hooked)"),
    Need(f"{BACKEND}.init_cuda_graph_state", ("max_bs", "max_num_tokens"), "share page tables"),
    Need(f"{BACKEND}._apply_cuda_graph_metadata", FORWARD_ARGUMENTS, "sglang's own values, to fall back on"),
    Need(f"{BACKEND}._build_paged_mqa_schedule_2d_ctx_lens",
         ("forward_mode", "cache_seqlens_int32", "seqlens_expanded", "batch_size"), "DeepGEMM schedule"),
    Need(f"{BACKEND}._compute_flashmla_metadata", ("cache_seqlens", "seq_len_q"), "FlashMLA metadata"),
    Need(f"{BACKEND}.set_dsa_prefill_impl", ("forward_batch",), "per-forward dispatch state"),
    Need(METADATA, PLAIN_FIELDS, "buffers that captured graphs read"),
    Need("sglang.srt.model_executor.forward_batch_info.ForwardMode.DECODE", (), "tell forward modes apart"),
    Need("sglang.srt.model_executor.forward_batch_info.ForwardMode.TARGET_VERIFY", (), "tell forward modes apart"),
    Need("sglang.srt.model_executor.forward_batch_info.ForwardMode.DRAFT_EXTEND_V2", (), "tell forward modes apart"),
)  # fmt: skip

SINGLE_NEEDS: tuple[Need, ...] = (
    Need(f"{BACKEND}._refresh_paged_mqa_schedule_metadata", ("metadata", "seqlens_32_2d"), "DeepGEMM schedule"),
    Need(f"{BACKEND}._refresh_topk_v2_plan", ("metadata",), "top-k plan; comes with the static draft-extend width"),
)
"""For target verify and draft extend: 0.5.15 and later. Before, draft extend was ragged and read on the host."""


def probe() -> list[str]:
    """What the installed sglang lacks, one line each; empty if it fits. Imports sglang's DSA backend."""
    try:
        importlib.import_module(BACKEND_MODULE)
    except Exception as error:
        return [
            f"{BACKEND_MODULE}: looked for the DSA backends, found {type(error).__name__}: {error}; "
            "install sglang 0.5.13 or later, complete"
        ]
    return missing(NEEDS)
