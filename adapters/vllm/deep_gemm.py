"""Runs at capture and at every draft: DeepGEMM's schedule for the DSA indexer, from the lengths of each step."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from nsa_plugin.adapters.vllm.releases import INDEXER_MODULE, states_per_block


def scheduler(builder: Any) -> Callable[[Any], torch.Tensor] | None:
    """What computes the schedule of a builder's decode metadata from the lengths in it; None where there is none."""
    module = importlib.import_module(INDEXER_MODULE)
    if not (module.current_platform.is_cuda() and module.has_deep_gemm()):
        return None
    spec, num_sms = builder.kv_cache_spec, builder.num_sms
    block_size = states_per_block(spec)

    def schedule(decode: Any) -> torch.Tensor:
        made: torch.Tensor = module.get_paged_mqa_logits_metadata(
            decode.seq_lens, block_size, num_sms, indices=decode.indices
        )
        return made

    return schedule
