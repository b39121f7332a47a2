"""Model Runner V1's draft: every field of the metadata equal to vLLM's own rebuild at every step; errors of ours."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backends.mla import flashinfer_mla_sparse

from nsa_plugin import host as host_module
from nsa_plugin.adapters.vllm.ledger import v1_patches
from nsa_plugin.adapters.vllm.v1 import kept as v1_kept
from nsa_plugin.adapters.vllm.v1 import proposer as v1_proposer
from nsa_plugin.adapters.vllm.v1 import steps as v1_steps
from nsa_plugin.adapters.vllm.v1.kept import KeptSteps
from nsa_plugin.adapters.vllm.v1.proposer import PATH
from nsa_plugin.adapters.vllm.v1.steps import DraftSteps, keeper_of
from nsa_plugin.host import Host
from nsa_plugin.rigs.vllm.drafts import ATTENTION, BATCHES, INDEXER, LAYOUTS
from nsa_plugin.rigs.vllm.v1_draft import ALL_BATCHES, V1Draft, differing, proposals, reference
from tests.vllm.drafts import SOME, assert_same

Install = Callable[[], Host]
REQUEST_MAP = "attn.req_id_per_token"


@pytest.mark.parametrize(("layout", "tokens"), SOME)
def test_every_step_equals_a_rebuild(install_v1: Install, family: int, layout: str, tokens: int) -> None:
    draft = V1Draft(*LAYOUTS[layout], tokens)
    want = reference(draft)
    assert len(want) == len(ALL_BATCHES) * (tokens - 1)
    host = install_v1()
    assert_same(want, proposals(draft))
    assert_same(want, proposals(draft))  # from what was kept
    assert not host.fallbacks


@pytest.mark.parametrize("backend", ["FlashInferMLASparseSM120Backend", "FlashInferMLASparseTRTLLMBackend"])
def test_flashinfers_sparse_attention(install_v1: Install, family: int, backend: str) -> None:
    draft = V1Draft("auto", 4, 3, attention=getattr(flashinfer_mla_sparse, backend))
    want = reference(draft)
    host = install_v1()
    assert_same(want, proposals(draft))
    assert_same(want, proposals(draft))
    assert all(keeper_of(group)[0] is not None for group in draft.proposer.draft_attn_groups) and not host.fallbacks


def test_stock_vllm_is_wrong_and_is_no_reference(install_v1: Install, hopper: None) -> None:
    """Its request map is that of the target's tokens, where [0, 1, 2] is right: every request reads request 0's blocks."""
    draft = V1Draft("auto", 4, 3)
    want, stock = reference(draft, BATCHES[1:2]), proposals(draft, BATCHES[1:2])
    assert [step[REQUEST_MAP].tolist() for step in want] == [[0, 1, 2]] * 2
    if [step[REQUEST_MAP].tolist() for step in stock] == [[0, 1, 2]] * 2:
        pytest.skip("this vLLM makes the request map on the host for every step, as those before 0.31 do")
    assert [step[REQUEST_MAP].tolist() for step in stock] == [[0, 0, 0]] * 2
    install_v1()
    assert [step[REQUEST_MAP].tolist() for step in proposals(draft, BATCHES[1:2])] == [[0, 1, 2]] * 2


def test_rows_that_pad_a_cuda_graph(install_v1: Install, hopper: None) -> None:
    draft = V1Draft("fp8_ds_mla", 64, 3)

    def padded(tokens: int, use_cudagraphs: bool = True) -> tuple[CUDAGraphMode, int, None]:
        return CUDAGraphMode.NONE, -(-tokens // 80) * 80, None  # more than max_num_seqs

    draft.proposer._determine_batch_execution_and_padding = padded
    want = reference(draft)
    assert (want[0]["context slots"][len(BATCHES[0][0]) :] == -1).all() and len(want[0]["context slots"]) == 80
    host = install_v1()
    assert_same(want, proposals(draft))
    assert not host.fallbacks


def test_fewer_tokens_than_configured(install_v1: Install, hopper: None) -> None:
    """Dynamic speculative decoding decides for every batch."""
    draft = V1Draft("auto", 4, 4)
    varied = [(*BATCHES[0], None, tokens) for tokens in (4, 1, 2, 0, 3, 4)]
    want = reference(draft, varied)
    host = install_v1()
    assert_same(want, proposals(draft, varied))
    assert len(want) == 3 + 0 + 1 + 0 + 2 + 3 and not host.fallbacks


def test_only_some_batch_shapes_are_kept(install_v1: Install, hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(v1_steps, "KEPT_BATCHES", 2)
    draft = V1Draft("fp8_ds_mla", 64, 3)
    want = reference(draft, ALL_BATCHES * 2)
    host = install_v1()
    most, bind = [0], DraftSteps._bind

    def watched(steps: DraftSteps, *args: Any) -> Any:
        bound = bind(steps, *args)
        most[0] = max(most[0], len(steps._bound))
        return bound

    monkeypatch.setattr(DraftSteps, "_bind", watched)
    assert_same(want, proposals(draft, ALL_BATCHES * 2))
    assert most == [2] and not host.fallbacks


def test_what_the_batch_holds_after_a_draft(install_v1: Install, hopper: None) -> None:
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
            install_v1()
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
    host, patch = Host(), v1_patches()
    patch.install(host)
    try:
        assert_same(want, proposals(draft, made))
        assert_same(want, proposals(draft, made))
    finally:
        patch.undo()
    assert not host.fallbacks


@pytest.mark.parametrize("field", ["schedule", "lengths", "request map"])
def test_the_check_can_fail(install_v1: Install, hopper: None, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    draft = V1Draft("auto", 4, 4)
    want = reference(draft)
    install_v1()
    if field == "schedule":
        monkeypatch.setattr(v1_kept, "_schedule", lambda builder: None)
    if field == "lengths":
        at = KeptSteps.at
        monkeypatch.setattr(KeptSteps, "at", lambda kept, step, longest: at(kept, 0, longest))
    if field == "request map":
        draft.proposer.arange = torch.zeros_like(draft.proposer.arange)
    have = proposals(draft)
    assert any(differing(theirs, ours) for theirs, ours in zip(want, have, strict=True))


def planted(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("planted")


@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [
        (v1_proposer, "DraftSteps", 0),  # set-up
        (host_module, "bind_draft_steps", 0),  # the first draft step's positions
        (torch, "_foreach_copy_", 0),  # a later one's
        (DraftSteps, "metadata", 0),
        (v1_kept, "copy", 0),  # keeping what vLLM built
        (KeptSteps, "at", 0),
        (KeptSteps, "at", 4),  # the second group of a later step
    ],
)
def test_an_error_of_ours_leaves_vllms_results_right(
    install_v1: Install, hopper: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    owner: Any, name: str, at: int,
) -> None:  # fmt: skip
    draft = V1Draft("fp8_ds_mla", 64, 4)
    want, bounds = [], []
    for batch in BATCHES[:4]:
        want += reference(draft, [batch])
        bounds.append(draft.last_batch.seq_lens_cpu_upper_bound.tolist())
    host = install_v1()
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


def test_the_layers_get_the_metadata_of_their_group(install_v1: Install, hopper: None) -> None:
    draft = V1Draft("auto", 4, 3)
    install_v1()
    for step in proposals(draft):
        assert step["layers"] == sorted([ATTENTION, INDEXER])
