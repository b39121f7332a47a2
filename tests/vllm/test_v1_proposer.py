"""Model Runner V1's draft: every field of the metadata equal to vLLM's own rebuild at every step, and undone without a trace."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backends.mla import flashinfer_mla_sparse, flashmla_sparse, indexer
from vllm.v1.spec_decode.eagle import EagleProposer
from vllm.v1.spec_decode.gemma4 import Gemma4Proposer
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

from nsa_plugin.adapters.vllm import v1_metadata, v1_proposer
from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.adapters.vllm.v1_metadata import KEPT, KeptSteps, keeper_of
from nsa_plugin.adapters.vllm.v1_proposer import BUILD, PATH, UPDATE, DraftSteps, unsupported
from nsa_plugin.adapters.vllm.v1_proposer import V1Draft as Patch
from nsa_plugin.core.draft_steps import bind_draft_steps
from nsa_plugin.host import Host
from tests.vllm.v1_harness import ATTENTION, INDEX, Step, V1Draft, caches_cleared, differing, emulate_cuda

LAYOUTS = {"bf16": ("auto", 4), "fp8 mixed": ("fp8_ds_mla", 4), "fp8 separate": ("fp8_ds_mla", 64)}
REQUEST_MAP = "attn.req_id_per_token"
BATCHES: tuple[tuple[Any, ...], ...] = (
    ([100, 107, 126], [1, 0, 2], 1),
    ([63, 64, 700], [0, 0, 0], 70),  # the same shape, other blocks
    ([300], [1], 140),
    ([1000, 1019, 1024, 12], [0, 1, 0, 2], 7),  # past the model's maximal length, at different steps
    ([1022, 1023, 1024], [0, 0, 0], 7),
    ([200, 64, 90], None, 11, [1, 4, 2]),  # unpadded drafter batch
    ([200, 64, 90, 333], [0, 0, 0, 0], 11, [1, 3, 64, 333]),  # two requests are in prefill
)
Install = Callable[[], Host]


@pytest.fixture
def install() -> Iterator[Install]:
    """Installs the patch; undoes it after the test."""
    patches: list[Patch] = []

    def install() -> Host:
        host = Host()
        patches.append(Patch())
        patches[-1].install(host)
        return host

    yield install
    for patch in patches:
        patch.undo()


@pytest.fixture(params=[90, 100])
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The indexer builder's branches for Hopper or Blackwell, with a stand-in for DeepGEMM."""
    emulate_cuda(monkeypatch.setattr, request.param)
    return int(request.param)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The indexer builder's branches for Hopper."""
    emulate_cuda(monkeypatch.setattr, 90)


def proposals(draft: V1Draft, batches: Any = BATCHES) -> list[Step]:
    """What every draft step of every batch saw; no more tokens are rejected than there are."""
    seen = []
    for lengths, rejected, *rest in batches:
        fewer = None if rejected is None else [min(count, draft.tokens) for count in rejected]
        seen += draft.propose(lengths, fewer, *rest)
    return seen


def reference(draft: V1Draft, batches: Any = BATCHES) -> list[Step]:
    """vLLM's own rebuild at every step."""
    with caches_cleared():
        return proposals(draft, batches)


def assert_same(want: list[Step], have: list[Step]) -> None:
    for index, (theirs, ours) in enumerate(zip(want, have, strict=True)):
        assert not (wrong := differing(theirs, ours)), f"step {index}: {wrong}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [2, 3, 4, 8])
def test_every_step_equals_a_rebuild(install: Install, family: int, layout: str, tokens: int) -> None:
    draft = V1Draft(*LAYOUTS[layout], tokens)
    want = reference(draft)
    assert len(want) == len(BATCHES) * (tokens - 1)
    host = install()
    assert_same(want, proposals(draft))
    assert_same(want, proposals(draft))  # from what was kept
    assert not host.fallbacks


@pytest.mark.parametrize("backend", ["FlashInferMLASparseSM120Backend", "FlashInferMLASparseTRTLLMBackend"])
def test_flashinfers_sparse_attention(install: Install, family: int, backend: str) -> None:
    draft = V1Draft("auto", 4, 3, attention=getattr(flashinfer_mla_sparse, backend))
    want = reference(draft)
    host = install()
    assert_same(want, proposals(draft))
    assert_same(want, proposals(draft))
    assert all(keeper_of(group)[0] is not None for group in draft.proposer.draft_attn_groups) and not host.fallbacks


