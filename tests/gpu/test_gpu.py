"""On a CUDA device: compiled kernels against the reference (on the CPU), and what a replay costs the host.

`GPU_TEST_CASES` is the number of random cases per test (default: 6, of large batches 2).
"""

from __future__ import annotations

import dataclasses
import os
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from nsa_plugin import (
    BatchDescriptor,
    BlockTable,
    ForwardMode,
    Geometry,
    PrecomputedMetadata,
    ReplayPlan,
    StepMetadata,
    TokenTable,
    fast_copy,
    precompute,
)
from nsa_plugin.core.batch import multiprocessors
from nsa_plugin.core.metadata import TABLES, VECTORS, planes_of
from nsa_plugin.core.pools import PoolMetadata
from tests.batches import Case, assert_equal_live, poisoned

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def reference(batch: BatchDescriptor, geometry: Geometry) -> PrecomputedMetadata:
    """The reference's metadata of a batch, computed from a copy of it on the CPU."""
    slots = batch.slots
    here: TokenTable | BlockTable
    if isinstance(slots, TokenTable):
        here = TokenTable(slots.req_to_token.cpu(), slots.req_pool_indices.cpu())
    else:
        here = BlockTable(slots.block_table.cpu(), slots.block_size)
    extend_lens = None if batch.extend_lens is None else batch.extend_lens.cpu()
    accepted = None if batch.accepted is None else batch.accepted.cpu()
    batch = replace(batch, seq_lens=batch.seq_lens.cpu(), slots=here, extend_lens=extend_lens, accepted=accepted)
    return precompute(batch, geometry, impl="reference")


def assert_equals(want: PrecomputedMetadata, step: StepMetadata, index: int = 0) -> None:
    """Every live entry of step `index` is the same in `step`, which is on the GPU."""
    fields = {name: getattr(step, name) for name in (*VECTORS, *TABLES)}
    here: dict[str, Any] = {name: None if value is None else value.cpu() for name, value in fields.items()}
    if step.pools is not None:
        pools = {field.name: getattr(step.pools, field.name) for field in dataclasses.fields(step.pools)}
        moved: dict[str, Any] = {name: None if value is None else value.cpu() for name, value in pools.items()}
        here["pools"] = PoolMetadata(**moved)
    assert_equal_live(want, StepMetadata(**here), index)


