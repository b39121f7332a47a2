"""The adapter contract on the real sglang, with the plain torch reference and with the Triton kernels."""

from __future__ import annotations

from typing import Any

import pytest

from nsa_plugin import hookimpl
from nsa_plugin.core import api
from nsa_plugin.rigs.sglang import engine as sglang_engine
from nsa_plugin.testing.conformance import assert_conforms, conformance_problems
from nsa_plugin.testing.engine import Engine
from nsa_plugin.testing.pytest_conformance import AdapterConformance
from tests.sglang.batches import TritonPrecompute


class TestSglang(AdapterConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Engine:
        return sglang_engine.SglangEngine()


def test_the_kernels_too() -> None:
    cases = [*sglang_engine.CASES[:3], *(case for case in sglang_engine.CASES if "one step" in case.covers)]
    assert_conforms(sglang_engine.SglangEngine(cases, [TritonPrecompute()]), ["faithful", "addresses"])


class WrongInTheLastRow:
    """Correct but for one request's length."""

    @hookimpl
    def nsa_plugin_bind_precompute(self, batch: Any, geometry: Any, out: Any, enabled: Any) -> Any:
        right = api.bind_precompute(batch, out, enabled=enabled)

        def run(live: Any) -> None:
            right(live)
            out.steps[0].nsa_cache_seqlens[-1] += 1 if enabled is None else enabled[0]

        return run


def test_the_check_can_fail() -> None:
    engine = sglang_engine.SglangEngine(sglang_engine.CASES[:3], [WrongInTheLastRow()])
    problems = conformance_problems(engine, ["faithful"])
    assert len(engine.cases()) > 1
    for case in engine.cases():
        assert f"faithful: {engine.strategies[0]}, {case.name}: round 0, consumer 0: nsa_cache_seqlens" in problems
