"""What the drafts of both model runners are made of and tried with: layouts of the KV cache, batches, a tiny model."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from nsa_plugin.rigs.models import TINY_DSV32

LAYOUTS = {"bf16": ("auto", 64), "fp8 mixed": ("fp8_ds_mla", 16), "fp8 separate": ("fp8_ds_mla", 64)}
"""Dtype of the KV cache, and attention heads per GPU: FlashMLA-sparse's builder takes other branches for each.

With few heads and an fp8 cache it makes one batch of prefill and decode. With many it keeps them apart."""
BATCHES: tuple[tuple[list[int], list[int], int], ...] = (
    ([100, 107, 126, 65], [1, 0, 2, 2], 1),
    ([63, 64, 700], [0, 0, 0], 70),
    ([300], [1], 140),
    ([1000, 1022, 1024, 12], [0, 1, 0, 2], 7),  # past the model's maximal length, at different steps
)
"""Lengths, rejected tokens and the first KV block of each request; the last has the shape of the first, and other blocks."""
BLOCK_SIZE = 64
ATTENTION = "model.layers.2.mtp_block.self_attn.attn"
INDEXER = "model.layers.2.mtp_block.self_attn.indexer.k_cache"
"""The attention layers of the tiny model's MTP block. Each is an attention group of its own."""


def tiny_config(cache_dtype: str, heads: int, tokens: int, **settings: Any) -> VllmConfig:
    """vLLM's configuration of a tiny DeepSeek-V3.2 with MTP that drafts `tokens` tokens.

    Parameters
    ----------
    cache_dtype, heads : as in `LAYOUTS`
    tokens : speculative tokens
    settings : further engine arguments
    """
    arguments: dict[str, Any] = {
        "model": str(TINY_DSV32), "skip_tokenizer_init": True, "max_model_len": 1024, "block_size": BLOCK_SIZE,
        "dtype": "bfloat16", "enforce_eager": True, "load_format": "dummy", "kv_cache_dtype": cache_dtype,
        "speculative_config": {"method": "mtp", "num_speculative_tokens": tokens}, **settings,
    }  # fmt: skip
    arguments["hf_overrides"] = {
        "num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": arguments["max_model_len"],
    }  # fmt: skip
    return EngineArgs(**arguments).create_engine_config()
