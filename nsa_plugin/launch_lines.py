"""How each engine is started with a draft that the plugin accelerates: the one source of every launch line printed.

README and docs print `LINES`, the example scripts and `nsa-plugin doctor` ask for them; tests give each line to the
engine's own parser.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

MODEL = "deepseek-ai/DeepSeek-V3.2"
STEPS = 4
"""Draft steps of a round; sglang verifies one token more."""

_PROGRAMS = {
    "sglang": ("python3", "-m", "sglang.launch_server", "--model-path"),
    "vllm": ("vllm", "serve"),
}
_OPTIONS = {
    "sglang": (
        "--tp-size", "8",
        "--speculative-algorithm", "EAGLE",
        "--speculative-num-steps", str(STEPS),
        "--speculative-eagle-topk", "1",
        "--speculative-num-draft-tokens", str(STEPS + 1),
    ),
    "vllm": (
        "--tensor-parallel-size", "8",
        "--kv-cache-dtype", "fp8",
        "--speculative-config", f'{{"method": "mtp", "num_speculative_tokens": {STEPS}}}',
    ),
}  # fmt: skip
ENGINES = tuple(_PROGRAMS)


def words(engine: str, model: str = MODEL) -> Sequence[str]:
    """The words of an engine's launch line for a model's name or folder."""
    return (*_PROGRAMS[engine], model, *_OPTIONS[engine])


def line(engine: str, model: str = MODEL) -> str:
    """The launch line, quoted for a shell."""
    return shlex.join(words(engine, model))


def arguments(engine: str, model: str = MODEL) -> Sequence[str]:
    """What the engine's server parser gets: the words after the program's name."""
    return words(engine, model)[{"sglang": 3, "vllm": 2}[engine] :]


LINES = tuple(line(engine) for engine in ENGINES)
