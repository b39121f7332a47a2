"""The small model of GLM-5 Next's shape, as sglang reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

MODEL = Path(__file__).parents[2] / "benchmarks" / "end_to_end" / "model_glm5_next"


@pytest.mark.parametrize("draft", [False, True])
def test_sglang_reads_the_model_and_its_draft(draft: bool) -> None:
    pytest.importorskip("sglang.srt.configs.glm5_next")
    from sglang.srt.configs.model_config import ModelConfig, get_dsa_index_kpool, is_deepseek_dsa

    read = ModelConfig(str(MODEL), is_draft_model=draft, enable_multimodal=False)
    assert read.hf_config.architectures == ["Glm5NextForConditionalGeneration" + "NextN" * draft]
    assert is_deepseek_dsa(read.hf_config) and get_dsa_index_kpool(read.hf_config) == 16
    assert read.context_len == 1 << 20
    assert (read.kv_lora_rank, read.qk_nope_head_dim, read.qk_rope_head_dim, read.v_head_dim) == (512, 256, 0, 256)
    linear = read.hf_text_config.linear_attn_config
    assert linear is None if draft else linear["full_attn_layers"] == [3]
