"""The adapter contract on the real vLLM."""

from __future__ import annotations

from unittest import mock

import pytest
from vllm.v1.attention.backends.mla.flashmla_sparse import FlashMLASparseMetadataBuilder as Builder

from nsa_plugin.adapters.vllm.v2 import step as v2_step
from nsa_plugin.adapters.vllm.v2.updates import METHOD
from nsa_plugin.rigs.vllm.v2_engine import CASES, VllmEngine, VllmSession
from nsa_plugin.testing.conformance import Conformance
from nsa_plugin.testing.engine import Engine
from nsa_plugin.testing.pytest_conformance import AdapterConformance
from nsa_plugin.testing.watching import installed
from tests.vllm.drafts import FIRST_IS_REBUILT


class TestVllm(AdapterConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Engine:
        return VllmEngine()


def test_the_check_can_fail() -> None:
    """Without the refresh the poisoned buffer shows."""
    engine, case = VllmEngine(), CASES[0]
    kit = Conformance(engine)
    _ = kit.expected
    nothing = mock.patch.object(Builder, METHOD, lambda builder, metadata: None)
    with installed(engine, "graph"), nothing, mock.patch.object(v2_step.Step, "run", lambda step: None):
        session = VllmSession(case)
        session.prepare(1)
    stale = "consumer 1: indexer lengths" if FIRST_IS_REBUILT else "consumer 0: request map"
    assert f"round 1, {stale}" in kit.differences(case, 1, session.read())
