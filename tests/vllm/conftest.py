"""The real vLLM on CPU tensors. Without it these tests are not collected."""

from __future__ import annotations

import importlib.util
import os

os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["VLLM_PLUGINS"] = ""  # the tests themselves say when the plugin is installed

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
