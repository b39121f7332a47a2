"""Runs at every batch of the target: is its graph refreshed, or must vLLM build first?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nsa_plugin.adapters.reporting import PathReport
from nsa_plugin.adapters.vllm.v2.target.late import LateMetadata
from nsa_plugin.adapters.vllm.v2.target.refresh import Refresh
from nsa_plugin.adapters.vllm.v2.target.verified import replay_verified


class LateBatch(LateMetadata):
    """The metadata of a batch whose graph may do without, with what describes the batch.

    Attributes
    ----------
    batch : InputBatch
    block_tables : tuple of int32 tensors [requests, blocks]
    """

    def __init__(self, make: Callable[[], Any], batch: Any, block_tables: Any) -> None:
        super().__init__(make)
        self.batch, self.block_tables = batch, block_tables


class Replays:
    """The graphs of one manager.

    Attributes
    ----------
    refreshes : dict of descriptor to Refresh
        Of the exact descriptor: graphs of one size may differ in their LoRAs, and only some of them be refreshed.
    late : LateBatch or None
        The batch that is prepared, and not replayed yet.
    under_way : LateBatch or None
        The batch whose graph runs.
    groups : list or None
        The attention groups that were captured.
    """

    def __init__(self, report: PathReport) -> None:
        self._report = report
        self._off = report.instrument(_call, "off", 1)
        self._sizes: set[tuple[int, int]] = set()
        self.refreshes: dict[Any, Refresh] = {}
        self.late: LateBatch | None = None
        self.under_way: LateBatch | None = None
        self.groups: Any = None

    def may_serve(self, batch: Any, groups: Any) -> bool:
        """Whether a graph of this size is refreshed; which of them it will be, `replay` knows."""
        return groups is self.groups and (batch.num_reqs_after_padding, batch.num_tokens_after_padding) in self._sizes

    def natively(self, batch: Any, build: Callable[[], Any]) -> Any:
        """What vLLM's own `build` gives; counted where a graph of the batch's size has a refresh that is not used now."""
        sizes = {(desc.num_reqs, desc.num_tokens) for desc in self.refreshes}
        if (batch.num_reqs_after_padding, batch.num_tokens_after_padding) not in sizes:
            return build()
        made: list[Any] = []
        self._off(lambda: made.append(build()))
        return made[0]

    def record(self, desc: Any, refresh: Refresh) -> None:
        """The graph of a descriptor has its refresh."""
        refresh.recorded = True
        self._sizes.add((desc.num_reqs, desc.num_tokens))

    def replay(self, desc: Any, original: Callable[[], Any]) -> Any:
        """The gate: a graph that is not refreshed now is replayed after vLLM's own build, never without."""
        late, self.late = self.late, None
        refresh = self.refreshes.get(desc)
        if refresh is not None:
            refresh.obey(late is not None and refresh.usable)
        if late is None:
            return original()
        if refresh is None or not refresh.usable:
            self._off(late.build)
            return original()
        refresh.count(None)
        self.under_way = late
        try:
            if refresh.verification is None or not refresh.verification.is_due():
                result = original()
            else:
                result = replay_verified(self._report, refresh, refresh.verification, late.build, original)
        finally:
            self.under_way = None
        if refresh.observed is not None:
            refresh.observed.show(refresh.live(late.batch, late.block_tables))
        return result

    def fail(self) -> None:
        """Leave every graph to vLLM from now on; what was about to do without its build, or does so now, gets it."""
        self._sizes.clear()
        for refresh in self.refreshes.values():
            refresh.failed = True
        self._settle()

    def switch_off(self) -> None:
        """Leave every graph to vLLM, because the gate is about to go."""
        self._sizes.clear()
        self._settle()
        for refresh in self.refreshes.values():
            refresh.obey(False)

    def _settle(self) -> None:
        for late in (self.under_way, self.late):
            if late is not None:
                late.build()


def _call(build: Callable[[], Any]) -> None:
    build()
