"""What an engine needs before it is imported to be tested or measured."""

from __future__ import annotations

import importlib
import os

import torch

from nsa_plugin.core.errors import UnavailableError
from nsa_plugin.rigs.interpreter import spare_overflow_checks


def require(engine: str) -> None:
    """Import "sglang" or "vllm", on a CPU with Triton's interpreter; vLLM without autoloading this package.

    Raises
    ------
    UnavailableError
        It is not installed, or cannot be imported.
    """
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ["TRITON_INTERPRET"] = "1"
    if engine == "vllm":
        os.environ["VLLM_PLUGINS"] = ""
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns of what a model so small is not
        if on_cpu:
            os.environ["VLLM_TARGET_DEVICE"] = "cpu"
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # only then vLLM takes a Triton that has no driver
    try:
        importlib.import_module(engine)
    except ImportError as error:
        raise UnavailableError(
            f"--engine {engine} needs {engine} installed: {error}; pip install 'nsa-plugin[{engine}]'"
        ) from error
    if on_cpu:
        spare_overflow_checks()
