"""The adapter contract on the real vLLM, with the drafts of both model runners."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from vllm.v1.attention.backends.mla.flashmla_sparse import FlashMLASparseMetadataBuilder as Builder

from nsa_plugin.adapters.vllm.v1.kept import KeptSteps
from nsa_plugin.adapters.vllm.v2 import step as v2_step
from nsa_plugin.adapters.vllm.v2.updates import METHOD
from nsa_plugin.rigs.vllm import v1_engine, v2_engine
from nsa_plugin.testing.conformance import Conformance
from nsa_plugin.testing.engine import Engine
from nsa_plugin.testing.pytest_conformance import AdapterConformance
from nsa_plugin.testing.watching import installed_adapter
from tests.vllm.drafts import FIRST_IS_REBUILT


class TestModelRunnerV2(AdapterConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Engine:
        return v2_engine.V2Engine()


class TestModelRunnerV1(AdapterConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Engine:
        return v1_engine.V1Engine()


def test_the_check_of_v2_can_fail() -> None:
    """Without the refresh the poisoned buffer shows."""
    case = v2_engine.CASES[0]
    engine = v2_engine.V2Engine([case])
    kit = Conformance(engine)
    _ = kit.expected
    nothing = mock.patch.object(Builder, METHOD, lambda builder, metadata: None)
    with installed_adapter(engine, "graph"), nothing, mock.patch.object(v2_step.Step, "run", lambda step: None):
        session = v2_engine.V2Session(case)
        session.prepare(1)
    stale = "consumer 1: indexer lengths" if FIRST_IS_REBUILT else "consumer 0: request map"
    assert f"round 1, {stale}" in kit.differences(case, 1, session.read())


@pytest.mark.parametrize(
    ("owner", "name", "wrong", "field"),
    [
        (KeptSteps, "at", lambda kept, step, longest: kept.steps[step], "k_cache.decode.schedule_metadata"),
        (torch, "_foreach_copy_", lambda targets, sources: None, "context slots"),
    ],
    ids=["no schedule", "slots of the first step"],
)
def test_the_check_of_v1_can_fail(owner: object, name: str, wrong: object, field: str) -> None:
    case = v1_engine.CASES[0]
    engine = v1_engine.V1Engine([case])
    kit = Conformance(engine)
    with engine.running():
        _ = kit.expected
        with installed_adapter(engine, "copy"), mock.patch.object(owner, name, wrong):
            session = v1_engine.V1Session(case)
            session.prepare(1)
    assert f"round 1, consumer 1: {field}" in kit.differences(case, 1, session.read())
