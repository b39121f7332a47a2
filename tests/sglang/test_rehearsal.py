"""A rehearsal takes no stream that an engine may be given too: torch drops what cuBLAS holds for the stream of a graph."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from nsa_plugin.adapters.sglang import rehearsal, reports

POOL = (0, 7)
INVALIDATED = "operation failed due to a previous error during capture"


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> Iterator[mock.MagicMock]:
    """What stands for CUDA graphs and streams; torch's own streams may not be asked for."""
    made = mock.MagicMock()
    monkeypatch.setattr(torch, "get_device_module", lambda: torch.cuda)
    for name, value in {
        "is_available": lambda: True, "current_device": lambda: 0, "current_stream": mock.MagicMock(), "stream": mock.MagicMock(),
        "CUDAGraph": lambda: made, "ExternalStream": mock.MagicMock(), "Stream": mock.Mock(side_effect=AssertionError),
        "graph_pool_handle": lambda: POOL,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    rehearsal._own_stream.cache_clear()
    monkeypatch.setattr(rehearsal, "_failed", [])
    yield made
    rehearsal._own_stream.cache_clear()


def driver(create: Callable[..., int]) -> Any:
    """Loads a library with `cuStreamCreate`."""
    return lambda name: mock.Mock(spec=["cuStreamCreate"], cuStreamCreate=create)


def with_handle(pointer: Any, flags: int) -> int:
    assert flags == rehearsal.NON_BLOCKING
    ctypes.c_void_p.from_buffer(pointer._obj).value = 1234
    return 0


def refused(pointer: Any, flags: int) -> int:
    return 2


def test_all_rehearsals_have_one_stream_that_the_driver_made(
    graph: mock.MagicMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = mock.Mock(side_effect=with_handle)
    monkeypatch.setattr(ctypes, "CDLL", driver(create))
    work = mock.Mock()
    for number in range(1, 41):
        rehearsal.rehearse(work)
        assert work.call_count == graph.capture_begin.call_count == graph.capture_end.call_count == number
    create.assert_called_once()
    external: Any = torch.cuda.ExternalStream
    external.assert_called_once_with(1234, device=0)


@pytest.mark.parametrize("how", ["no library", "refused"])
def test_without_a_stream_of_its_own_nothing_is_recorded(
    graph: mock.MagicMock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    caplog.set_level("INFO", reports.logger.name)
    missing = mock.Mock(side_effect=OSError("no such library"))
    monkeypatch.setattr(ctypes, "CDLL", missing if how == "no library" else driver(refused))
    work = mock.Mock()
    rehearsal.rehearse(work)
    rehearsal.rehearse(work)
    work.assert_not_called()
    graph.capture_begin.assert_not_called()
    assert caplog.text.count("captures are not rehearsed") == 1


def test_an_error_of_the_work_ends_the_capture(graph: mock.MagicMock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", driver(with_handle))
    monkeypatch.setattr(torch, "zeros", mock.Mock())
    with pytest.raises(ValueError, match="of the work"):
        rehearsal.rehearse(mock.Mock(side_effect=ValueError("of the work")))
    assert graph.capture_begin.call_count == graph.capture_end.call_count


class Torch:
    """What torch keeps of captures: pools that its allocator fills and holds, and whether random numbers are captured."""

    def __init__(self, ends_itself: bool) -> None:
        self.ends_itself, self.invalidated = ends_itself, False
        self.filled: list[Any] = []
        self.held: list[Any] = []
        self.random_is_captured = False

    def begin(self, pool: Any = (1, 0), capture_error_mode: str = "global") -> None:
        self.filled.append(pool)
        self.held.append(pool)
        self.random_is_captured = True

    def end(self) -> None:
        invalidated, self.invalidated = self.invalidated, False
        if not invalidated or self.ends_itself:
            self.held.remove(self.filled.pop())
        if invalidated:
            raise RuntimeError(INVALIDATED)
        self.random_is_captured = False

    def end_pool(self, device: int, pool: Any) -> None:
        if pool not in self.filled:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.filled.remove(pool)

    def release_pool(self, device: int, pool: Any) -> None:
        self.held.remove(pool)


@pytest.mark.parametrize("ends_itself", [False, True])
def test_work_that_cannot_be_captured_leaves_torch_as_it_was(
    graph: mock.MagicMock, monkeypatch: pytest.MonkeyPatch, ends_itself: bool
) -> None:
    """CUDA invalidates the capture. Before: the allocator kept its pool open, and the next random numbers failed."""
    monkeypatch.setattr(ctypes, "CDLL", driver(with_handle))
    kept = Torch(ends_itself)
    graph.capture_begin.side_effect, graph.capture_end.side_effect = kept.begin, kept.end
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", kept.end_pool, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", kept.release_pool, raising=False)
    monkeypatch.setattr(torch, "zeros", mock.Mock())

    def synchronize() -> None:
        kept.invalidated = True
        raise ValueError("of the work")

    with pytest.raises(RuntimeError, match=INVALIDATED):
        rehearsal.rehearse(synchronize)
    assert (kept.filled, kept.held, kept.random_is_captured) == ([], [], False)
    graph.reset.assert_called_once()
    assert rehearsal._failed == [graph]
    rehearsal.rehearse(mock.Mock())
    assert (kept.filled, kept.held) == ([], [])
