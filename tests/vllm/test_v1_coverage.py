"""What of Model Runner V1 is served and what is left to vLLM, by name; installing and undoing."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.attention.backends.mla import flashmla_sparse, indexer
from vllm.v1.spec_decode.gemma4 import Gemma4Proposer
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

from nsa_plugin.adapters.vllm import builders
from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.adapters.vllm.builders import FLASHMLA_SPARSE
from nsa_plugin.adapters.vllm.ledger import v1_patches
from nsa_plugin.adapters.vllm.v1 import proposer as v1_proposer
from nsa_plugin.adapters.vllm.v1.proposer import BUILD, UPDATE, unsupported
from nsa_plugin.adapters.vllm.v1.steps import keeper_of
from nsa_plugin.host import Host
from nsa_plugin.rigs.vllm.v1_draft import V1Draft, proposals, reference
from tests.vllm.drafts import assert_same

Install = Callable[[], Host]


def test_undo_restores_the_proposer_by_identity_and_install_can_be_repeated() -> None:
    before = dict(vars(SpecDecodeBaseProposer))
    host, patch = Host(), v1_patches()
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


def test_a_group_that_was_not_examined_is_rebuilt(
    install_v1: Install, hopper: None, caplog: pytest.LogCaptureFixture
) -> None:
    class Builder(indexer.DeepseekV32IndexerMetadataBuilder):  # type: ignore[misc]
        """Might do anything."""

    draft = V1Draft("fp8_ds_mla", 64, 3)
    draft.proposer.draft_attn_groups[1].metadata_builders[0].__class__ = Builder
    want = reference(draft)
    host = install_v1()
    logging.getLogger("vllm").propagate = True
    with caplog.at_level("INFO", "vllm.plugins.nsa_plugin"):
        have = proposals(draft)
    assert_same(want, have)
    assert "vLLM rebuilds Builder: not examined" in caplog.text and not host.fallbacks


def test_a_draft_none_of_whose_groups_is_kept_is_made_right(
    install_v1: Install, hopper: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    draft = V1Draft("auto", 4, 3)
    want = reference(draft)
    monkeypatch.setattr(builders, "ROWS", {})
    install_v1()
    logging.getLogger("vllm").propagate = True
    with caplog.at_level("INFO", "vllm.plugins.nsa_plugin"):
        have = proposals(draft)
    assert_same(want, have)
    assert "off (vLLM rebuilds every attention group" in caplog.text


def test_groups_that_are_made_anew_are_looked_at_anew(install_v1: Install, hopper: None) -> None:
    draft, other = V1Draft("auto", 4, 3), V1Draft("fp8_ds_mla", 64, 3)
    install_v1()
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
    parallel = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1}
    features = ("parallel_drafting", "constant_draft_positions", "needs_extra_input_slots", "uses_mrope")
    config = SimpleNamespace(parallel_config=SimpleNamespace(**parallel | attributes))
    proposer = dict.fromkeys(features, False) | {"vllm_config": config, "draft_attn_groups": []} | attributes
    assert problem in unsupported(SimpleNamespace(**proposer))


def test_a_proposer_with_methods_of_its_own_is_left_alone(install_v1: Install) -> None:
    install_v1()
    patch = v1_proposer.Patch(Host(), SpecDecodeBaseProposer, print, print, lambda: True)
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
    if not hasattr(group, "map_to_kernel_block_table"):
        pytest.skip("this vLLM's groups map no blocks")
    group.kernel_block_size = 32
    assert "kernel blocks" in keeper_of(group)[1]


def test_metadata_with_an_unknown_field_is_rebuilt(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later vLLM may compute it from the lengths of a step."""
    known: Any = FLASHMLA_SPARSE.fields
    path = f"{FLASHMLA_SPARSE.module}.FlashMLASparseMetadata"
    monkeypatch.setitem(known, path, known[path] - {"num_reqs"})
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
        before, patcher = dict(vars(SpecDecodeBaseProposer)), v1_patches()
        problems = patcher.probe() + [keeper_of(group)[1] for group in draft.proposer.draft_attn_groups]
        patcher.install(Host())
        after = dict(vars(SpecDecodeBaseProposer))
        patcher.undo()
    assert name in "".join(problems)
    if owner is SpecDecodeBaseProposer:
        assert after == before


AUTOLOAD = """
import importlib, sys
from nsa_plugin.adapters.vllm.ledger import v1_patches
from nsa_plugin.adapters.vllm.v1.proposer import UPDATE
from nsa_plugin.host import Host
patch, name = v1_patches(), "vllm.v1.spec_decode.llm_base_proposer"
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
    said = [line for line in done.stdout.splitlines() if line.startswith(("patched", "undone"))]  # vLLM 0.28 logs there
    assert said == ["patched: True", "undone: True"]
