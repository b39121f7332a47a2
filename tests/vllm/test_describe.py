"""vLLM's own batches of the shared requests give the metadata that sglang's give (see `tests.same_requests`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBuffers

from nsa_plugin.adapters.vllm.describe import DraftBatch, describe, describe_draft, geometry
from nsa_plugin.rigs.vllm.v2_draft import CPU, Draft, block_tables, without_pinned_memory
from tests import same_requests as shared

SIZE = len(shared.LENGTHS)


@pytest.fixture
def tables() -> BlockTables:
    """The runner's block tables, with the batch's rows gathered by vLLM's own kernel."""
    without_pinned_memory()
    made = block_tables(shared.BLOCK, 8, 64, shared.GEOMETRY.table_width // shared.BLOCK, CPU)
    for request, blocks in enumerate(shared.BLOCKS):
        made.append_block_ids(request, (list(blocks),), True)
    made.apply_staged_writes()
    made.gather_block_tables(torch.tensor(shared.ROWS, dtype=torch.int32), num_reqs_padded=SIZE)
    return made


def common(tables: BlockTables, tokens: int = 1) -> CommonAttentionMetadata:
    """What vLLM's runners make for the requests, with so many query tokens of each at the end."""
    starts = torch.arange(SIZE + 1, dtype=torch.int32) * tokens
    lengths = torch.tensor(shared.LENGTHS, dtype=torch.int32) + (tokens if tokens > 1 else 0)
    return CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lengths, num_reqs=SIZE,
        num_actual_tokens=SIZE * tokens, max_query_len=tokens, max_seq_len=int(lengths.max()),
        block_table_tensor=tables.input_block_tables[0][:SIZE], slot_mapping=torch.zeros(SIZE * tokens, dtype=torch.int64),
    )  # fmt: skip


def test_common_attention_metadata_gives_what_a_batch_of_sglang_gives(tables: BlockTables) -> None:
    decode = common(tables)
    batch = describe(decode, block_size=shared.BLOCK)
    assert batch.seq_lens is decode.seq_lens and batch.slots.block_table is decode.block_table_tensor  # type: ignore[union-attr]
    assert shared.differing(batch, (0,)) == []
    steps = tuple(range(1, shared.STEPS + 1))
    assert shared.differing(describe(decode, block_size=shared.BLOCK, draft_steps=shared.STEPS), steps) == []
    verify = describe(common(tables, shared.VERIFIED), block_size=shared.BLOCK)
    assert shared.differing(verify, (shared.VERIFIED,), shared.VERIFIED) == []


def test_the_buffers_of_model_runner_v2_give_the_same(tables: BlockTables) -> None:
    buffers = InputBuffers(8, 64, CPU)
    buffers.seq_lens[:SIZE] = (
        torch.tensor(shared.LENGTHS, dtype=torch.int32) + 1
    )  # as prepare_decode_inputs leaves them
    batch = describe_draft(DraftBatch(buffers, tables, SIZE, shared.STEPS))
    assert batch.seq_lens is buffers.seq_lens and batch.slots.block_table is tables.input_block_tables[0]  # type: ignore[union-attr]
    assert shared.differing(batch, tuple(range(1, shared.STEPS + 1))) == []


def test_ragged_query_tokens_are_refused(tables: BlockTables) -> None:
    ragged = torch.tensor([0, 2, 3, 4, 5, 6], dtype=torch.int32)
    batch = replace(common(tables, 2), query_start_loc=ragged, query_start_loc_cpu=ragged)
    with pytest.raises(ValueError, match=r"query tokens: expected 2 of each request, got \[2, 1, 1, 1, 1\]"):
        describe(batch, block_size=shared.BLOCK)


def test_geometry_and_planes_are_those_of_a_real_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the V2 speculator's own loop gives its model at each step is what is precomputed for all of them at once."""
    draft = Draft("auto", 4, 5)
    builder = next(builder for builder in draft.builders if hasattr(builder, "topk_tokens"))
    at_start: list[Any] = []
    begin = type(draft.speculator).on_multi_step_decode_begin

    def remember(speculator: Any, num_reqs: int) -> None:
        batch = describe_draft(
            DraftBatch(speculator.input_buffers, speculator.block_tables, num_reqs, draft.tokens - 1)
        )
        from nsa_plugin import PrecomputedMetadata, precompute

        made = geometry(builder, batch)
        at_start.append(precompute(batch, made, out=PrecomputedMetadata.allocate(batch, made, tokens=True)))
        begin(speculator, num_reqs)

    monkeypatch.setattr(type(draft.speculator), "on_multi_step_decode_begin", remember)
    seen = draft.propose([100, 1021, 1024], [1, 0, 2], 7)
    (metadata,) = at_start
    assert (metadata.geometry.index_topk, metadata.geometry.page_size, metadata.geometry.table_width) == (64, 64, 1024)
    assert len(seen) == len(metadata.steps) == 4
    for step, got in zip(metadata.steps, seen, strict=True):
        assert torch.equal(step.positions, got["positions"])
        assert torch.equal(step.slot_mapping, got["slots"])
        assert torch.equal(step.cache_seqlens, got["lengths"])
        pages = -(-got["lengths"] // 64)
        assert all(torch.equal(step.real_page_table[r, :n], got["blocks"][r, :n]) for r, n in enumerate(pages.tolist()))
