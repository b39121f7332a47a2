"""Runs at capture, and at drafts that no graph replays: schedules of dense MLA decodes, made in place at each draft step.

They follow from the lengths of a step, by vLLM's own functions. All else in the metadata of a decode are views of the
runner's buffers, constants of the captured size, and `max_seq_len`. Captured metadata have the model's length for that, a
rebuild a tighter bound: a schedule for the larger one is as right, and may split more.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

FLASHMLA = "vllm.v1.attention.backends.mla.flashmla"
UNVERIFIED = "NSA_PLUGIN_VERIFY does not cover its schedule"
NOT_KEPT = "its schedule follows from each step's lengths, so that vLLM rebuilds it"


def flash_attn_mla(builder: Any, decode: Any) -> None:
    """FlashAttention's schedule, where captured kernels read it. The rest of the builder's buffer is 0, as `build` leaves it."""
    captured = decode.scheduler_metadata
    if captured is None:
        return
    made = builder._schedule_decode(
        num_reqs=decode.seq_lens.shape[0],
        cu_query_lens=decode.query_start_loc,
        max_query_len=decode.max_query_len,
        seqlens=decode.seq_lens,
        max_seq_len=decode.max_seq_len,
        causal=True,
        max_num_splits=decode.max_num_splits,
    )
    _copy(made, captured)
    if builder.use_full_cuda_graph:
        builder.scheduler_metadata[captured.shape[0] :] = 0


def flashmla(builder: Any, decode: Any) -> None:
    """FlashMLA's: for an fp8 cache both tensors; for bf16 a new object, which the first layer's call of the step fills."""
    module = importlib.import_module(FLASHMLA)
    if not builder.is_fp8_kvcache:
        decode.scheduler_metadata = module.FlashMLASchedMeta()
        return
    made = module.get_mla_metadata_dense_fp8(decode.seq_lens, builder.num_q_heads, 1)
    captured = decode.scheduler_metadata
    for value, place in zip(made, (captured.tile_scheduler_metadata, captured.num_splits), strict=True):
        _copy(value, place)


def _copy(made: torch.Tensor, place: torch.Tensor) -> None:
    if made.shape != place.shape:
        raise RuntimeError(f"a schedule of shape {tuple(made.shape)}, not {tuple(place.shape)}")
    place.copy_(made)


SCHEDULES: Mapping[str, Callable[[Any, Any], None]] = {
    "FlashAttention schedule": flash_attn_mla,
    "FlashMLA schedule": flashmla,
}
"""By what changes in a builder's metadata: `make(builder, decode)` writes it. Capture-safe."""
