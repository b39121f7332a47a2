"""At start and at capture: which strategies the installed sglang has a place for, and which backends are left to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nsa_plugin.adapters.base import Host, Strategy
from nsa_plugin.adapters.sglang.pools import foreign_formulas, keys_per_index_key
from nsa_plugin.adapters.sglang.releases import is_rocm, lacking, overlaps_plans
from nsa_plugin.adapters.verification import Moment, moment

VERIFIED: tuple[Moment, ...] = ("before", "graph")
"""When a path can be verified; the first is what NSA_PLUGIN_VERIFY_MODE=auto takes."""


def repairs(host: Host) -> bool:
    """Whether verification rules `graph` out, because what a graph computes can't be repaired before it is read."""
    return bool(host.verify) and moment(host.verify_mode, *VERIFIED) == "before"


def usable(asked: Sequence[Strategy], host: Host) -> tuple[Strategy, ...]:
    """Strategies to try."""
    no_graph = repairs(host) or not_graph()
    return tuple(strategy for strategy in asked if strategy != "graph" or not no_graph)


def not_graph() -> str:
    """Empty, or why the work can't be recorded in sglang's graphs."""
    if problem := lacking("graph"):
        return problem
    if overlaps_plans():
        return (
            "SGLANG_ENABLE_OVERLAP_PLAN_STREAM: sglang prepares on another stream, and may overwrite the lengths of a batch "
            "before its graph reads them"
        )
    return ""


def unsupported(backend: Any) -> str:
    """Empty, or what about the backend is not covered."""
    if (k := keys_per_index_key(backend)) > 1 and (problem := foreign_formulas(k)):
        return f"pooled index keys (index_kpool > 1): {problem}"
    if is_rocm():
        return "ROCm is not covered"
    return ""


Refusal = tuple[str, Callable[[Any], bool]]
"""What is not covered, and the question whether a backend has it."""
UNIFIED_MEMORY: Refusal = (
    "the translated slots of unified memory",
    lambda backend: backend.kv_index_translator.is_translating,
)
FLASH_ATTENTION: tuple[Refusal, ...] = (
    ("subclasses of FlashAttentionBackend", lambda backend: type(backend).__name__ != "FlashAttentionBackend"),
    ("drafts that are trees (--speculative-eagle-topk above 1)", lambda backend: backend.topk > 1),
    UNIFIED_MEMORY,
    ("FlashAttention 4", lambda backend: backend.fa_impl_ver != 3),
    ("KV caches in shards", lambda backend: backend._kv_shard_pool is not None),
    ("encoder-decoder models", lambda backend: backend.is_encoder_decoder),
    ("local attention", lambda backend: backend.local_attn_builder is not None),
    ("prefill-aware sliding windows", lambda backend: backend.is_prefill_aware_swa),
)
UNRECORDED: Refusal = (
    "what sglang does not record",
    lambda backend: not backend.draft_extend_metadata_captured_in_graph(),
)
FLASHMLA: tuple[Refusal, ...] = (
    ("subclasses of FlashMLABackend", lambda backend: type(backend).__name__ != "FlashMLABackend"),
    UNIFIED_MEMORY,
    ("decode context parallelism", lambda backend: backend.dcp_world_size > 1),
)


def uncovered(refusals: Sequence[Refusal], backend: Any) -> str:
    """Empty, or what about a backend is not covered. What can't be asked is not covered either."""
    try:
        return next((f"not covered: {what}" for what, has in refusals if has(backend)), "")
    except Exception as error:
        return f"not covered: a backend that could not be asked ({type(error).__name__}: {error})"
