"""Drafts with pooled index keys on vLLM's own builders: every step equals a rebuild, and where vLLM's own update does not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from vllm.v1.attention.backends.mla import flashmla_sparse, indexer

from nsa_plugin import host as host_module
from nsa_plugin.adapters.base import UNPROVED
from nsa_plugin.adapters.probe import installed_version
from nsa_plugin.adapters.vllm import builders, releases
from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.adapters.vllm.v2 import plans, switch
from nsa_plugin.adapters.vllm.v2 import step as v2_step
from nsa_plugin.core.step_update import StepUpdate
from nsa_plugin.host import Host
from nsa_plugin.rigs.vllm.drafts import BATCHES
from nsa_plugin.settings import Settings
from tests.installing import installer
from tests.vllm.drafts import LARGE, POISONED, unequal_steps

if not hasattr(indexer, "KpoolTailMetadataBuilder") or installed_version("vllm") < "0.32":
    pytest.skip("this vLLM has no draft with pooled index keys to fuse", allow_module_level=True)

from nsa_plugin.rigs.vllm.v2_pooled import PooledDraft, Pools

Install = Callable[..., tuple[Host, VllmAdapter]]
Seen = list[dict[str, torch.Tensor]]
Batch = tuple[list[int], list[int], int]
EVERY: tuple[Batch, ...] = (*BATCHES, LARGE, BATCHES[1])
"""The fifth is larger than any captured size: it runs without a graph, and builds."""
pytestmark = pytest.mark.usefixtures("hopper")
BUFFERS = (*POISONED, "compressed_slot_mapping_buffer", "expanded_seq_lens_buffer", "slot_mapping_buffer")


def propose(draft: PooledDraft, batches: tuple[Batch, ...] = EVERY, poison: bool = True) -> Seen:
    """What every draft step of every batch saw, from buffers full of what nobody wrote."""
    seen = []
    for lengths, rejected, first_block in batches:
        for builder in draft.builders if poison else ():
            for name in BUFFERS:
                if hasattr(builder, name):
                    getattr(builder, name).fill_(3)
        seen += draft.propose(lengths, [min(count, draft.tokens) for count in rejected], first_block)
    return seen


def formulas(step: dict[str, torch.Tensor], pools: Pools, topk: int = 64) -> dict[str, torch.Tensor]:
    """What a step must see, in words of its positions and block tables; the tiny model's top-k is 64."""
    position, blocks, k, states = step["positions"], step["indexer blocks"], pools.ratio, 64
    pool = position // k
    row = torch.arange(len(position))
    slots = blocks[row, (pool // states).clamp(max=blocks.shape[1] - 1)].long() * states + pool % states
    length = position + 1
    return {
        "indexer lengths": (length // k).int(),
        "indexer slots": torch.where(length % k == 0, slots, -1),
        "planned tokens": torch.where(length <= topk, length, topk + length % k),
    }


@pytest.mark.parametrize(("tokens", "batches"), [(2, EVERY), (4, EVERY[2:]), (8, EVERY[3:5])])
def test_every_step_equals_a_rebuild(install: Install, tokens: int, batches: tuple[Batch, ...]) -> None:
    rebuilt = PooledDraft(tokens)
    expected = propose(rebuilt, batches, poison=False)
    assert not rebuilt.fused
    host, _ = install("graph")
    draft = PooledDraft(tokens)
    assert draft.fused
    assert unequal_steps(expected, propose(draft, batches)) == set() and not host.fallbacks
    assert len(expected) == (tokens - 1) * len(batches)


POOLS = st.builds(
    lambda ratio, per_block, ring: Pools(ratio, 64 * ratio * per_block, ratio * ring),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2, 4]),
)


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(POOLS, st.integers(2, 8), st.data())
def test_any_pools_and_lengths(pools: Pools, tokens: int, data: st.DataObject) -> None:
    k = pools.ratio
    edges = [tokens + 1, *(edge + more for edge in (8 * k, 64 * k, pools.block_size) for more in (-2, -1, 0, 1)), 1024]
    length = st.one_of(
        st.sampled_from([edge for edge in edges if tokens < edge <= 1024]), st.integers(tokens + 1, 1024)
    )
    batches = tuple(
        (data.draw(st.lists(length, min_size=1, max_size=6)), [0, 1, 2, 0, 1, 2], data.draw(st.integers(1, 200)))
        for _ in range(3)
    )
    batches = tuple((lengths, rejected[: len(lengths)], block) for lengths, rejected, block in batches)
    expected = propose(PooledDraft(tokens, pools), batches, poison=False)
    for step in expected:
        for name, value in formulas(step, pools).items():
            assert torch.equal(step[name], value), name
    installing = installer(VllmAdapter)
    host, _ = next(installing)("graph")
    try:
        draft = PooledDraft(tokens, pools)
        assert unequal_steps(expected, propose(draft, batches)) == set() and not host.fallbacks
    finally:
        next(installing, None)


def test_the_comparison_can_fail(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = propose(PooledDraft(3), BATCHES, poison=False)
    install("graph")
    monkeypatch.setattr(v2_step.Step, "run", lambda step: None)
    wrong = unequal_steps(expected, propose(PooledDraft(3), BATCHES))
    assert wrong >= {"indexer slots", "indexer lengths", "tail slots", "planned tokens", "request map", "slots"}


def test_auto_leaves_what_no_gpu_has_run(install: Install, log: Callable[[int], list[str]]) -> None:
    expected = propose(PooledDraft(3), BATCHES, poison=False)
    host, adapter = install()
    logging.getLogger("vllm.plugins.nsa_plugin").setLevel(logging.INFO)
    draft = PooledDraft(3)
    assert not draft.fused
    assert unequal_steps(expected, propose(draft, BATCHES)) == set() and not host.fallbacks
    assert any(f"FLASHINFER_MLA_SPARSE_SM90: strategy off ({UNPROVED})" in line for line in log(logging.INFO))
    (sparse,) = (plan for plan in adapter.paths(host) if plan.path.endswith("FLASHINFER_MLA_SPARSE_SM90"))
    assert (sparse.strategy, sparse.why) == ("off", UNPROVED)


def test_auto_fuses_no_draft_over_a_stale_tail(
    install: Install, log: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the tail were left out, FlashMLA-sparse alone would be served, and vLLM's own update of the tail run in its graph."""
    pools = Pools(2, 64, 4)
    made = {"pools": pools, "attention": flashmla_sparse.FlashMLASparseBackend}
    rebuilt: Any = PooledDraft(3, **made)
    expected = propose(rebuilt, poison=False)
    unproved = replace(builders.KPOOL_TAIL, proved=False)
    with monkeypatch.context() as patch:
        patch.setitem(builders.ROWS, unproved.builder, unproved)
        patch.setattr(builders, "POOLED", (builders.FLASHINFER_SPARSE_SM90, unproved))
        _, adapter = install()
        logging.getLogger("vllm.plugins.nsa_plugin").setLevel(logging.INFO)  # vLLM's first configuration sets it back
        assert not PooledDraft(3, **made).fused
        assert any(builders.KPOOL_TAIL.stale in line for line in log(logging.INFO))
        adapter.undo()
    host, _ = install()
    draft = PooledDraft(3, **made)
    assert draft.fused and unequal_steps(expected, propose(draft)) == set() and not host.fallbacks


class TestTheTailOfShippedVllm:
    """Whoever sees one of these fail: vLLM has mended its update, and `KPOOL_TAIL.stale` can go."""

    def test_after_capture_it_writes_the_null_block(self) -> None:
        """Captured with null blocks; a batch's blocks come into the tables only, as a fused replay has it."""
        draft = PooledDraft(3)
        captured = draft.graphs.captured[draft.layers[2]]
        draft.tables.input_block_tables[1][:4, 0] = torch.tensor([5, 6, 7, 9], dtype=torch.int32)
        captured.positions[:4] = torch.tensor([17, 30, 99, 44])
        draft.tail_builder.update_draft_decode_metadata(captured)
        right = torch.tensor([5, 6, 7, 9]) * 8 + torch.tensor([17, 30, 99, 44]) % 8
        assert not set(captured.slot_mapping.tolist()) & set(right.tolist())

    def test_after_an_eager_batch_it_writes_other_requests_blocks(self) -> None:
        draft = PooledDraft(3)
        captured = draft.graphs.captured[draft.layers[2]]
        blocks, position = torch.tensor([11, 12, 13, 14]), torch.tensor([17, 30, 99, 44])
        draft.propose(*BATCHES[0])  # built on the host: its requests have the blocks 1 to 4
        draft.tables.input_block_tables[1][:4, 0] = blocks.int()
        captured.positions[:4] = position
        draft.tail_builder.update_draft_decode_metadata(captured)
        assert captured.slot_mapping.tolist() == (torch.tensor([1, 2, 3, 4]) * 8 + position % 8).tolist()

    def test_the_plugin_is_right_in_both(self, install: Install) -> None:
        expected = propose(PooledDraft(3), (BATCHES[1], LARGE, BATCHES[0]), poison=False)
        install("graph")
        draft = PooledDraft(3)
        seen = propose(draft, (BATCHES[1], LARGE, BATCHES[0]), poison=False)
        assert draft.fused and unequal_steps(expected, seen) == set()
        first = seen[-2]
        assert (first["tail slots"] // 8).tolist() == [1, 2, 3, 4]


def test_one_launch_the_schedule_and_the_clamp(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("graph")
    draft = PooledDraft(4)
    propose(draft, (BATCHES[0],))
    launched: list[str] = []
    run, call = v2_step.Step.run, interpreter.GridExecutor.__call__

    class Counts(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            launched.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    def counted(executor: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(executor.fn.__name__)
        with torch.utils._python_dispatch._disable_current_modes():
            return call(executor, *args, **kwargs)

    def scheduled(*args: Any, **kwargs: Any) -> Any:
        launched.append("schedule")
        with torch.utils._python_dispatch._disable_current_modes():
            return real(*args, **kwargs)

    def step(self: Any) -> None:
        launched.append("|")
        with Counts():  # type: ignore[no-untyped-call]
            run(self)

    real = indexer.get_paged_mqa_logits_metadata
    monkeypatch.setattr(indexer, "get_paged_mqa_logits_metadata", scheduled)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    monkeypatch.setattr(v2_step.Step, "run", step)
    inside: list[list[str]] = []
    forward = draft.model.forward

    def forwarded(*args: Any, **kwargs: Any) -> Any:
        if "|" in launched:
            inside.append(launched[launched.index("|") + 1 :])
            launched.clear()
        return forward(*args, **kwargs)

    monkeypatch.setattr(draft.model, "forward", forwarded)
    draft.propose(*BATCHES[0])
    kernels = [[name for name in step if name not in ("view", "slice", "select", "detach")] for step in inside]
    assert all(step[0] == "step_update_kernel" for step in kernels)
    assert [sorted(step[1:]) for step in kernels] == [["_clamp_work_kv_end", "schedule"]] * 3


def test_a_plan_that_still_fits_is_kept(install: Install) -> None:
    install("graph")
    draft = PooledDraft(4)
    for shift in range(3):
        draft.propose([200 + shift, 300 + shift, 400 + shift, 500 + shift], [0] * 4, 1)
    assert draft.planner.plans == 2  # that of the captured batch, and one for lengths above the top-k


@pytest.mark.parametrize("requests", [4, 6])
def test_a_plan_fits_the_last_step_too(install: Install, requests: int) -> None:
    """Captured or not: an earlier plan has room for a batch's first step, not for its last."""
    batches = tuple(([length] * requests, [0] * requests, 1) for length in (20, 32, 52))
    expected = propose(PooledDraft(4), batches, poison=False)
    install("graph")
    assert unequal_steps(expected, propose(PooledDraft(4), batches)) == set()


@pytest.mark.parametrize("without_graph", [False, True], ids=["", "after a draft that no graph runs"])
def test_a_plan_that_is_elsewhere_is_not_replayed(
    install: Install, monkeypatch: pytest.MonkeyPatch, without_graph: bool
) -> None:
    expected = propose(PooledDraft(3), BATCHES, poison=False)
    host, _ = install("graph")
    draft = PooledDraft(3)
    propose(draft, (BATCHES[0],))
    places = plans._places
    monkeypatch.setattr(plans, "_places", lambda state: (*places(state), "moved"))
    if without_graph:
        (builder,) = plans.planning(draft.speculator)
        for known in tuple((plans.recorded.get(builder) or {}).values()):
            plans.clamp(builder, known.metadata)
    monkeypatch.setattr(draft.graphs, "run_fullgraph", lambda descriptor: pytest.fail("replayed"))
    assert unequal_steps(expected, propose(draft, BATCHES)) == set()
    assert sum(host.fallbacks.values()) == len(BATCHES)


def test_ranks_that_plan_for_batches_of_their_own_are_left_to_vllm(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose plan failed would leave its graph, and the others would wait in theirs."""
    install("graph")
    draft = PooledDraft(3)
    monkeypatch.setattr(draft.config.parallel_config, "data_parallel_size", 2)
    (builder,) = plans.planning(draft.speculator)
    assert "data parallelism" in builders.row_of(builder).refused(builder)


@pytest.mark.parametrize("failing", ["when bound", "in a step"])
def test_an_error_leaves_no_stale_tail(install: Install, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    expected = propose(PooledDraft(3), poison=False)
    host, _ = install("graph")

    def planted(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("planted")

    owner, name = (host_module, "StepUpdate") if failing == "when bound" else (StepUpdate, "run")
    monkeypatch.setattr(owner, name, planted)
    draft = PooledDraft(3)
    wrong = unequal_steps(expected, propose(draft))
    assert draft.fused and "tail slots" not in wrong and sum(host.fallbacks.values()) == 1
    assert not wrong & {"indexer lengths", "request map", "planned tokens", "slots"}


def test_a_speculator_with_other_parameters_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(speculator: Any, num_reqs: int, skip_attn: bool, batch_desc: Any) -> None: ...

    monkeypatch.setattr(releases, "FUSED_DRAFT", replace(releases.FUSED_DRAFT, path="vllm.absent.method"))
    assert switch.planned(Host(Settings()), begin) is begin


def test_verification_refuses_them_by_name(install: Install, log: Callable[[int], list[str]]) -> None:
    expected = propose(PooledDraft(3), BATCHES, poison=False)
    host, _ = install("graph", verify=1)
    draft = PooledDraft(3)
    draft.warm_up()
    assert draft.fused and unequal_steps(expected, propose(draft, BATCHES)) == set() and not host.fallbacks
    assert any("drafts with pooled index keys are not verified" in line for line in log(logging.WARNING))


def test_only_the_fused_draft_takes_them() -> None:
    assert builders.INDEXER.refused(SimpleNamespace(compress_ratio=4)) == builders.COMPRESSED.why
    host, draft = Host(), PooledDraft(3)
    for each in draft.builders:
        metadata = draft.graphs.captured[each.layer_names[0]]
        assert builders.changes_of(each, metadata, draft.sizes.captured, "rebuild", host) == "other"
        if isinstance(each, indexer.KpoolTailMetadataBuilder):  # in a draft that vLLM fuses by itself
            changes = builders.changes_of(each, metadata, draft.sizes.captured, "update", host)
            assert changes == "tail slots"
