"""Who shares a draft, and their vote on it, with a store in this process; with real ranks it is in test_ranks."""

from __future__ import annotations

import logging
import math
import pkgutil
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_plugin.adapters.build import build
from nsa_plugin.adapters.vllm import agreement


@given(st.tuples(*[st.integers(1, 3)] * 5), st.data())
def test_who_shares_a_draft(sizes: tuple[int, ...], data: st.DataObject) -> None:
    """vLLM's grid: external data parallel, data parallel, pipeline, prefill context, tensor."""
    import torch
    import torch.distributed as dist
    from vllm.distributed import parallel_state

    grid = torch.arange(math.prod(sizes)).reshape(sizes)
    me = data.draw(st.integers(0, grid.numel() - 1))
    external, replica, stage, context, tensor = torch.nonzero(grid == me)[0].tolist()
    groups = {
        "_TP": grid[external, replica, stage, context], "_PCP": grid[external, replica, stage, :, tensor],
        "_DP": grid[external, :, stage, context, tensor],
    }  # fmt: skip
    made: dict[str, Any] = {name: SimpleNamespace(ranks=ranks.tolist()) for name, ranks in groups.items()}
    with (
        mock.patch.multiple(parallel_state, **made),
        mock.patch.multiple(dist, is_initialized=lambda: True, get_rank=lambda: me, get_world_size=grid.numel),
    ):
        shared = agreement.sharing()
    assert shared == sorted(grid[external, :, stage].flatten().tolist())


def test_ranks_beyond_the_default_group() -> None:
    """As under elastic expert parallelism: each engine has a default group of its own, data parallel ranks cross them."""
    import torch.distributed as dist
    from vllm.distributed import parallel_state

    groups: dict[str, Any] = {name: SimpleNamespace(ranks=[0]) for name in ("_TP", "_PCP")}
    groups["_DP"] = SimpleNamespace(ranks=[0, 1])
    with (
        mock.patch.multiple(parallel_state, **groups),
        mock.patch.multiple(dist, is_initialized=lambda: True, get_rank=lambda: 0, get_world_size=lambda: 1),
    ):
        answer = agreement.objection()
    assert "expected the draft's ranks in torch's default group of 1, got [0, 1]" in answer


class TestVote:
    """The vote itself, with a store in this process."""

    @pytest.fixture(autouse=True)
    def _two_ranks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch.distributed as dist

        self.store, self.rank = pkgutil.resolve_name("torch.distributed.HashStore")(), 0
        monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: self.store)
        monkeypatch.setattr(dist, "get_rank", lambda: self.rank)
        monkeypatch.setattr(agreement, "sharing", lambda: [0, 1])
        monkeypatch.setattr(agreement, "SECONDS", 0.0)
        monkeypatch.setattr(agreement, "_absent", {})
        self.become(0, monkeypatch)

    def become(self, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Go on as a rank that has not voted yet."""
        self.rank = rank
        monkeypatch.setattr(agreement, "_rounds", Counter())

    def test_who_comes_late_takes_the_answer_that_is_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answer = agreement.objection()
        assert answer == "nsa-plugin is absent or failing on rank 1 of 2 that share the draft"
        self.become(1, monkeypatch)
        assert agreement.objection() == answer

    def test_an_answer_ends_the_waiting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(agreement, "SECONDS", float("inf"))
        self.become(1, monkeypatch)
        assert agreement.objection("it is off") == "it is off"
        self.become(0, monkeypatch)
        assert agreement.objection() == "rank 1: it is off"

    def test_an_objection_waits_for_nobody_and_is_not_logged(self, monkeypatch: pytest.MonkeyPatch, log: Any) -> None:
        monkeypatch.setattr(agreement, "SECONDS", float("inf"))
        assert agreement.objection("it is off") == "it is off" and log(logging.WARNING) == []

    def test_nobody_waits_twice_for_who_is_absent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answer = agreement.objection()
        monkeypatch.setattr(agreement, "SECONDS", float("inf"))
        assert agreement.objection() == answer

    @pytest.mark.parametrize("theirs", [build(), "0.1.0+other", "0.0.0"])
    def test_builds_must_be_equal(self, theirs: str) -> None:
        self.store.set(f"{agreement.KEY}/0/0/1", theirs)
        answer = agreement.objection()
        assert bool(answer) == (theirs != build())
        assert not answer or all(words in answer for words in (f"{theirs} on rank 1", f"{build()} on rank 0"))

    def test_a_store_that_fails_is_an_objection(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch.distributed as dist

        monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: 1 / 0)
        assert agreement.objection() == "ranks can't agree (ZeroDivisionError: division by zero)"
