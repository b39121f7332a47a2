"""Without a GPU, Triton kernels run in Triton's interpreter: this must be said before Triton is imported."""

from __future__ import annotations

import importlib.util
import os

import hypothesis
import pytest
import torch

from nsa_plugin.rigs.interpreter import spare_overflow_checks

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton") is not None:
        spare_overflow_checks()

# No shrinking: kernels are interpreted, and the seeds that print_blob gives are enough to reproduce a failure.
PHASES = (hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate)
hypothesis.settings.register_profile("nsa", deadline=None, print_blob=True, phases=PHASES)
hypothesis.settings.load_profile("nsa")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