def test_stock_vllm_is_wrong_and_is_no_reference(install: Install, hopper: None) -> None:
    """Its request map is that of the target's tokens, where [0, 1, 2] is right: every request reads request 0's blocks."""
    draft = V1Draft("auto", 4, 3)
    want, stock = reference(draft, BATCHES[:1]), proposals(draft, BATCHES[:1])
    assert [step[REQUEST_MAP].tolist() for step in want] == [[0, 1, 2]] * 2
    assert [step[REQUEST_MAP].tolist() for step in stock] == [[0, 0, 0]] * 2
    install()
    assert [step[REQUEST_MAP].tolist() for step in proposals(draft, BATCHES[:1])] == [[0, 1, 2]] * 2


def test_rows_that_pad_a_cuda_graph(install: Install, hopper: None) -> None:
    draft = V1Draft("fp8_ds_mla", 64, 3)

    def padded(tokens: int, use_cudagraphs: bool = True) -> tuple[CUDAGraphMode, int, None]:
        return CUDAGraphMode.NONE, -(-tokens // 80) * 80, None  # more than max_num_seqs

    draft.proposer._determine_batch_execution_and_padding = padded
    want = reference(draft)
    assert (want[0]["context slots"][3:] == -1).all() and len(want[0]["context slots"]) == 80
    host = install()
    assert_same(want, proposals(draft))
    assert not host.fallbacks


def test_fewer_tokens_than_configured(install: Install, hopper: None) -> None:
    """Dynamic speculative decoding decides for every batch."""
    draft = V1Draft("auto", 4, 4)
    varied = [(*BATCHES[0], None, tokens) for tokens in (4, 1, 2, 0, 3, 4)]
    want = reference(draft, varied)
    host = install()
    assert_same(want, proposals(draft, varied))
    assert len(want) == 3 + 0 + 1 + 0 + 2 + 3 and not host.fallbacks


def test_what_the_batch_holds_after_a_draft(install: Install, hopper: None) -> None:
    """All but the lengths, of which the model runner's own tensor is not advanced: it writes them anew for each batch."""
    draft = V1Draft("auto", 4, 4)
    names = (
        "max_seq_len",
        "seq_lens_cpu_upper_bound",
        "slot_mapping",
        "seq_lens",
        "num_actual_tokens",
        "query_start_loc",
    )
    left = []
    for patched in (False, True):
        if patched:
            install()
        for batch in BATCHES[:4]:
            reference(draft, [batch]) if not patched else proposals(draft, [batch])
            left.append({name: getattr(draft.last_batch, name) for name in names})
            left[-1] = {name: value.clone() if torch.is_tensor(value) else value for name, value in left[-1].items()}
            left[-1]["positions"] = draft.proposer.positions.clone()
            left[-1]["slots"] = draft.proposer._slot_mapping_buffer.clone()
    assert_same(left[:4], left[4:])


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.lists(st.tuples(st.integers(5, 1024), st.integers(0, 4)), min_size=1, max_size=9), st.integers(1, 900)),
                min_size=1, max_size=4))  # fmt: skip
def test_any_batches_one_after_another(hopper: None, batches: list[tuple[list[tuple[int, int]], int]]) -> None:
    draft = V1Draft("fp8_ds_mla", 64, 4)
    made = [([length for length, _ in rows], [count for _, count in rows], block) for rows, block in batches]
    want = reference(draft, made)
    host, patch = Host(), Patch()
    patch.install(host)
    try:
        assert_same(want, proposals(draft, made))
        assert_same(want, proposals(draft, made))
    finally:
        patch.undo()
    assert not host.fallbacks


