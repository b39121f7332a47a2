"""On a CUDA device: planes of dense attention in a captured graph, against the reference on the CPU."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from nsa_plugin import BatchDescriptor, ForwardMode, Geometry, PrecomputedMetadata, ReplayPlan, TokenTable, precompute
from nsa_plugin.core.batch import NO_LIMIT, SlotMap, multiprocessors
from nsa_plugin.core.metadata import ROW_VECTORS, StepMetadata, differing_fields, planes_of

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
OPTIONAL = ("page_table_1", "cu_seqlens_k", "mapped_page_table", "mapped_slots")


def on_cpu(batch: BatchDescriptor, geometry: Geometry) -> PrecomputedMetadata:
    assert isinstance(batch.slots, TokenTable)
    slots = TokenTable(batch.slots.req_to_token.cpu(), batch.slots.req_pool_indices.cpu())
    mapped = batch.slot_map and SlotMap(batch.slot_map.mapping.cpu(), batch.slot_map.written.cpu())
    here = replace(batch, seq_lens=batch.seq_lens.cpu(), slots=slots, slot_map=mapped)
    return precompute(here, geometry, impl="reference")


def fetched(step: StepMetadata) -> StepMetadata:
    absent: dict[str, Any] = dict.fromkeys(ROW_VECTORS)
    planes = {name: getattr(step, name) for name in OPTIONAL}
    planes = {name: None if value is None else value.cpu() for name, value in planes.items()}
    real = planes["page_table_1"] if step.real_page_table is step.page_table_1 else step.real_page_table.cpu()
    return replace(step, cache_seqlens=step.cache_seqlens.cpu(), real_page_table=real, **planes, **absent)


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize(("offsets", "tokens"), [((1, 2, 3), 1), ((4,), 4)], ids=["draft", "verify"])
@pytest.mark.parametrize("size", [1, 32, 128])
def test_a_captured_graph_serves_changing_batches(
    page_size: int, windows: bool, offsets: tuple[int, ...], tokens: int, size: int
) -> None:
    """Lengths up to the end of the context and past it, with and without a second cache, switched on the device."""
    rng, width = random.Random(size), 40960
    number = 1 << 20
    seq_lens = torch.ones(size, dtype=torch.int64, device=DEVICE)
    requests = torch.zeros(size, dtype=torch.int64, device=DEVICE)
    table = torch.randint(0, number, (size + 1, width), dtype=torch.int32, device=DEVICE)
    # as sglang has it: written slots of all steps, request by request
    written = torch.zeros(size * len(offsets) * tokens, dtype=torch.int64, device=DEVICE)
    mapping = torch.randint(0, number, (number,), device=DEVICE)
    by_step = written.view(size, len(offsets)).t() if tokens == 1 else written[None]
    slot_map = SlotMap(mapping, by_step) if windows else None
    slots = TokenTable(table, requests)
    batch = BatchDescriptor(ForwardMode.DECODE, size, seq_lens, slots, len(offsets), offsets, slot_map=slot_map)
    sms = multiprocessors(torch.device(DEVICE))
    geometry = Geometry(1, page_size, width, num_sms=sms, wide_page_table=page_size == 1, max_length=NO_LIMIT)
    absent: dict[str, Any] = dict.fromkeys(ROW_VECTORS)
    steps = [replace(step, **absent) for step in PrecomputedMetadata.allocate(batch, geometry).steps]
    enabled = torch.ones(1, dtype=torch.int32, device=DEVICE)
    plan = ReplayPlan(batch, geometry, steps, strategy="share", enabled=enabled)
    plan.run(batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run(batch)
    for _ in range(10):
        seq_lens.copy_(torch.tensor([rng.choice([1, 64, 65, rng.randint(1, width), width]) for _ in range(size)]))
        requests.copy_(torch.randint(0, size + 1, (size,)))
        written.copy_(torch.randint(-1, number, written.shape))
        mapping.copy_(torch.randint(-1, number, mapping.shape))
        before = [plane.clone() for step in steps for plane in planes_of(step)]
        enabled.zero_()
        graph.replay()
        now = [plane for step in steps for plane in planes_of(step)]
        assert all(torch.equal(one, other) for one, other in zip(before, now, strict=True))
        enabled.fill_(1)
        graph.replay()
        want = on_cpu(batch, geometry)
        for index, step in enumerate(steps):
            assert differing_fields(want, fetched(step), index) == []


def test_lengths_alone() -> None:
    """What FlashMLA reads: no running sums."""
    seq_lens, requests = torch.tensor([5, 700, 4096], device=DEVICE), torch.tensor([2, 0, 1], device=DEVICE)
    table = torch.randint(0, 1 << 30, (3, 4096), dtype=torch.int32, device=DEVICE)
    batch = BatchDescriptor(ForwardMode.DECODE, 3, seq_lens, TokenTable(table, requests))
    geometry = Geometry(1, 64, 4096, wide_page_table=False)
    absent: dict[str, Any] = dict.fromkeys(("cu_seqlens_k", *ROW_VECTORS))
    step = replace(PrecomputedMetadata.allocate(batch, geometry).steps[0], **absent)
    ReplayPlan(batch, geometry, [step], strategy="share").run(batch)
    assert differing_fields(on_cpu(batch, geometry), fetched(step)) == []