def random_case(rng: random.Random, width: int, batch_size: int, mode: ForwardMode) -> Case:
    """A batch of the sizes that engines run, with fresh random lengths, tables, dtypes and padding."""
    draft_tokens = rng.randint(1, 9)
    num_steps = rng.randint(1, 16) if mode is ForwardMode.DECODE else 1
    offsets = tuple(range(1, num_steps + 1)) if rng.random() < 0.5 and mode is ForwardMode.DECODE else ()
    dtype, table_dtype = rng.choice([torch.int32, torch.int64]), rng.choice([torch.int32, torch.int32, torch.int64])
    longest = width - draft_tokens - num_steps
    lengths = [
        rng.choice([0, 1, 63, 64, 65, longest, rng.randint(1, longest), rng.randint(1, 2000)])
        for _ in range(batch_size)
    ]
    seq_lens = torch.tensor(lengths, dtype=dtype, device=DEVICE)
    slots: TokenTable | BlockTable
    if rng.random() < 0.7:
        table = torch.randint(0, 1 << 30, (batch_size + 3, width), dtype=table_dtype, device=DEVICE)
        slots = TokenTable(table, torch.randint(0, batch_size + 3, (batch_size,), dtype=dtype, device=DEVICE))
    else:
        block = rng.choice([16, 64])
        slots = BlockTable(
            torch.randint(0, 1 << 22, (batch_size, -(-width // block)), dtype=table_dtype, device=DEVICE), block
        )
    ragged = mode is ForwardMode.DRAFT_EXTEND and rng.random() < 0.5
    extend = torch.randint(0, draft_tokens + 1, (batch_size,), dtype=dtype, device=DEVICE) if ragged else None
    kpool = rng.choice([1, 2, 4, 8])
    accepted = None
    if kpool > 1 and mode is ForwardMode.DRAFT_EXTEND:
        rows = torch.full_like(seq_lens, draft_tokens) if extend is None else extend
        accepted = (torch.rand(batch_size, device=DEVICE) * (rows + 1)).to(dtype)
    batch = BatchDescriptor(
        mode, batch_size, seq_lens, slots, num_steps, offsets, draft_tokens, extend, accepted=accepted
    )
    sms = multiprocessors(torch.device(DEVICE))
    page = rng.choice([1, 64]) if kpool == 1 else 64
    return Case(batch, Geometry(2048, page, width, num_sms=sms, wide_page_table=rng.random() < 0.8, index_kpool=kpool))


@pytest.mark.parametrize("mode", list(ForwardMode))
@pytest.mark.parametrize("batch_size", [0, 1, 3, 32, 129, 512])
@pytest.mark.parametrize("width", [4096, 40961])
def test_compiled_kernels_equal_the_reference(mode: ForwardMode, batch_size: int, width: int) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    cases = min(int(os.environ.get("GPU_TEST_CASES", 6)), 2 if batch_size > 100 else 6)
    for _ in range(cases):
        case = random_case(rng, width, batch_size, mode)
        batch, geometry = case.batch, case.geometry
        want = reference(batch, geometry)
        got = precompute(batch, geometry, impl="triton", out=poisoned(batch, geometry)[0])
        copies = [
            made.steps[0]
            for made in poisoned(batch, geometry, max(len(want.steps), 2) if batch_size < 100 else len(want.steps))
        ]
        fast_copy(got, copies, impl="triton")
        for index in range(len(want.steps)):
            assert_equals(want, got.step(index), index)
        for index, copy in enumerate(copies):
            assert_equals(want, copy, index if len(want.steps) > 1 else 0)


@pytest.mark.parametrize("mode", list(ForwardMode))
@pytest.mark.parametrize("strategy", ["share", "copy"])
def test_a_replay_allocates_nothing_does_not_sync_and_writes_in_place(mode: ForwardMode, strategy: str) -> None:
    rng = random.Random(7)
    num_steps = 7 if mode is ForwardMode.DECODE else 1
    width, size, draft_tokens = 16384, 32, 4

    def live() -> BatchDescriptor:
        seq_lens = torch.tensor([rng.randint(1, width - draft_tokens) for _ in range(size)], device=DEVICE)
        table = torch.randint(0, 1 << 30, (size, width), dtype=torch.int32, device=DEVICE)
        requests = torch.randperm(size, device=DEVICE)
        return BatchDescriptor(mode, size, seq_lens, TokenTable(table, requests), num_steps, (), draft_tokens)

    first = live()
    geometry = Geometry(2048, 64, width, num_sms=multiprocessors(torch.device(DEVICE)))
    consumers = [made.steps[0] for made in poisoned(first, geometry, num_steps if strategy == "copy" else 1)]
    plan = ReplayPlan(first, geometry, consumers, strategy=strategy)  # type: ignore[arg-type]
    plan.run(first)
    batches = [live() for _ in range(20)]
    for batch in batches[:10]:
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            plan.run(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        want = reference(batch, geometry)
        for consumer in consumers:
            assert_equals(want, consumer)


def test_one_captured_graph_serves_changing_batches() -> None:
    """The plan's launches can be recorded: a graph replay reads the static inputs as they are then."""
    rng = random.Random(11)
    width, size = 8192, 16
    seq_lens = torch.ones(size, dtype=torch.int64, device=DEVICE)
    requests = torch.zeros(size, dtype=torch.int64, device=DEVICE)
    table = torch.randint(0, 1 << 30, (size + 1, width), dtype=torch.int32, device=DEVICE)
    batch = BatchDescriptor(ForwardMode.DECODE, size, seq_lens, TokenTable(table, requests), num_steps=3)
    geometry = Geometry(2048, 64, width, num_sms=multiprocessors(torch.device(DEVICE)))
    consumers = [made.steps[0] for made in poisoned(batch, geometry, 3)]
    plan = ReplayPlan(batch, geometry, consumers, strategy="copy")
    plan.run(batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run(batch)
    for _ in range(50):
        seq_lens.copy_(torch.tensor([rng.randint(0, width) for _ in range(size)]))
        requests.copy_(torch.randint(0, size + 1, (size,)))
        graph.replay()
        want = reference(batch, geometry)
        for consumer in consumers:
            assert_equals(want, consumer)


@pytest.mark.parametrize("mode", list(ForwardMode))
@pytest.mark.parametrize(
    ("index_kpool", "width", "size", "rounds"), [(1, 8192, 16, 60), (4, 1 << 20, 32, 5)], ids=["plain", "pooled"]
)
def test_a_captured_graph_is_switched_on_the_device(
    mode: ForwardMode, index_kpool: int, width: int, size: int, rounds: int
) -> None:
    """Off, a replay leaves every byte as it is; on again, it is right again. No new capture, nothing for the host.

    Pooled index keys have tables of 1,048,576 columns, where offsets of elements pass 2**31.
    """
    rng = random.Random(13)
    draft_tokens = 4
    shortest = 1 if index_kpool == 1 else draft_tokens
    seq_lens = torch.full((size,), draft_tokens, dtype=torch.int64, device=DEVICE)
    requests = torch.zeros(size, dtype=torch.int64, device=DEVICE)
    accepted = None
    if index_kpool > 1 and mode is ForwardMode.DRAFT_EXTEND:
        accepted = torch.ones(size, dtype=torch.int32, device=DEVICE)
    table = torch.arange(width, dtype=torch.int32, device=DEVICE).repeat(size + 1, 1)
    table += 256 * torch.arange(size + 1, dtype=torch.int32, device=DEVICE)[:, None]
    batch = BatchDescriptor(
        mode, size, seq_lens, TokenTable(table, requests), draft_tokens=draft_tokens, accepted=accepted
    )
    geometry = Geometry(2048, 64, width, num_sms=multiprocessors(torch.device(DEVICE)), index_kpool=index_kpool)
    consumer = poisoned(batch, geometry)[0].steps[0]
    enabled = torch.ones(1, dtype=torch.int32, device=DEVICE)
    plan = ReplayPlan(batch, geometry, [consumer], strategy="share", enabled=enabled)
    plan.run(batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run(batch)
    for round in range(rounds):
        on = round % 5 not in (1, 2)
        enabled.fill_(on)
        seq_lens.copy_(torch.tensor([rng.randint(shortest, width - draft_tokens) for _ in range(size)]))
        requests.copy_(torch.randint(0, size + 1, (size,)))
        if accepted is not None:
            accepted.copy_(torch.randint(1, draft_tokens + 1, (size,)))
        for plane in () if on else planes_of(consumer):
            plane.fill_(rng.randint(-1000, -1))
        before = [plane.clone() for plane in planes_of(consumer)]
        graph.replay()
        if on:
            assert_equals(reference(batch, geometry), consumer)
        else:
            assert all(map(torch.equal, before, planes_of(consumer)))


def test_a_batch_of_another_size_or_length_compiles_nothing() -> None:
    from nsa_plugin.core.kernels.fast_copy import copy_kernel
    from nsa_plugin.core.kernels.metadata import metadata_kernel

    def run(size: int, width: int) -> None:
        seq_lens = torch.randint(1, width, (size,), device=DEVICE)
        table = torch.randint(0, 1 << 30, (size, width), dtype=torch.int32, device=DEVICE)
        batch = BatchDescriptor(
            ForwardMode.DECODE, size, seq_lens, TokenTable(table, torch.arange(size, device=DEVICE))
        )
        geometry = Geometry(2048, 64, width, num_sms=132)
        source = precompute(batch, geometry, impl="triton")
        fast_copy(source, [PrecomputedMetadata.allocate(batch, geometry).steps[0]], impl="triton")

    def compiled() -> int:
        kernels = (metadata_kernel, copy_kernel)
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    run(16, 4096)
    before = compiled()
    for size, width in ((1, 4096), (2, 4096), (17, 8192), (128, 2048), (500, 4096)):
        run(size, width)
    assert compiled() == before
