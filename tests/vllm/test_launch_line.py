"""vLLM's own parser takes the launch line that is printed for it, and its own speculative configuration is made of it."""

from __future__ import annotations

import pytest

from nsa_plugin import launch_lines
from nsa_plugin.rigs.models import TINY_DSV32


def test_the_launch_line_is_parsed_and_its_draft_configured() -> None:
    utils = pytest.importorskip("vllm.utils.argparse_utils")
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    parser = AsyncEngineArgs.add_cli_args(utils.FlexibleArgumentParser())
    parser.add_argument("model_tag")  # as `vllm serve` has it
    options = parser.parse_args([*launch_lines.arguments("vllm", str(TINY_DSV32))])
    options.model = options.model_tag
    arguments = AsyncEngineArgs.from_cli_args(options)
    assert arguments.tensor_parallel_size == 8 and arguments.kv_cache_dtype == "fp8"
    assert arguments.speculative_config == {"method": "mtp", "num_speculative_tokens": launch_lines.STEPS}
    draft = SpeculativeConfig(
        target_model_config=ModelConfig(arguments.model, skip_tokenizer_init=True),
        target_parallel_config=ParallelConfig(),
        **arguments.speculative_config,
    )
    assert draft.method == "mtp" and draft.num_speculative_tokens == launch_lines.STEPS
