"""The core without an engine: one computation for all draft steps, in place, and copied to buffers elsewhere."""

from __future__ import annotations

import torch

from nsa_plugin import (
    BatchDescriptor,
    ForwardMode,
    Geometry,
    PrecomputedMetadata,
    ReplayPlan,
    TokenTable,
    fast_copy,
    precompute,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = 3
geometry = Geometry(index_topk=2048, page_size=64, table_width=4096)

# Where the KV slots of 4 pooled requests are, and a batch of two of them.
req_to_token = torch.arange(4 * 4096, dtype=torch.int32, device=DEVICE).view(4, 4096)
seq_lens = torch.tensor([70, 3000], device=DEVICE)
batch = BatchDescriptor(
    ForwardMode.DECODE,
    batch_size=2,
    seq_lens=seq_lens,
    slots=TokenTable(req_to_token, torch.tensor([3, 1], device=DEVICE)),
    num_steps=STEPS,
)

# Once, into fresh buffers, and from there to every consumer.
metadata = precompute(batch, geometry, checked=True)
consumers = [PrecomputedMetadata.allocate(batch, geometry).steps[0] for _ in range(STEPS)]
fast_copy(metadata, consumers)
assert all(torch.equal(step.nsa_cu_seqlens_k, metadata.steps[0].nsa_cu_seqlens_k) for step in consumers)

# At every replay of a captured shape: a plan allocates nothing and does not sync; `run` may be recorded in a CUDA graph.
plan = ReplayPlan(batch, geometry, consumers[:1] * STEPS, strategy="share")
for _ in range(5):
    seq_lens += 1
    plan.run(batch)
print("tokens that each request's draft rows see:", consumers[0].cache_seqlens.tolist())
print("tokens that sparse attention keeps:", consumers[0].nsa_cache_seqlens.tolist())
