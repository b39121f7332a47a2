"""An adapter for the toy engine: what a third party writes to bring nsa-plugin to an engine of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

from nsa_plugin import BatchDescriptor, ForwardMode, Geometry, StepMetadata, TokenTable, entry, hookimpl
from nsa_plugin.adapters.base import Adapter, Host, PathPlan, Strategy
from nsa_plugin.adapters.ledger import LedgerRow
from nsa_plugin.adapters.probe import Need, missing, untested, warn_if_untested, warn_of_untested
from nsa_plugin.adapters.reporting import PathReport, Stage

ENGINE = "toy"
TESTED = ("1.4",)
logger = logging.getLogger("toy_engine.plugins")

NEEDS = (
    Need("toy_engine.Forward.capture", ("batch",), "make a plan for a captured size", hooked=True),
    Need("toy_engine.Forward.prepare", ("batch",), "prepare a replay", hooked=True),
    Need("toy_engine.StepBuffers", ("lengths", "starts", "row_lengths", "kept", "kept_starts", "pages"),
         "the buffers that captured graphs read"),
)  # fmt: skip

LEDGER = tuple(
    LedgerRow(f"toy_engine.Forward.{name}", why, "not proposed", "the engine computes all steps at once", runs)
    for name, why, runs in (
        ("capture", "A plan is made for the captured size.", "at each capture"),
        ("prepare", "One launch writes the metadata of all steps.", "before each replay"),
    )
)


class Prepared:
    """One captured size of a forward, prepared by a plan of nsa-plugin."""

    def __init__(self, host: Host, forward: Any, batch: Any, strategy: Strategy) -> None:
        self.strategy = strategy
        self._buffers = forward.captured[batch.size]
        self._own_pages = [buffers.pages for buffers in self._buffers]
        if strategy == "share":  # the steps differ in their lengths only
            for buffers in self._buffers[1:]:
                buffers.pages = self._own_pages[0]
        self._describe = report(host, forward).describe(batch, lambda live: self.describe(forward, live))
        geometry = Geometry(
            index_topk=_engine().TOP_K, page_size=_engine().PAGE_SIZE, table_width=forward.slots.shape[1],
            wide_page_table=False,
        )  # fmt: skip
        consumers = [consumer(buffers) for buffers in self._buffers]
        self._run = host.plan(
            self._describe(batch), geometry, consumers, "copy" if strategy == "copy" else "share", None
        )

    @staticmethod
    def describe(forward: Any, batch: Any) -> BatchDescriptor:
        """A batch in nsa-plugin's words; copies no tensor."""
        slots = TokenTable(forward.slots, batch.requests)
        if forward.draft_tokens:
            return BatchDescriptor(
                ForwardMode.TARGET_VERIFY, batch.size, batch.lengths, slots, draft_tokens=forward.draft_tokens
            )
        offsets = tuple(range(1, forward.num_steps + 1))
        return BatchDescriptor(ForwardMode.DECODE, batch.size, batch.lengths, slots, forward.num_steps, offsets)

    def run(self, batch: Any) -> None:
        """Write the metadata of all steps."""
        self._run(self._describe(batch))

    def give_back(self) -> None:
        """Let every step have its own page table again."""
        for buffers, pages in zip(self._buffers, self._own_pages, strict=True):
            buffers.pages = pages


def consumer(buffers: Any) -> StepMetadata:
    """The buffers of one step in nsa-plugin's words."""
    return StepMetadata(
        cache_seqlens=buffers.lengths, cu_seqlens_k=buffers.starts, seqlens_expanded=buffers.row_lengths,
        nsa_cache_seqlens=buffers.kept, nsa_cu_seqlens_k=buffers.kept_starts, page_table_1=None,
        real_page_table=buffers.pages,
    )  # fmt: skip