@pytest.mark.parametrize("field", ["schedule", "lengths", "request map"])
def test_the_check_can_fail(install: Install, hopper: None, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    draft = V1Draft("auto", 4, 4)
    want = reference(draft)
    install()
    if field == "schedule":
        monkeypatch.setattr(v1_metadata, "_schedule", lambda builder: None)
    if field == "lengths":
        at = KeptSteps.at
        monkeypatch.setattr(KeptSteps, "at", lambda kept, step, longest: at(kept, 0, longest))
    if field == "request map":
        draft.proposer.arange = torch.zeros_like(draft.proposer.arange)
    have = proposals(draft)
    assert any(differing(theirs, ours) for theirs, ours in zip(want, have, strict=True))


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that are no views, Triton launches, and DeepGEMM calls, whose insides it leaves out."""

    VIEWS = ("slice", "view", "unsqueeze", "select", "alias", "detach", "expand", "as_strided")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.inside = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(op).removeprefix("aten.").split(".")[0]
        if not self.inside and name not in self.VIEWS:
            self.counts[name] += 1
        return op(*args, **(kwargs or {}))

    @contextmanager
    def whole(self, name: str) -> Iterator[None]:
        """Count what happens here as one."""
        self.counts[name] += not self.inside
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


def counted(draft: V1Draft, monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """Operations of each draft step's metadata, of a batch whose like has been drafted before."""
    steps: list[Counter[str]] = []
    proposals(draft, BATCHES[:1])
    with monkeypatch.context() as patch:
        current = Count()

        def whole(name: Callable[..., str], call: Callable[..., Any]) -> Callable[..., Any]:
            def counting(*args: Any, **kwargs: Any) -> Any:
                with current.whole(name(*args)):
                    return call(*args, **kwargs)

            return counting

        launch = interpreter.GridExecutor.__call__
        patch.setattr(
            interpreter.GridExecutor, "__call__", whole(lambda grid, *_: f"triton {grid.fn.__name__}", launch)
        )
        schedule = indexer.get_paged_mqa_logits_metadata
        patch.setattr(indexer, "get_paged_mqa_logits_metadata", whole(lambda *_: "deepgemm schedule", schedule))
        stock_update, stock_build = getattr(EagleProposer, UPDATE), getattr(EagleProposer, BUILD)

        def update(proposer: Any, *args: Any) -> Any:
            with current:
                return stock_update(proposer, *args)

        def build(proposer: Any, *args: Any, draft_index: int = 0) -> Any:
            with current:
                out = stock_build(proposer, *args, draft_index=draft_index)
            if draft_index:
                steps.append(Counter(current.counts))
            current.counts.clear()
            return out

        patch.setattr(EagleProposer, UPDATE, update, raising=False)
        patch.setattr(EagleProposer, BUILD, build, raising=False)
        proposals(draft, BATCHES[1:2])
    return steps


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [2, 3, 4, 8])
def test_operations_per_draft_step(
    install: Install, hopper: None, monkeypatch: pytest.MonkeyPatch, layout: str, tokens: int
) -> None:
    draft = V1Draft(*LAYOUTS[layout], tokens)
    stock = counted(draft, monkeypatch)
    monkeypatch.setattr(v1_proposer, "bind_draft_steps", partial(bind_draft_steps, impl="triton"))
    install()
    monkeypatch.setattr(v1_proposer._Patch, "_unsupported", lambda patch, proposer: "")  # the counters are overrides
    ours = counted(draft, monkeypatch)
    for index, (theirs, mine) in enumerate(zip(stock, ours, strict=True)):
        print(
            f"{layout}, K = {tokens}, step {index + 1}: stock {theirs.total()} {dict(theirs)}, ours {mine.total()} {dict(mine)}"
        )
        assert theirs.total() >= 15
        expected = Counter({"deepgemm schedule": 1, "_foreach_copy_" if index else "triton draft_steps_kernel": 1})
        if index == tokens - 2:
            expected["add_"] = 1  # the host's bound of the lengths, once per draft
        assert mine == expected


def test_undo_restores_the_proposer_by_identity_and_install_can_be_repeated() -> None:
    before = dict(vars(SpecDecodeBaseProposer))
    host, patch = Host(), Patch()
    patch.install(host)
    changed = {name for name, value in vars(SpecDecodeBaseProposer).items() if value is not before[name]}
    assert changed == {UPDATE, BUILD}
    installed = dict(vars(SpecDecodeBaseProposer))
    patch.install(host)
    assert dict(vars(SpecDecodeBaseProposer)) == installed
    patch.undo()
    after = dict(vars(SpecDecodeBaseProposer))
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    patch.install(host)
    patch.undo()


def test_the_adapter_installs_and_undoes_it() -> None:
    before = vars(SpecDecodeBaseProposer)[UPDATE]
    adapter = VllmAdapter()
    assert adapter.install(Host()) == []
    assert vars(SpecDecodeBaseProposer)[UPDATE] is not before
    adapter.undo()
    assert vars(SpecDecodeBaseProposer)[UPDATE] is before


