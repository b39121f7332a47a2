"""The adapter contract on the real vLLM's target: verified tokens, and the draft's first pass over them."""

from __future__ import annotations

from unittest import mock

import pytest

pytest.importorskip("vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils")

from nsa_plugin.adapters.vllm.v2.target.refresh import Refresh
from nsa_plugin.rigs.vllm.v2_target_engine import CASES, TargetEngine, TargetSession
from nsa_plugin.testing.conformance import Conformance
from nsa_plugin.testing.engine import Engine
from nsa_plugin.testing.pytest_conformance import AdapterConformance
from nsa_plugin.testing.watching import installed_adapter


class TestTarget(AdapterConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Engine:
        return TargetEngine()


def test_the_check_can_fail() -> None:
    """Without the refresh the poisoned buffers show."""
    engine, case = TargetEngine(), CASES[0]
    kit = Conformance(engine)
    with engine.running():
        _ = kit.expected
        with installed_adapter(engine, "graph"), mock.patch.object(Refresh, "run", lambda refresh: None):
            session = TargetSession(case)
            session.prepare(1)
            wrong = kit.differences(case, 1, session.read())
    assert any("req_id_per_token" in line for line in wrong) and any("decode.seq_lens" in line for line in wrong)
