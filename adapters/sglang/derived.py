"""Planes that sglang's own functions compute from the lengths: DeepGEMM schedule, top-k plan, FlashMLA metadata."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from nsa_plugin.adapters.sglang.describe import vectors_and_tables
from nsa_plugin.adapters.sglang.releases import names
from nsa_plugin.core.metadata import same_buffer


def refresher(backend: Any, metadata: Any, forward_mode: Any, batch_size: int) -> Callable[[], None] | None:
    """A function that refreshes the derived planes of `metadata` in place; None if it has none.

    It does what a backend's own path (`Names.own_path`) does after the plain planes are there.
    """
    module, planes = import_module(names().module), vectors_and_tables(metadata)
    steps: list[Callable[[], None]] = []
    if module.is_cuda():
        if metadata.paged_mqa_schedule_metadata is not None:
            steps.append(_schedule(module, backend, metadata, forward_mode, batch_size))
        if getattr(metadata, "topk_v2_plan", None) is not None:
            steps.append(lambda: backend._refresh_topk_v2_plan(metadata))
    if getattr(backend, names().of("_decode_impl")) == "flashmla_kv":
        lengths = planes["nsa_cache_seqlens"]
        destination = metadata.flashmla_metadata.slice(slice(0, lengths.shape[0] + 1))
        steps.append(lambda: destination.copy_(backend._compute_flashmla_metadata(cache_seqlens=lengths, seq_len_q=1)))
    if not steps:
        return None

    def refresh() -> None:
        for step in steps:
            step()

    return refresh


def _schedule(module: Any, backend: Any, metadata: Any, forward_mode: Any, batch_size: int) -> Callable[[], None]:
    planes = vectors_and_tables(metadata)
    vectors = planes["cache_seqlens"], planes["seqlens_expanded"]
    destination = getattr(metadata, "paged_mqa_ctx_lens_2d", None)

    def context_lengths() -> Any:
        if hasattr(backend, "_build_paged_mqa_schedule_2d_ctx_lens"):
            return backend._build_paged_mqa_schedule_2d_ctx_lens(forward_mode, *vectors, batch_size)
        lengths = vectors[0] if forward_mode.is_decode_or_idle() else vectors[1]
        if hasattr(module, "_to_2d_context_lens"):  # 0.5.12
            return module._to_2d_context_lens(lengths, batch_size)
        return lengths  # 0.5.11

    def refresh() -> None:
        lengths = context_lengths()
        if hasattr(backend, "_refresh_paged_mqa_schedule_metadata"):
            backend._refresh_paged_mqa_schedule_metadata(metadata, lengths)
        else:  # before 0.5.15; before 0.5.13 the module did not hold deep_gemm
            deep_gemm = getattr(module, "deep_gemm", None) or import_module("deep_gemm")
            schedule = deep_gemm.get_paged_mqa_logits_metadata(lengths, 64, deep_gemm.get_num_sms())
            metadata.paged_mqa_schedule_metadata.copy_(schedule)
        if destination is not None and not same_buffer(lengths, destination):
            destination.copy_(lengths)

    return refresh
