"""Planes that sglang's own functions compute from the lengths: DeepGEMM schedule, top-k plan, FlashMLA metadata."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nsa_plugin.core.metadata import same_buffer


def refresher(backend: Any, metadata: Any, forward_mode: Any, batch_size: int) -> Callable[[], None] | None:
    """A function that refreshes the derived planes of `metadata` in place; None if it has none.

    It does what `DeepseekSparseAttnBackend._apply_cuda_graph_metadata` does after the plain planes are there.
    """
    from sglang.srt.layers.attention import dsa_backend

    steps: list[Callable[[], None]] = []
    if dsa_backend.is_cuda():
        steps.append(_schedule(dsa_backend, backend, metadata, forward_mode, batch_size))
        if getattr(metadata, "topk_v2_plan", None) is not None:
            steps.append(lambda: backend._refresh_topk_v2_plan(metadata))
    if backend.dsa_decode_impl == "flashmla_kv":
        lengths = metadata.dsa_cache_seqlens_int32
        destination = metadata.flashmla_metadata.slice(slice(0, lengths.shape[0] + 1))
        steps.append(lambda: destination.copy_(backend._compute_flashmla_metadata(cache_seqlens=lengths, seq_len_q=1)))
    if not steps:
        return None

    def refresh() -> None:
        for step in steps:
            step()

    return refresh


def _schedule(module: Any, backend: Any, metadata: Any, forward_mode: Any, batch_size: int) -> Callable[[], None]:
    def refresh() -> None:
        lengths = backend._build_paged_mqa_schedule_2d_ctx_lens(
            forward_mode, metadata.cache_seqlens_int32, metadata.dsa_seqlens_expanded, batch_size
        )
        if hasattr(backend, "_refresh_paged_mqa_schedule_metadata"):
            backend._refresh_paged_mqa_schedule_metadata(metadata, lengths)
        else:  # 0.5.13, 0.5.14
            deep_gemm = module.deep_gemm
            schedule = deep_gemm.get_paged_mqa_logits_metadata(lengths, 64, deep_gemm.get_num_sms())
            metadata.paged_mqa_schedule_metadata.copy_(schedule)
        if not same_buffer(lengths, metadata.paged_mqa_ctx_lens_2d):
            metadata.paged_mqa_ctx_lens_2d.copy_(lengths)

    return refresh
