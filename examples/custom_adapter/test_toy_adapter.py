"""`pytest examples/custom_adapter`: the adapter contract, line by line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from nsa_plugin.testing.engine import Engine
from nsa_plugin.testing.pytest_conformance import AdapterConformance
from toy_conformance import ToyEngine


class TestToyAdapter(AdapterConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Engine:
        return ToyEngine()