def planted(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("planted")


@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [
        (v1_proposer, "DraftSteps", 0),  # set-up
        (v1_proposer, "bind_draft_steps", 0),  # the first draft step's positions
        (torch, "_foreach_copy_", 0),  # a later one's
        (DraftSteps, "metadata", 0),
        (v1_metadata, "copy", 0),  # keeping what vLLM built
        (KeptSteps, "at", 0),
        (KeptSteps, "at", 4),  # the second group of a later step
    ],
)
def test_an_error_of_ours_leaves_vllms_results_right(
    install: Install, hopper: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    owner: Any, name: str, at: int,
) -> None:  # fmt: skip
    draft = V1Draft("fp8_ds_mla", 64, 4)
    want, bounds = [], []
    for batch in BATCHES[:4]:
        want += reference(draft, [batch])
        bounds.append(draft.last_batch.seq_lens_cpu_upper_bound.tolist())
    host = install()
    logging.getLogger("vllm").propagate = True
    original, calls = getattr(owner, name), Counter[str]()

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return original(*args, **kwargs) if calls[name] <= at else planted()

    monkeypatch.setattr(owner, name, SimpleNamespace(copy=fails) if name == "copy" else fails)
    if name == "copy":
        original = original.copy
    have = []
    for batch, bound in zip(BATCHES[:4], bounds, strict=True):
        have += proposals(draft, [batch])
        assert draft.last_batch.seq_lens_cpu_upper_bound.tolist() == bound
    assert_same(want, have)
    stage = "capture" if name == "DraftSteps" else "replay"
    assert host.fallbacks == {("vllm", PATH, stage, "copy", "RuntimeError"): 1}  # then it is left to vLLM
    errors = {id(record): record.getMessage() for record in caplog.records if record.levelname == "ERROR"}
    assert len(errors) == 1 and all("planted" in line for line in errors.values())


def test_a_group_that_was_not_examined_is_rebuilt(
    install: Install, hopper: None, caplog: pytest.LogCaptureFixture
) -> None:
    class Builder(indexer.DeepseekV32IndexerMetadataBuilder):  # type: ignore[misc]
        """Might do anything."""

    draft = V1Draft("fp8_ds_mla", 64, 3)
    draft.proposer.draft_attn_groups[1].metadata_builders[0].__class__ = Builder
    want = reference(draft)
    host = install()
    logging.getLogger("vllm").propagate = True
    with caplog.at_level("INFO", "vllm.plugins.nsa_plugin"):
        have = proposals(draft)
    assert_same(want, have)
    assert "vLLM rebuilds Builder: not examined" in caplog.text and not host.fallbacks


