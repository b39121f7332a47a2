"""Drafts with dense MLA: every step of the fused draft as vLLM's own rebuild, and left to vLLM where that is due.

The stand-ins for FlashAttention's and FlashMLA's schedulers ignore the bound of the lengths: it is the model's length in
captured metadata and a tighter one in a rebuild, so that real schedules may differ and be right both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from nsa_plugin.adapters.vllm import builders, releases, schedules
from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.adapters.vllm.builder_rows import BuilderRow
from nsa_plugin.adapters.vllm.v1.steps import keeper_of
from nsa_plugin.adapters.vllm.v2 import step as v2_step
from nsa_plugin.adapters.vllm.v2 import switch as v2_switch
from nsa_plugin.core import step_update
from nsa_plugin.host import Host
from nsa_plugin.rigs.vllm import dense
from nsa_plugin.rigs.vllm.dense import DUE, LAYOUTS, DenseDraft
from nsa_plugin.rigs.vllm.dense_engine import CASES, DenseEngine
from nsa_plugin.rigs.vllm.drafts import BATCHES
from nsa_plugin.rigs.vllm.v2_draft import Sizes
from nsa_plugin.testing.engine import Engine
from nsa_plugin.testing.pytest_conformance import AdapterConformance
from tests.vllm.drafts import LARGE, unequal_steps

Install = Callable[..., tuple[Host, VllmAdapter]]
pytestmark = pytest.mark.skipif(
    not releases.has_update(releases.speculator()), reason="dense MLA joins the fused draft from vLLM 0.32 on"
)
FEW = (*BATCHES[:2], LARGE)
"""For tests of what happens, not of values: the last one is larger than any captured one."""
ROWS = (builders.FLASH_ATTN_MLA, builders.FLASHMLA_DENSE)


@pytest.fixture(autouse=True)
def schedulers() -> Iterator[None]:
    with dense.emulated_schedulers():
        yield


def proposals(draft: DenseDraft, batches: Any = (*BATCHES, LARGE)) -> list[dict[str, torch.Tensor]]:
    """What each draft step of each batch saw, from poisoned buffers; the last batch is larger than any captured one."""
    seen = []
    for lengths, rejected, first_block in batches:
        draft.poison()
        seen += draft.propose(lengths, [min(count, draft.tokens) for count in rejected], first_block)
    return seen


def unequal(want: list[dict[str, torch.Tensor]], have: list[dict[str, torch.Tensor]]) -> set[str]:
    """Names of what differs in any step, and of schedules that are not of the lengths which the step reads."""
    assert all(step[DUE].all() for step in want)
    return unequal_steps(want, have)


@functools.cache
def rebuilt(layout: str) -> list[dict[str, torch.Tensor]]:
    """What the steps of a draft of 4 tokens see in vLLM alone; to be asked for before anything is installed."""
    draft = DenseDraft(LAYOUTS[layout], 4)
    assert not draft.fused
    return proposals(draft, FEW)


class TestDenseDraft(AdapterConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Engine:
        return DenseEngine(CASES)


TRIED = [
    ("FLASH_ATTN_MLA", 2, 64), ("FLASH_ATTN_MLA", 3, 16), ("FLASH_ATTN_MLA", 5, 128), ("FLASHMLA, bf16", 2, 64),
    ("FLASHMLA, bf16", 6, 64), ("FLASHMLA, fp8", 3, 128),
]  # fmt: skip
"""Layout, tokens and block size. The kit tries a draft of 8 tokens. Interpreted kernels take most of the time."""


@pytest.mark.parametrize(("layout", "tokens", "block"), TRIED)
def test_every_step_equals_a_full_rebuild_and_none_is_built(
    install: Install, layout: str, tokens: int, block: int
) -> None:
    vllms = DenseDraft(LAYOUTS[layout], tokens, Sizes(block=block))
    expected = proposals(vllms)
    host, _ = install("graph")
    draft = DenseDraft(LAYOUTS[layout], tokens, Sizes(block=block))
    assert draft.fused and not vllms.fused
    assert unequal(expected, proposals(draft)) == set() and len(expected) == (len(BATCHES) + 1) * (tokens - 1)
    assert not host.fallbacks and v2_switch.of(host, draft.speculator).recorded  # one kernel wrote the slots
    for own, builds in ((vllms, tokens - 1), (draft, 0)):
        (builder,) = own.builders
        with mock.patch.object(type(builder), "_build_decode", autospec=True, side_effect=_build(builder)) as build:
            own.propose(*BATCHES[2])
        assert sum(call.args[0] is builder for call in build.call_args_list) == builds


def _build(builder: Any) -> Callable[..., Any]:
    original = type(builder)._build_decode
    return lambda *arguments, **named: original(*arguments, **named)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_after_an_undo_vllm_drafts_unfused(install: Install, layout: str) -> None:
    expected = rebuilt(layout)
    _, adapter = install("graph")
    draft = DenseDraft(LAYOUTS[layout], 4)
    adapter.undo()
    assert draft.fused and not DenseDraft(LAYOUTS[layout], 4).fused
    assert unequal(expected, proposals(draft, FEW)) == set()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_comparison_can_fail(install: Install, layout: str) -> None:
    expected = rebuilt(layout)
    with mock.patch.dict(schedules.SCHEDULES, dict.fromkeys(schedules.SCHEDULES, lambda builder, decode: None)):
        install("graph")
        assert {"schedule", DUE} <= unequal_steps(expected, proposals(DenseDraft(LAYOUTS[layout], 4), FEW))


def test_what_a_larger_schedule_has_left_is_zero(install: Install) -> None:
    """FlashAttention's kernel may look past the schedule of a batch."""
    install("graph")
    draft = DenseDraft(LAYOUTS["FLASH_ATTN_MLA"], 3)
    proposals(draft, [LARGE, BATCHES[0]])
    (builder,) = draft.builders
    assert builder.scheduler_metadata[:17].any() and not builder.scheduler_metadata[17:].any()


