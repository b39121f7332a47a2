"""Runs at capture: what of an engine keeps its target's metadata with vLLM, by name. What builders are not covered, `planes` says."""

from __future__ import annotations

import pkgutil
from typing import Any

from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.verification import moment, refusal

STATE = "vllm.v1.worker.gpu.model_states.default.DefaultModelState"


def unverified(host: Host) -> str:
    """Empty, or why no unverified value may be used here: what a graph computes can't be repaired before it is read."""
    return refusal(host.verify_mode) if host.verify and moment(host.verify_mode, "graph") is None else ""


def uncovered(config: Any, state: Any) -> str:
    """Empty, or why the target of an engine with this VllmConfig and model state is left to vLLM."""
    parallel, speculative = config.parallel_config, config.speculative_config
    if type(state) is not pkgutil.resolve_name(STATE):
        return f"{type(state).__name__} prepares attention in a way of its own"
    if speculative is None:
        return "no speculative decoding: there is nothing to verify"
    reasons = (
        (getattr(parallel, "decode_context_parallel_size", 1) > 1, "decode context parallelism"),
        (getattr(parallel, "prefill_context_parallel_size", 1) > 1, "prefill context parallelism"),
        (getattr(parallel, "use_ubatching", False), "microbatches (DBO)"),
        (getattr(speculative, "enable_adaptive_verification", False), "adaptive verification"),
        (getattr(config.attention_config, "hisparse_config", None) is not None, "HiSparse"),
        (
            getattr(config, "kv_transfer_config", None) is not None,
            "a KV connector, which may read the metadata itself,",
        ),
    )
    return next((f"{what} is not covered" for applies, what in reasons if applies), "")
