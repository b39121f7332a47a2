"""A few requests as plain lists, and the metadata that both engines' batches of them must give.

The engines can't be installed together. Each suite builds these requests in its own engine's real types, has the adapter
describe them, precomputes, and compares every live entry with `expected`, which knows requests and no engine, descriptor
or tensor. Both equal to it are equal to each other: that is what the two tests prove, for the precompute's live entries.
They do not prove that the engines choose equal lengths for a draft's steps (sglang gives all steps the same).
"""

from __future__ import annotations

import random

import torch

from nsa_plugin import BatchDescriptor, Geometry, PrecomputedMetadata, precompute
from nsa_plugin.core.metadata import TABLES, TOKENS, VECTORS

BLOCK = 64
GEOMETRY = Geometry(index_topk=256, page_size=BLOCK, table_width=1024, num_sms=2)
LENGTHS = (1, 63, 64, 700, 1020)
ROWS = (3, 0, 7, 5, 1)
"""Each request's row in its engine's table of requests."""
VERIFIED = 4
"""Draft tokens that a verification appends to each request."""
STEPS = 6
"""Draft steps: the last ones reach the end of the longest request's table."""
BLOCKS = tuple(tuple(random.Random(row).sample(range(1, 4000), GEOMETRY.table_width // BLOCK)) for row in range(8))
"""Blocks of each row of the table of requests."""

Planes = dict[str, list[int] | list[list[int]]]


def expected(offset: int, rows: int = 1) -> Planes:
    """The planes of requests `offset` tokens longer than `LENGTHS`, whose last `rows` tokens are query rows."""
    planes: Planes = {}
    lengths = [min(length + offset, GEOMETRY.table_width) for length in LENGTHS]
    slots = [
        [BLOCKS[row][t // BLOCK] * BLOCK + t % BLOCK for t in range(n)] for row, n in zip(ROWS, lengths, strict=True)
    ]
    seen = [length - rows + row + 1 for length in lengths for row in range(rows)]
    kept = [min(length, GEOMETRY.index_topk) for length in seen]
    planes |= {"cache_seqlens": lengths, "seqlens_expanded": seen, "nsa_cache_seqlens": kept}
    planes["cu_seqlens_k"] = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    planes["nsa_cu_seqlens_k"] = [sum(kept[:i]) for i in range(len(kept) + 1)]
    planes["page_table_1"] = [list(request) for request in slots for _ in range(rows)]
    planes["real_page_table"] = [[slot // BLOCK for slot in request[::BLOCK]] for request in slots for _ in range(rows)]
    if rows == 1:
        planes |= {"positions": [n - 1 for n in lengths], "slot_mapping": [request[-1] for request in slots]}
    return planes


def differing(batch: BatchDescriptor, offsets: tuple[int, ...], rows: int = 1) -> list[str]:
    """Planes of the batch's metadata that are not as expected, named by step."""
    out = PrecomputedMetadata.allocate(batch, GEOMETRY, tokens=rows == 1)
    metadata = precompute(batch, GEOMETRY, out=out, checked=True)
    assert len(metadata.steps) == len(offsets)
    wrong = []
    for offset, step in zip(offsets, metadata.steps, strict=True):
        for name, want in expected(offset, rows).items():
            plane = getattr(step, name)
            live = [plane[i, : len(row)].tolist() for i, row in enumerate(want)] if name in TABLES else plane.tolist()  # type: ignore[arg-type]
            if live != want:
                wrong.append(f"{name} at +{offset}")
    assert {*VECTORS, *TABLES, *(TOKENS if rows == 1 else ())} == set(expected(0, rows)), "a plane is not compared"
    return wrong


def block_table() -> torch.Tensor:
    """int32 [8, 16]: blocks of every row of the table of requests."""
    return torch.tensor(BLOCKS, dtype=torch.int32)
