"""On a CUDA device: refreshes that a captured graph runs side by side."""

from __future__ import annotations

import pytest
import torch

from nsa_plugin.adapters.side_by_side import side_by_side

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SIZE = 1 << 16


@pytest.mark.allocates_in_graph
def test_branches_read_what_was_written_before_and_are_read_afterwards() -> None:
    source = torch.zeros(SIZE, device="cuda", dtype=torch.int64)
    lengths, total = torch.zeros_like(source), torch.zeros_like(source)
    planes = [torch.zeros_like(source) for _ in range(4)]

    def refresh(index: int) -> None:
        value = lengths
        for _ in range(4 * index + 1):
            value = value + index  # memory of the graph's pool, on the branch's stream
        planes[index].copy_(value)

    derive = side_by_side([lambda index=index: refresh(index) for index in range(len(planes))])  # type: ignore[misc]
    assert derive is not None

    def work() -> None:
        lengths.copy_(source)
        derive()
        total.copy_(torch.stack(planes).sum(0))

    work()
    graphs = []
    for _ in range(2):  # a second capture has the branches of the first
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        graphs.append(graph)
    added = sum(index * (4 * index + 1) for index in range(len(planes)))
    for replay in range(200):
        source.fill_(replay)
        graphs[replay % 2].replay()
        assert torch.equal(total, torch.full_like(total, 4 * replay + added))


def test_an_error_in_a_branch_is_the_one_that_is_raised() -> None:
    plane = torch.zeros(SIZE, device="cuda")

    def fail() -> None:
        plane.add_(1)
        raise ValueError("of the branch")

    derive = side_by_side([lambda: None, fail, lambda: None])
    assert derive is not None
    with pytest.raises(ValueError, match="of the branch"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        derive()
    torch.cuda.synchronize()
