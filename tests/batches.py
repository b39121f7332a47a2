"""Random batches for property tests, and the naive loop that says what their metadata must be."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st

from nsa_plugin import BatchDescriptor, BlockTable, ForwardMode, Geometry, PrecomputedMetadata, StepMetadata, TokenTable
from nsa_plugin.core.metadata import TABLES, TOKENS, VECTORS, live_entries
from nsa_plugin.core.pools import PoolMetadata

POISON = -77


@dataclass(frozen=True)
class Case:
    """A batch with its geometry; `repr` is what hypothesis prints."""

    batch: BatchDescriptor
    geometry: Geometry


def strided(values: torch.Tensor, step: int) -> torch.Tensor:
    """The same values behind strides of `step` elements in every dimension."""
    big = torch.full([size * step + 1 for size in values.shape], POISON, dtype=values.dtype, device=values.device)
    view = big[tuple(slice(1, 1 + size * step, step) for size in values.shape)]
    view.copy_(values)
    return view


@st.composite
def cases(
    draw: st.DrawFn,
    max_batch_size: int = 12,
    modes: tuple[ForwardMode, ...] = tuple(ForwardMode),
    device: str = "cpu",
    max_width: int = 600,
    min_batch_size: int = 0,
    max_steps: int = 16,
) -> Case:
    """Any mode, dtype, stride, padding, number of steps, and lengths at 0, 1, page edges and the table's width."""
    mode = draw(st.sampled_from(modes))
    page_size = draw(st.sampled_from([1, 16, 64]))
    width = draw(st.integers(page_size, max_width))
    bs = draw(st.integers(min_batch_size, max_batch_size))
    num_steps = draw(st.integers(1, max_steps)) if mode is ForwardMode.DECODE else 1
    grow = mode is ForwardMode.DECODE and num_steps < width and draw(st.booleans())
    step_offsets = tuple(range(1, num_steps + 1)) if grow else ()
    draft_tokens = draw(st.integers(1, min(6, width)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    longest = width - (draft_tokens if mode is ForwardMode.TARGET_VERIFY else 0)
    edges = [0, 1, page_size - 1, page_size, page_size + 1, longest]
    lengths = [
        draw(st.one_of(st.sampled_from([edge for edge in edges if edge <= longest]), st.integers(0, longest)))
        for _ in range(min(bs, 12))
    ]
    lengths += torch.randint(0, longest + 1, (bs - len(lengths),), generator=generator).tolist()
    integers = st.sampled_from([torch.int32, torch.int64])
    stride = st.sampled_from([1, 1, 2, 3])

    def tensor(values: torch.Tensor) -> torch.Tensor:
        return strided(values.to(draw(integers)).to(device), draw(stride))

    ragged = mode is ForwardMode.DRAFT_EXTEND and draw(st.booleans())
    extra = draw(st.integers(0, 3))
    seq_lens = tensor(torch.tensor(lengths + [1] * extra, dtype=torch.int64))
    extend_lens = tensor(torch.randint(0, draft_tokens + 1, (bs,), generator=generator)) if ragged else None
    slots: TokenTable | BlockTable
    if draw(st.booleans()):
        requests = bs + 2
        pool = torch.randint(0, requests, (bs,), generator=generator)
        table = torch.randint(0, 1 << 20, (requests, width + draw(st.sampled_from([0, 5]))), generator=generator)
        slots = TokenTable(tensor(table), tensor(pool))
    else:
        block_size = draw(st.sampled_from([16, 64]))
        blocks = torch.randint(0, 1 << 14, (bs, -(-width // block_size)), generator=generator)
        slots = BlockTable(tensor(blocks), block_size)
    kpool = draw(st.sampled_from([1, 2, 4, 8])) if page_size > 1 else 1
    accepted = None
    if kpool > 1 and mode is ForwardMode.DRAFT_EXTEND and draw(st.booleans()):
        rows = torch.full((bs,), draft_tokens) if extend_lens is None else extend_lens.cpu().long()
        accepted = tensor((torch.rand(bs, generator=generator) * (rows + 1)).long())
    batch = BatchDescriptor(
        mode, bs, seq_lens, slots, num_steps, step_offsets, draft_tokens, extend_lens, accepted=accepted
    )
    topk = draw(st.sampled_from([1, 32, 256] if kpool == 1 else [kpool, 32, 256]))
    geometry = Geometry(topk, page_size, width, num_sms=2, wide_page_table=draw(st.booleans()), index_kpool=kpool)
    return Case(batch, geometry)


interpreted = partial(cases, max_batch_size=5, max_steps=4)
"""Cases for kernels that Triton interprets: seconds per launch with more requests and steps, and no other branch."""


def poisoned(
    batch: BatchDescriptor, geometry: Geometry, count: int = 1, stride: int = 1, tokens: bool = False
) -> list[PrecomputedMetadata]:
    """Buffers full of a value that no metadata can have, optionally behind strides."""
    made = []
    for _ in range(count):
        fresh = PrecomputedMetadata.allocate(batch, geometry, tokens=tokens)
        cache: dict[int, torch.Tensor] = {}

        def remake(tensor: torch.Tensor, cache: dict[int, torch.Tensor] = cache) -> torch.Tensor:
            if id(tensor) not in cache:
                cache[id(tensor)] = strided(torch.full_like(tensor, POISON), stride)
            return cache[id(tensor)]

        steps = []
        for step in fresh.steps:
            fields: dict[str, Any] = {name: getattr(step, name) for name in (*VECTORS, *TOKENS, *TABLES)}
            fields = {name: None if value is None else remake(value) for name, value in fields.items()}
            if step.pools is not None:
                pools = {field.name: getattr(step.pools, field.name) for field in dataclasses.fields(step.pools)}
                pools = {name: None if value is None else remake(value) for name, value in pools.items()}
                fields["pools"] = PoolMetadata(**pools)
            steps.append(StepMetadata(**fields))
        made.append(PrecomputedMetadata(tuple(steps), batch, geometry))
    return made


def naive(batch: BatchDescriptor, geometry: Geometry, offset: int) -> dict[str, list[list[int]] | list[int]]:
    """The metadata of one step by a loop over requests, rows and tokens: live entries, row by row."""
    cache, expanded, wide, real, newest = [], [], [], [], []
    k = geometry.index_kpool
    pools: dict[str, list[Any]] = {
        name: [] for name in ("starts", "tails", "requests", "write_loc", "accepted", "pages")
    }
    for request in range(batch.batch_size):
        length = int(batch.seq_lens[request]) + offset
        if batch.step_offsets:
            length = min(length, geometry.table_width)
        rows = 1
        if batch.mode is ForwardMode.TARGET_VERIFY:
            length += batch.draft_tokens
            rows = batch.draft_tokens
        elif batch.mode is ForwardMode.DRAFT_EXTEND:
            rows = batch.draft_tokens if batch.extend_lens is None else int(batch.extend_lens[request])
        cache.append(length)
        slots = []
        for token in range(length):
            if isinstance(batch.slots, TokenTable):
                slots.append(int(batch.slots.req_to_token[int(batch.slots.req_pool_indices[request]), token]))
            else:
                block = int(batch.slots.block_table[request, token // batch.slots.block_size])
                slots.append(block * batch.slots.block_size + token % batch.slots.block_size)
        newest.append(slots[-1] if slots else -1)
        start = length - rows
        written = rows if batch.accepted is None else int(batch.accepted[request])
        pools["starts"].append(start)
        pools["tails"].append(math.floor(start / k) * k)
        completed = range(math.floor(start / k), (start + written) // k)
        pools["write_loc"].append([slots[p * k] // k if p >= 0 else 0 for p in completed])
        pools["accepted"].append(written)
        if isinstance(batch.slots, TokenTable):
            pools["requests"].append(int(batch.slots.req_pool_indices[request]))
        for row in range(rows):
            pools["pages"].append([slot // (geometry.page_size * k) for slot in slots[:: geometry.page_size * k]])
            expanded.append(max(length - rows + row + 1, 0))
            wide.append(slots)
            real.append([slot // geometry.page_size for slot in slots[:: geometry.page_size]])
    clipped = [min(length - length % k, geometry.index_topk) + length % k for length in expanded]
    return {
        "cache_seqlens": cache,
        "cu_seqlens_k": [sum(cache[:i]) for i in range(len(cache) + 1)],
        "seqlens_expanded": expanded,
        "nsa_cache_seqlens": clipped,
        "nsa_cu_seqlens_k": [sum(clipped[:i]) for i in range(len(clipped) + 1)],
        "page_table_1": wide,
        "real_page_table": real,
        "positions": [max(length - 1, 0) for length in cache],
        "slot_mapping": newest,
        "pools.seqlens": [length // k for length in expanded],
        "pools.write_start": pools["starts"],
        "pools.tail_start": pools["tails"],
        "pools.requests": pools["requests"],
        "pools.write_loc": pools["write_loc"],
        "pools.page_table": pools["pages"],
        "pools.accepted": pools["accepted"],
    }


def assert_equal_live(expected: PrecomputedMetadata, got: StepMetadata, index: int) -> None:
    """Every live entry of step `index` of `expected` is the same in `got`."""
    want, have = live_entries(expected, expected.step(index), index), live_entries(expected, got, index)
    assert want.keys() == have.keys()
    for name, values in want.items():
        assert torch.equal(values, have[name]), f"{name} of step {index}:\n{values}\n{have[name]}"
