"""DeepGEMM's schedule for the DSA indexer: it follows from the lengths of each draft step."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from nsa_plugin.adapters.vllm.releases import INDEXER_MODULE


def scheduler(builder: Any) -> Callable[[Any], torch.Tensor] | None:
    """What computes the schedule of a builder's decode metadata from the lengths in it; None where there is none."""
    module = importlib.import_module(INDEXER_MODULE)
    if not (module.current_platform.is_cuda() and module.has_deep_gemm()):
        return None
    spec, num_sms = builder.kv_cache_spec, builder.num_sms
    block_size = spec.num_states if hasattr(spec, "num_states") else spec.storage_block_size  # the latter until 0.28

    def schedule(decode: Any) -> torch.Tensor:
        made: torch.Tensor = module.get_paged_mqa_logits_metadata(
            decode.seq_lens, block_size, num_sms, indices=decode.indices
        )
        return made

    return schedule
