"""The adapter contract on the real vLLM."""

from __future__ import annotations

import pytest
from vllm.v1.attention.backends.mla.flashmla_sparse import FlashMLASparseMetadataBuilder as Builder

from nsa_plugin.adapters.vllm.adapter import METHOD
from nsa_plugin.testing.conformance import Conformance
from nsa_plugin.testing.engine import Engine
from nsa_plugin.testing.pytest_conformance import AdapterConformance
from nsa_plugin.testing.watching import installed
from tests.vllm.engine import CASES, VllmEngine, VllmSession


class TestVllm(AdapterConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Engine:
        return VllmEngine()


def test_the_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the request map's refresh the poisoned buffer shows."""
    engine, case = VllmEngine(), CASES[0]
    kit = Conformance(engine)
    _ = kit.expected
    with installed(engine, "graph"):
        monkeypatch.setattr(Builder, METHOD, lambda builder, metadata: None)
        session = VllmSession(case)
        session.prepare(1)
    assert "round 1, consumer 0: request map" in kit.differences(case, 1, session.read())
