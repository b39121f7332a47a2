"""On a CUDA device: a rehearsal leaves alone what cuBLAS and torch hold for the graphs of an engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa_plugin.adapters.sglang.rehearsal import rehearse

pytestmark = pytest.mark.gpu
STREAMS = 32
"""As many as torch has; it hands them out in turn."""


def test_graphs_of_all_streams_keep_their_workspaces() -> None:
    """A matrix product whose sum is split has a workspace for each stream. Before: torch freed it with the rehearsal's graph."""
    left = torch.randn(16, 7168, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(7168, 64, device="cuda", dtype=torch.bfloat16)
    want = left @ right  # the library is loaded here: it can't be in a capture
    new_stream: Any = torch.cuda.Stream
    graphs, products = [], []
    for _ in range(STREAMS):
        stream, graph = new_stream(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            products.append(left @ right)
        graphs.append(graph)
    torch.cuda.synchronize()
    held, spare = torch.cuda.memory_allocated(), torch.zeros(1, device="cuda")
    for _ in range(2 * STREAMS):
        rehearse(lambda: spare.add_(1))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() >= held
    for graph, product in zip(graphs, products, strict=True):
        graph.replay()
        assert torch.equal(product, want)


def test_work_that_cannot_be_captured_leaves_torch_as_it_was() -> None:
    """Before: random numbers failed, and the allocator kept what a second stream had used, for ever."""
    value = torch.zeros(1, device="cuda")
    with pytest.raises(RuntimeError):
        rehearse(lambda: value.item())
    torch.rand(1, device="cuda")
    new_stream: Any = torch.cuda.Stream
    block = torch.empty(1 << 20, device="cuda")
    block.record_stream(new_stream())
    active = torch.cuda.memory_stats()["active_bytes.all.current"]
    del block
    torch.cuda.synchronize()
    value += 1
    spare = torch.empty(1, device="cuda")  # here the allocator takes back what streams have done with
    assert torch.cuda.memory_stats()["active_bytes.all.current"] < active
    rehearse(lambda: spare.copy_(value))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        spare.copy_(value * 2)
    graph.replay()
    assert spare.item() == 2