def test_a_draft_none_of_whose_groups_is_kept_is_made_right(
    install: Install, hopper: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    draft = V1Draft("auto", 4, 3)
    want = reference(draft)
    monkeypatch.setattr(v1_metadata, "KEPT", {})
    install()
    logging.getLogger("vllm").propagate = True
    with caplog.at_level("INFO", "vllm.plugins.nsa_plugin"):
        have = proposals(draft)
    assert_same(want, have)
    assert "off (vLLM rebuilds every attention group" in caplog.text


def test_groups_that_are_made_anew_are_looked_at_anew(install: Install, hopper: None) -> None:
    draft, other = V1Draft("auto", 4, 3), V1Draft("fp8_ds_mla", 64, 3)
    install()
    proposals(draft)
    draft.proposer.draft_attn_groups = list(other.proposer.draft_attn_groups)
    have = proposals(draft)
    assert_same(reference(draft), have)
    assert have[0]["attn.fp8_extra_metadata"] is not None


@pytest.mark.parametrize(
    ("attributes", "problem"),
    [
        ({"parallel_drafting": True}, "parallel drafting is not covered"),
        ({"constant_draft_positions": True}, "a draft that stays at one position is not covered"),
        ({"needs_extra_input_slots": True}, "a separate draft model is not covered"),
        ({"uses_mrope": True}, "M-RoPE is not covered"),
        ({"decode_context_parallel_size": 2}, "decode context parallelism is not covered"),
        ({"prefill_context_parallel_size": 2}, "prefill context parallelism is not covered"),
        ({}, "vLLM rebuilds every attention group"),
    ],
)
def test_proposers_that_are_not_covered_are_named(attributes: dict[str, Any], problem: str) -> None:
    config = SimpleNamespace(parallel_config=SimpleNamespace(**attributes))
    assert problem in unsupported(SimpleNamespace(vllm_config=config, draft_attn_groups=[], **attributes))


def test_a_proposer_with_methods_of_its_own_is_left_alone(install: Install) -> None:
    install()
    patch = v1_proposer._Patch(Host(), SpecDecodeBaseProposer, planted, planted)
    assert patch._unsupported(object.__new__(Gemma4Proposer)) == f"Gemma4Proposer has its own {BUILD}"


@pytest.mark.parametrize(
    ("group", "attributes", "reason"),
    [
        (0, {"dcp_world_size": 2}, "decode context parallelism"),
        (0, {"vllm_config": SimpleNamespace(attention_config=SimpleNamespace(hisparse_config=object()))}, "HiSparse"),
        (1, {"pcp_world_size": 2}, "prefill context parallelism"),
        (1, {"compress_ratio": 4}, "compressed indexer cache"),
    ],
)
def test_builders_that_are_not_covered_are_named(
    hopper: None, group: int, attributes: dict[str, Any], reason: str
) -> None:
    made = V1Draft("auto", 4, 3).proposer.draft_attn_groups[group]
    assert keeper_of(made)[0] is not None
    vars(made.get_metadata_builder()).update(attributes)
    keeper, why = keeper_of(made)
    assert keeper is None and reason in why


def test_a_group_whose_blocks_are_mapped_is_rebuilt(hopper: None) -> None:
    group = V1Draft("auto", 4, 3).proposer.draft_attn_groups[0]
    group.kernel_block_size = 32
    assert "kernel blocks" in keeper_of(group)[1]


def test_metadata_with_an_unknown_field_is_rebuilt(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later vLLM may compute it from the lengths of a step."""
    (name,) = (name for name in KEPT if name.endswith("FlashMLASparseMetadataBuilder"))
    known = KEPT[name].fields
    monkeypatch.setitem(known, "FlashMLASparseMetadata", known["FlashMLASparseMetadata"] - {"num_reqs"})
    keeper, why = keeper_of(V1Draft("auto", 4, 3).proposer.draft_attn_groups[0])
    assert keeper is None and "has fields that are not known here: num_reqs" in why


@pytest.mark.parametrize(
    ("owner", "name"),
    [(SpecDecodeBaseProposer, UPDATE), (flashmla_sparse, "FlashMLASparseMetadata"), (indexer, "get_paged_mqa_logits_metadata")],
)  # fmt: skip
def test_what_is_missing_leaves_vllm_alone(
    hopper: None, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    draft = V1Draft("auto", 4, 3)
    with monkeypatch.context() as patch:
        patch.delattr(owner, name)
        before, patcher = dict(vars(SpecDecodeBaseProposer)), Patch()
        problems = patcher.probe() + [keeper_of(group)[1] for group in draft.proposer.draft_attn_groups]
        patcher.install(Host())
        after = dict(vars(SpecDecodeBaseProposer))
        patcher.undo()
    assert name in "".join(problems)
    if owner is SpecDecodeBaseProposer:
        assert after == before


AUTOLOAD = """
import importlib, sys
from nsa_plugin.adapters.vllm.v1_proposer import UPDATE, V1Draft
from nsa_plugin.host import Host
patch, name = V1Draft(), "vllm.v1.spec_decode.llm_base_proposer"
patch.install(Host())
assert name not in sys.modules
proposer = importlib.import_module(name).SpecDecodeBaseProposer
print("patched:", hasattr(vars(proposer)[UPDATE], "__wrapped__"))
patch.undo()
print("undone:", not hasattr(vars(proposer)[UPDATE], "__wrapped__"))
"""


def test_the_proposer_is_patched_when_vllm_imports_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", AUTOLOAD], env=dict(os.environ), capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:2] == ["patched: True", "undone: True"]


def test_the_layers_get_the_metadata_of_their_group(install: Install, hopper: None) -> None:
    draft = V1Draft("auto", 4, 3)
    install()
    for step in proposals(draft):
        assert step["layers"] == sorted([ATTENTION, INDEX])
