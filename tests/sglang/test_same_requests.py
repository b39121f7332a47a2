"""sglang's own batches of the shared requests give the metadata that vLLM's give (see `tests.same_requests`)."""

from __future__ import annotations

from dataclasses import replace

import torch

from nsa_plugin import ForwardMode
from nsa_plugin.adapters.sglang.describe import describe
from nsa_plugin.rigs.sglang import backends as kit
from tests import same_requests as shared

TABLE = (shared.block_table()[:, :, None] * shared.BLOCK + torch.arange(shared.BLOCK)).flatten(1).to(torch.int32)
CONFIG = kit.Config(width=shared.GEOMETRY.table_width, max_requests=8, draft_tokens=shared.VERIFIED)


def test_a_forward_batch_gives_what_a_batch_of_vllm_gives() -> None:
    backend = kit.make_backend(CONFIG, TABLE)
    lengths, rows = torch.tensor(shared.LENGTHS), torch.tensor(shared.ROWS)
    decode = kit.make_batch("DECODE", lengths, rows)
    batch = describe(decode, backend=backend, mode=ForwardMode.DECODE)
    assert batch.seq_lens is decode.seq_lens and batch.slots.req_to_token is TABLE  # type: ignore[union-attr]
    assert shared.differing(batch, (0,)) == []
    steps = tuple(range(1, shared.STEPS + 1))  # sglang's own steps have no offsets; lengths as they really are have
    draft = describe(decode, backend=backend, mode=ForwardMode.DECODE, num_steps=shared.STEPS)
    assert shared.differing(replace(draft, step_offsets=steps), steps) == []
    verify = kit.make_batch("TARGET_VERIFY", lengths, rows, len(rows) * shared.VERIFIED)
    batch = describe(verify, backend=backend, mode=ForwardMode.TARGET_VERIFY)
    assert shared.differing(batch, (shared.VERIFIED,), shared.VERIFIED) == []


def test_the_comparison_can_fail() -> None:
    backend = kit.make_backend(CONFIG, TABLE)
    other = kit.make_batch("DECODE", torch.tensor(shared.LENGTHS) + 1, torch.tensor(shared.ROWS).flip(0))
    wrong = shared.differing(describe(other, backend=backend, mode=ForwardMode.DECODE), (0,))
    assert {"cache_seqlens at +0", "page_table_1 at +0", "slot_mapping at +0"} <= set(wrong)