class ToyAdapter:
    """Implements `nsa_plugin.adapters.base.Adapter`."""

    name = ENGINE
    features: frozenset[str] = frozenset()
    prepared = Prepared

    def __init__(self) -> None:
        self._originals: dict[str, Callable[..., None]] = {}
        self._forwards: WeakSet[Any] = WeakSet()

    def probe(self) -> list[str]:
        """What the engine lacks; imports it here, not with this module."""
        return missing(NEEDS)

    def untested(self) -> list[str]:
        """Which hooked functions have parameters that no tested release has."""
        return untested(NEEDS)

    def install(self, host: Host) -> list[str]:
        """Replace the two methods, or say why not."""
        if self._originals:
            return []
        if problems := self.probe():
            return problems
        warn_if_untested(logger, ENGINE, TESTED, _engine().__version__)
        warn_of_untested(logger, NEEDS)
        self._host, forward = host, _engine().Forward
        replacements = {"capture": self._capture, "prepare": self._prepare}
        names = [row.target.rpartition(".")[2] for row in self.ledger()]
        originals = {name: vars(forward)[name] for name in names}
        try:
            for name in names:
                self._originals[name] = originals[name]
                _replace(forward, name, replacements[name])
        except Exception:
            self.undo()
            raise
        return []

    def ledger(self) -> Sequence[LedgerRow]:
        """Every attribute that `install` replaces, a row each."""
        return LEDGER

    def undo(self) -> None:
        """Put everything back."""
        for name, original in self._originals.items():
            setattr(_engine().Forward, name, original)
        for forward in self._forwards:
            for prepared in vars(forward).pop(PLANS).values():
                prepared.give_back()
        self._forwards.clear()
        self._originals.clear()

    def summary(self) -> str:
        """For one log line."""
        return f"{ENGINE} {_engine().__version__}: draft decode and target verify are computed once for all steps"

    def switch(self, on: bool) -> list[str]:
        """Nothing goes on as before: whoever prepares a replay looks at the host, and no graph has recorded anything."""
        return []

    def paths(self, host: Host) -> list[PathPlan]:
        """The best strategy that needs no place in a graph."""
        able = [strategy for strategy in host.strategies if strategy != "graph"]
        strategy = able[0] if able and not self.probe() else "off"
        return [PathPlan(name, strategy, "the engine offers no place in its graph") for name in PATHS]

    def _capture(self, forward: Any, batch: Any, *arguments: Any, **keywords: Any) -> None:
        self._originals["capture"](forward, batch, *arguments, **keywords)
        self._plans(forward).pop(batch.size, None)  # of buffers that are gone
        for strategy in self._host.strategies:  # none while switched off
            if strategy == "graph":
                continue  # this engine offers no place in its graph
            prepared = None
            try:
                prepared = self.prepared(self._host, forward, batch, strategy)
                prepared.run(batch)
            except Exception as error:
                if prepared is not None:
                    prepared.give_back()
                self._fall_back(forward, batch, "capture", strategy, error)
            else:
                self._plans(forward)[batch.size] = prepared
                report(self._host, forward).using(strategy)
                return

    def _prepare(self, forward: Any, batch: Any, *arguments: Any, **keywords: Any) -> None:
        prepared = self._plans(forward).get(batch.size)
        if prepared is None or not self._host.on:
            self._originals["prepare"](forward, batch, *arguments, **keywords)
            return
        try:
            prepared.run(batch)
        except Exception as error:
            del self._plans(forward)[batch.size]  # from now on the engine does it; graphs still read the same buffers
            self._fall_back(forward, batch, "replay", prepared.strategy, error, *arguments, **keywords)

    def _plans(self, forward: Any) -> dict[int, Prepared]:
        """By captured size. They know their forward: kept anywhere else but there, they would keep it for ever."""
        self._forwards.add(forward)
        plans: dict[int, Prepared] = vars(forward).setdefault(PLANS, {})
        return plans

    def _fall_back(
        self, forward: Any, batch: Any, stage: Stage, strategy: str, error: Exception, *arguments: Any, **keywords: Any
    ) -> None:
        self._originals["prepare"](forward, batch, *arguments, **keywords)
        report(self._host, forward).fell_back(stage, strategy, error)


PATHS = ("draft decode", "target verify")
PLANS = "_toy_adapter_plans"


def report(host: Host, forward: Any) -> PathReport:
    """The reports of a forward's path: counters, metrics, observers, and the engine's log."""
    return host.path(ENGINE, PATHS[bool(forward.draft_tokens)], logger)


class ToyPlugin:
    """What nsa-plugin asks."""

    def __init__(self, adapter: Adapter | None = None) -> None:
        self._adapters = (ToyAdapter() if adapter is None else adapter,)

    @hookimpl
    def nsa_plugin_adapters(self) -> Sequence[Adapter]:
        """The adapter."""
        return self._adapters


def register() -> None:
    """What the toy engine's entry-point group names: called when the engine loads its plugins."""
    entry.register(ENGINE, logger, ToyPlugin())


def _engine() -> Any:
    import toy_engine

    return toy_engine


def _replace(owner: Any, name: str, replacement: Callable[..., None]) -> None:
    def method(forward: Any, *arguments: Any, **keywords: Any) -> None:
        replacement(forward, *arguments, **keywords)  # a release may pass more than this adapter knows

    setattr(owner, name, method)
