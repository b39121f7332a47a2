"""sglang's real `MetadataGlueGraph` over target verify; its CUDA graphs are emulated: Python runs at the capture only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_plugin.adapters.sglang import hooked, ledger, own_path, preparation
from nsa_plugin.adapters.sglang.releases import GLUE_GRAPH, lacking
from nsa_plugin.core.plan import ReplayPlan
from tests.sglang.conftest import Install
from tests.sglang.test_switch import Runner

pytestmark = pytest.mark.skipif(bool(lacking("glue graph")), reason="this sglang has no metadata glue graph")


class Graph:
    """Keeps what is launched while it captures."""

    capturing: Graph | None = None

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def replay(self) -> None:
        for launch in self.work:
            launch()


def launched(work: Callable[..., None]) -> Callable[..., None]:
    """A function that a CUDA graph would record, not run."""

    def launch(*arguments: Any, **keywords: Any) -> None:
        if Graph.capturing is None:
            work(*arguments, **keywords)
        else:
            Graph.capturing.work.append(lambda: work(*arguments, **keywords))

    return launch


@contextlib.contextmanager
def capture(graph: Graph, **_: Any) -> Iterator[None]:
    Graph.capturing = graph
    try:
        yield
    finally:
        Graph.capturing = None


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: None)
    monkeypatch.setattr(hooked, "capturing", lambda: Graph.capturing is not None)
    monkeypatch.setattr(ReplayPlan, "run", launched(ReplayPlan.run))
    monkeypatch.setattr(preparation, "native_replay", launched(own_path.native_replay))


class Forwarding:
    """A backend that passes the call on, as sglang's hybrid ones do; nothing says to whom."""

    attn_backend_list = None

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.forward_metadata = None

    def init_forward_metadata_out_graph(self, batch: Any, in_capture: bool = False) -> None:
        self._backend.init_forward_metadata_out_graph(batch, in_capture=in_capture)


@pytest.mark.parametrize(
    ("strategy", "verify", "wrapped"),
    [
        ("share", 0, False),
        ("share", 1, False),
        ("share", 2, True),
        ("auto", 5, False),
        ("copy", 2, False),
        ("graph", 0, False),
        ("graph", 0, True),
    ],
)
def test_every_promise_holds_under_the_glue_graph(
    install: Install, monkeypatch: pytest.MonkeyPatch, strategy: str, verify: int, wrapped: bool
) -> None:
    """Verified as often as asked; off and on in mid-run; while off sglang's glue graph works, and is never left in place."""
    from sglang.srt.model_executor.runner.metadata_glue_graph import MetadataGlueGraph

    host, _ = install(strategy, verify=verify)
    verified: list[int] = []
    verify_once = preparation.Preparation._verify
    turn = 0

    def verifying(self: Any, batch: Any) -> None:
        verified.append(turn)
        verify_once(self, batch)

    monkeypatch.setattr(preparation.Preparation, "_verify", verifying)
    runner = Runner("TARGET_VERIFY", monkeypatch)
    runner.capture(2)
    graph, key = MetadataGlueGraph("cpu"), ("verify", 2)
    owner = Forwarding(runner.owner) if wrapped else runner.owner
    static = runner.graphs[2][0]

    def out_graph(view: Any) -> None:
        """As the runner routes it: a captured glue graph is replayed without a view."""
        live = SimpleNamespace(**vars(static) | {"seq_lens_cpu": view.seq_lens_cpu})
        if getattr(graph, "is_captured", lambda _: False)(key):
            graph.replay(key)
        else:
            graph.run(owner, live, key)

    seen = {}
    monkeypatch.setattr(
        runner, "owner", SimpleNamespace(**vars(runner.owner), init_forward_metadata_out_graph=out_graph)
    )
    for turn in range(22):
        if turn in (6, 14):
            seen[turn] = graph.replays
            host.switch(turn == 14, "test")
        if turn == 10:
            seen[turn] = graph.replays
        assert runner.replay([1 + 7 * turn % 250, 252 - 3 * turn], [turn % 8, (turn + 3) % 8]) == []
    on = [turn for turn in range(22) if not 6 <= turn < 14]
    assert verified == (on[::verify] if verify else [])
    assert not graph.disabled and not host.fallbacks and not host.mismatches
    assert seen[6] == 0 and seen[10] > 0 and seen[14] == graph.replays >= 4


def test_releases_without_a_glue_graph_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "lacking", lambda part: "no such module" if "glue graph" in part else "")
    assert [row.target for row in ledger.rows() if GLUE_GRAPH in row.target] == []
