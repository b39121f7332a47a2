"""The small model of GLM-5 Next's shape has every setting that vLLM's model reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import vllm

MODEL = Path(__file__).parents[2] / "benchmarks" / "end_to_end" / "model_glm5_next"
SOURCES = Path(vllm.__file__).parent / "models" / "glm5next" / "common"
NOT_OF_TEXT = {"attn_module_list_cfg", "buffer_keys", "text_config", "vision_config"}
"""Named in a comment, or of another configuration."""


def test_what_vllm_reads_is_there() -> None:
    transformers = pytest.importorskip("transformers")
    if not SOURCES.exists() or not hasattr(transformers, "Glm5NextConfig"):
        pytest.skip("this vLLM has no GLM-5 Next")
    text = transformers.AutoConfig.from_pretrained(MODEL).text_config
    names = {
        name
        for file in ("attention.py", "model.py", "kda.py")
        for name in re.findall(r"(?<![\w.])config\.(\w+)", (SOURCES / file).read_text())
    }
    assert len(names) > 30 and "index_kpool" in names
    assert not {name for name in names - NOT_OF_TEXT if not hasattr(text, name)}
    assert text.index_kpool == 16 and text.max_position_embeddings == 1 << 20
