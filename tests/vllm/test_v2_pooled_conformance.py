"""The adapter contract on the real vLLM, with the draft of a model with pooled index keys."""

from __future__ import annotations

import pytest
from vllm.v1.attention.backends.mla import indexer

if not hasattr(indexer, "KpoolTailMetadataBuilder"):
    pytest.skip("this vLLM has no pooled index keys", allow_module_level=True)

from nsa_plugin.rigs.vllm.v2_pooled_engine import PooledEngine
from nsa_plugin.testing.engine import Engine
from nsa_plugin.testing.pytest_conformance import AdapterConformance


class TestPooledDrafts(AdapterConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Engine:
        return PooledEngine()