def test_auto_takes_them(install: Install) -> None:
    _, adapter = install("auto")
    assert DenseDraft(LAYOUTS["FLASHMLA, bf16"], 3).fused
    plans = {plan.path: plan for plan in adapter.paths(Host())}
    assert [plans[f"draft decode with {row.backend}"].strategy for row in ROWS] == ["graph"] * 2


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.backend)
@pytest.mark.parametrize(
    ("builder", "problem"),
    [
        ({}, ""),
        ({"dcp_world_size": 2}, "decode context parallelism is not covered"),
        ({"use_pcp": True}, "prefill context parallelism is not covered"),
        ({"non_causal_multi_token_decode": True}, builders.NON_CAUSAL.why),
    ],
)
def test_what_is_refused_is_named(row: BuilderRow, builder: dict[str, Any], problem: str) -> None:
    assert row.refused(SimpleNamespace(**builder)) == problem


@pytest.mark.parametrize(
    ("settings", "invariant", "why"),
    [
        ({}, False, ""),
        ({"verify": 1}, False, schedules.UNVERIFIED),
        ({}, True, "VLLM_BATCH_INVARIANT is not covered"),
    ],
)
def test_what_leaves_the_draft_unfused_is_named(
    install: Install, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], invariant: bool, why: str
) -> None:
    """By doctor, too. vLLM itself refuses FLASHMLA where it is to be batch-invariant."""
    monkeypatch.setattr("vllm.envs.VLLM_BATCH_INVARIANT", invariant, raising=False)
    host, adapter = install("graph", **settings)
    assert DenseDraft(LAYOUTS["FLASH_ATTN_MLA"], 3).fused == (not why)
    plans = {plan.path: plan for plan in adapter.paths(host)}
    for row in ROWS:
        plan = plans[f"draft decode with {row.backend}"]
        assert (plan.strategy, plan.why) == ("off" if why else "graph", why)


def test_a_builder_of_intel_gpus_is_left_alone() -> None:
    path = f"{builders.FLASH_ATTN_MLA.module}.XPUFlashAttnMLAMetadataBuilder"
    assert "Intel" in builders.ROWS[path].left_alone


def test_model_runner_v1_rebuilds_and_says_why() -> None:
    (builder,) = DenseDraft(LAYOUTS["FLASHMLA, bf16"], 3).builders
    keeper, why = keeper_of(SimpleNamespace(get_metadata_builder=lambda: builder))
    assert keeper is None and why == f"FlashMLAMetadataBuilder: {schedules.NOT_KEPT}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_switching_off_and_on(install: Install, layout: str) -> None:
    expected = rebuilt(layout)
    host, _ = install("graph")
    draft = DenseDraft(LAYOUTS[layout], 4)
    for on in (False, True, False):
        host.switch(on, "test")
        with mock.patch.object(v2_step.Step, "run", autospec=True, side_effect=v2_step.Step.run) as run:
            assert unequal(expected, proposals(draft, FEW)) == set()
        assert run.called == on


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_error_in_the_step_leaves_vllms_results_right(
    install: Install, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    expected = rebuilt(layout)
    host, _ = install("graph")
    monkeypatch.setattr(step_update.StepUpdate, "run", mock.Mock(side_effect=RuntimeError("planted")))
    draft = DenseDraft(LAYOUTS[layout], 4)
    assert draft.fused and unequal(expected, proposals(draft, FEW)) == set() and sum(host.fallbacks.values()) == 1


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("layout", ["FLASH_ATTN_MLA", "FLASHMLA, fp8"])
def test_after_an_error_in_a_schedule_vllm_drafts_unfused(install: Install, layout: str, alone: bool) -> None:
    """The graph holds a schedule of other lengths: it is left alone, unless other ranks share it."""
    expected = rebuilt(layout)
    host, _ = install("graph")
    draft = DenseDraft(LAYOUTS[layout], 4)
    wrong = torch.zeros(1, dtype=torch.int32)
    scheduler = {"flashattn_mla": "get_scheduler_metadata", "flashmla": "get_mla_metadata_dense_fp8"}
    module, name = LAYOUTS[layout].module, scheduler[LAYOUTS[layout].module.rpartition(".")[2]]
    with mock.patch(f"{module}.{name}", lambda *_, **__: wrong if name.startswith("get_sched") else (wrong, wrong)):
        draft.warm_up()
    assert draft.fused and sum(host.fallbacks.values()) >= 1
    v2_switch.of(host, draft.speculator).alone = alone
    unfused = draft.speculator._multi_step_decode
    with mock.patch.object(draft.speculator, v2_switch.UNFUSED, side_effect=unfused) as called:
        assert unequal(expected, proposals(draft, FEW)) == set()
    assert called.call_count == (len(FEW) if alone else 1)  # a batch that no graph holds may always be
