"""Nothing reads the wide page table in a draft decode with fused top-k, so it is left out there and nowhere else."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention import dsa_backend
from sglang.srt.layers.attention.dsa import dsa_indexer, dsa_topk_backend

from nsa_plugin.adapters.sglang import backends
from nsa_plugin.rigs.sglang import backends as kit
from tests.sglang.batches import CONFIG, TABLE, capture_batch
from tests.sglang.conftest import Install


def reads(module: Any) -> dict[str, list[tuple[str, ...]]]:
    """For each function of a module that reads `….page_table_1` or calls `get_page_table_1()`: the conditions around it.

    A condition is the source of an `if` test, "not (…)" in its else branch, or "assert" for an assertion.
    """
    found: dict[str, list[tuple[str, ...]]] = {}

    def visit(node: ast.AST, function: str, around: tuple[str, ...]) -> None:
        if isinstance(node, ast.FunctionDef):
            function, around = node.name, ()
        is_read = isinstance(node, ast.Attribute) and node.attr in ("page_table_1", "get_page_table_1")
        if is_read and isinstance(node.ctx, ast.Load):  # type: ignore[attr-defined]
            found.setdefault(function, []).append(around)
        if isinstance(node, ast.If):
            test = ast.unparse(node.test)
            visit(node.test, function, around)
            for statement in node.body:
                visit(statement, function, (*around, test))
            for statement in node.orelse:
                visit(statement, function, (*around, f"not ({test})"))
            return
        if isinstance(node, ast.Assert):
            around = (*around, "assert")
        for child in ast.iter_child_nodes(node):
            visit(child, function, around)

    visit(ast.parse(inspect.getsource(module)), "", ())
    return found


def test_attention_reads_it_only_without_fused_topk() -> None:
    """`forward_decode` and what it calls; all other functions that read it prepare metadata, or are for other modes."""
    by_function = reads(dsa_backend)
    for function in ("forward_decode", "_forward_trtllm"):
        assert by_function[function], function
        for around in by_function[function]:
            assert "not (self.use_fused_topk)" in around, (function, around)
    assert by_function.keys() - {"forward_decode", "_forward_trtllm"} <= OTHER_READERS


OTHER_READERS = {
    "_apply_cuda_graph_metadata",  # passes it to the metadata kernels, which take None
    "_graph_page_table_width",  # None: takes the token table's width
    "forward_extend",  # prefill, verify, draft extend
    "init_forward_metadata_out_graph",  # of the multi-step backend: sglang's own preparation
    "prepare_mtp_seed_indices",  # prefill and draft extend
}
"""Functions that read it and that no draft decode calls while a plugin prepares its metadata."""


def test_the_indexer_reads_it_only_on_rocm_and_the_topk_only_in_its_legacy_transform() -> None:
    for function, places in reads(dsa_indexer).items():
        assert all(any("_is_hip" in condition for condition in around) for around in places), function
    topk = reads(dsa_topk_backend)
    assert set(topk) == {"topk_transform"}
    source = inspect.getsource(dsa_topk_backend.DSATopKBackend.topk_transform)
    legacy = source.index("assert attn_metadata.page_table_1 is not None")  # refuses None, never reads garbage
    assert all(at > legacy for at in (source.find("page_table_1[batch"), source.find("page_table_1.contiguous")))
    assert source.index("_topk_transform_v2_paged(") < legacy


def test_topk_of_a_draft_decode_takes_the_kernel_that_reads_the_real_table(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang's own dispatch, with the metadata that a draft backend then holds."""
    monkeypatch.setattr(dsa_topk_backend, "_topk_transform_v2_paged", lambda *arguments: "v2")
    install("auto")
    multi = kit.make_multi_step(CONFIG, TABLE, 3)
    multi.init_forward_metadata_out_graph(capture_batch("DECODE", 4), in_capture=True)
    for backend in multi.attn_backends:
        metadata = backend.forward_metadata
        assert metadata.page_table_1 is None
        chosen = backend.dsa_topk_backend.topk_transform(
            torch.zeros(4, CONFIG.width), metadata.dsa_seqlens_expanded, CONFIG.index_topk,
            dsa_topk_backend.TopkTransformMethod.PAGED, metadata,
        )  # fmt: skip
        assert chosen == "v2"


@pytest.mark.parametrize(
    ("change", "dropped"),
    [
        ({}, True),
        ({"use_fused_topk": False}, False),
        ({"hisparse_coordinator": "one"}, False),
        ({"dsa_index_topk": 4096}, False),
        ({"physical_page_size": 1}, False),
    ],
    ids=str,
)
def test_it_is_dropped_where_sglang_itself_drops_it_without_speculation(
    install: Install, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], dropped: bool
) -> None:
    install("share")
    multi = kit.make_multi_step(kit.Config(page_size=change.get("physical_page_size", 64)), TABLE, 3)
    for backend in multi.attn_backends:
        vars(backend).update(change)
    multi.init_forward_metadata_out_graph(capture_batch("DECODE", 2), in_capture=True)
    assert all((backend.forward_metadata.page_table_1 is None) == dropped for backend in multi.attn_backends)
    assert multi.attn_backends[0].speculative_num_draft_tokens == CONFIG.draft_tokens


def test_a_question_that_fails_steps_down_like_any_error_of_ours(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends.MultiStepDraft, "wide_table_is_unread", lambda self, backend: 1 / 0)
    host, _ = install("share")
    multi = kit.make_multi_step(CONFIG, TABLE, 3)
    multi.init_forward_metadata_out_graph(capture_batch("DECODE", 2), in_capture=True)
    assert [cause[3:] for cause in host.fallbacks] == [("share", "ZeroDivisionError")]
    assert all(backend.forward_metadata.page_table_1 is not None for backend in multi.attn_backends)
