"""`Host`: this package in one process. It holds settings, plugins, counters and the switch."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch

from nsa_plugin import repro
from nsa_plugin.adapters.base import Adapter, Strategy
from nsa_plugin.adapters.reporting import Fallback, Mismatch, PathReport
from nsa_plugin.adapters.sglang.adapter import SglangAdapter
from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.core.api import best_impl
from nsa_plugin.core.batch import BatchDescriptor, Geometry
from nsa_plugin.core.draft_steps import DraftLimits, DraftStep, FillDraftSteps, bind_draft_steps
from nsa_plugin.core.plan import Consumers, PlanStrategy, ReplayPlan
from nsa_plugin.core.step_update import DraftRows, IndexerRows, SlotGroups, StepUpdate, TailRows
from nsa_plugin.hookspec import hookimpl
from nsa_plugin.manager import Manager
from nsa_plugin.monitoring import Labels, Monitor
from nsa_plugin.settings import Settings
from nsa_plugin.switch import Switch

logger = logging.getLogger("nsa_plugin")
P = ParamSpec("P")
T = TypeVar("T")

TRIED: dict[str, tuple[Strategy, ...]] = {
    "auto": ("graph", "share", "copy"),
    "graph": ("graph", "share", "copy"),
    "share": ("share", "copy"),
    "copy": ("copy",),
    "off": (),
}
"""Setting to the strategies that are tried for it, best first; the engine's own path is always the last resort."""


class BuiltIn:
    """The built-in adapters, as the plugin that is asked last."""

    def __init__(self) -> None:
        self._adapters = (SglangAdapter(), VllmAdapter())

    @hookimpl(trylast=True)
    def nsa_plugin_adapters(self) -> Sequence[Adapter]:
        """The adapters for sglang and vLLM."""
        return self._adapters


class Host(Switch):
    """Implements `nsa_plugin.adapters.base.Host`.

    Attributes
    ----------
    settings : Settings
    manager : Manager
    fallbacks : Counter of (engine, path, stage, strategy, error type)
        Times that something was handed back to the engine's own path.
    verifications : Counter of (engine, path, strategy)
        Replays that were compared with the engine's own path.
    mismatches : Counter of (engine, path, strategy, field)
        Times that a verification found another value than the engine's own.
    on, reasons
        As in `Switch`.
    """

    def __init__(self, settings: Settings | None = None, manager: Manager | None = None) -> None:
        self.settings = Settings() if settings is None else settings
        super().__init__(self.settings.switch_file)
        self.manager = Manager(self.settings.plugins) if manager is None else manager
        self.manager.register(BuiltIn(), name="built-in")
        self.fallbacks: Counter[tuple[str, ...]] = Counter()
        self.verifications: Counter[tuple[str, ...]] = Counter()
        self.mismatches: Counter[tuple[str, ...]] = Counter()
        self._monitor = Monitor(self.settings)
        self._said: set[tuple[str, ...]] = set()
        self._said_in = os.getpid()
        self._introduction: Callable[[], None] | None = None

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """Strategies to try, best first; empty while switched off."""
        return TRIED[self.settings.strategy] if self.on else ()

    @property
    def configured(self) -> tuple[Strategy, ...]:
        """Strategies to install for, best first, whether switched on or off."""
        return TRIED[self.settings.strategy]

    @property
    def takes_unproved(self) -> bool:
        """Whether the settings name a strategy; `auto` takes only what has run on a GPU."""
        return self.settings.strategy not in ("auto", "off")

    @property
    def verify(self) -> int:
        """Every n-th replay is compared with the engine's own path; 0 compares none."""
        return self.settings.verify

    @property
    def verify_mode(self) -> str:
        """Whether values are compared before use or after the graph has run; "auto" leaves it to each path."""
        return self.settings.verify_mode

    @property
    def exact_step_lengths(self) -> bool:
        """Whether the lengths of draft steps count the draft tokens before them."""
        return self.settings.step_lengths == "exact"

    def with_exact_lengths(self, steps: int) -> str:
        """What that gave a trained model that drafts so many steps, in words."""
        from nsa_plugin.estimate import acceptance, model  # most engines never ask

        return acceptance.with_exact_lengths(model.Measured.load(), steps)

    def path(self, engine: str, path: str, logger: logging.Logger) -> PathReport:
        """The object that reports for one path of an engine, through the engine's `logger`."""
        return PathReport(self, engine, path, logger)

    def left_as_is(self, on: bool) -> list[str]:
        """Work that a switch does not reach, as all adapters report it, one line each."""
        left: list[str] = []
        for adapter in self.manager.adapters().values():
            try:
                left += adapter.switch(on)
            except Exception as error:  # a third party's adapter may lack it, too
                left.append(f"{adapter.name}: its adapter can't be switched ({type(error).__name__}: {error})")
        return left

    def instrument(
        self, call: Callable[[Any], None], engine: str, path: str, strategy: str, steps: int
    ) -> Callable[[Any], None]:
        """Wrap `call`, which serves `steps` draft steps, for the metrics of the settings; `call` itself without any."""
        return self._monitor.instrument(call, Labels(engine, path, strategy), steps)

    def durations(self, engine: str, path: str, strategy: str, steps: int) -> Callable[[float], None] | None:
        """A function that takes the seconds of one replay, for a replay of several calls; None without metrics."""
        return self._monitor.durations(Labels(engine, path, strategy), steps)

    def ranged(self, call: Callable[P, T], engine: str, path: str, strategy: str) -> Callable[P, T]:
        """Wrap `call` in an NVTX range; `call` itself if the settings ask for none."""
        return self._monitor.ranged(call, Labels(engine, path, strategy))

    def flush_metrics(self) -> None:
        """Hand over all durations now, without waiting for the background thread."""
        self._monitor.flush()

    def buffers(self, engine: str, path: str, strategy: str, size: int) -> None:
        """Report `size` more bytes of buffers for captured batch sizes; negative for freed ones."""
        self._monitor.buffers(Labels(engine, path, strategy), size)

    def verified(self, engine: str, path: str, strategy: str) -> None:
        """Count a verification, whatever it found."""
        which = Labels(engine, path, strategy)
        self.verifications[which] += 1
        self._monitor.verified(which)

    def mismatched(self, logger: logging.Logger, mismatch: Mismatch) -> None:
        """Count a mismatch, log the first of its path with a repro file, switch off this process, tell observers."""
        fields = mismatch.fields
        which = Labels(mismatch.engine, mismatch.path, mismatch.strategy)
        first = not any(key[:3] == which for key in self.mismatches)
        self.mismatches.update((*which, field) for field in fields)
        self._monitor.mismatched(which, fields)
        if first:
            logger.error(
                "nsa-plugin: %s: strategy %s computed other values than %s's own path (%s); its own values are used, "
                "%s. %s",
                mismatch.path,
                mismatch.strategy,
                mismatch.engine,
                ", ".join(fields),
                "from the next batch on: this one was computed with the others"
                if mismatch.used
                else "for this batch too",
                self._write_repro(mismatch),
            )
        self.switch(False, "a verification found a difference")
        self.manager.mismatched(mismatch)

    def _write_repro(self, mismatch: Mismatch) -> str:
        if self.settings.repro_dir is None:
            return "NSA_PLUGIN_REPRO_DIR names no directory for a repro file"
        try:
            return f"Look at it with: nsa-plugin verify {repro.write(self.settings.repro_dir, mismatch, self.settings)}"
        except Exception as error:
            return f"No repro file: {error}"

    def describe(
        self, engine: str, batch: object, default: Callable[[object], BatchDescriptor]
    ) -> Callable[[object], BatchDescriptor]:
        """The describe function for batches like `batch`: a plugin's, else `default`."""
        return self.manager.describe(engine, batch, default)

    def plan(
        self,
        batch: BatchDescriptor,
        geometry: Geometry,
        consumers: Consumers,
        strategy: PlanStrategy,
        derive: Callable[[], None] | None,
        enabled: torch.Tensor | None = None,
    ) -> Callable[[BatchDescriptor], None]:
        """Make a `ReplayPlan` with the implementations that plugins provide, else the built-in ones; returns its `run`."""
        return ReplayPlan(
            batch,
            geometry,
            consumers,
            strategy=strategy,
            derive=derive,
            bind=self.manager.bind,
            enabled=enabled,
        ).run

    def step_update(
        self,
        rows: DraftRows,
        slots: SlotGroups,
        request_maps: Sequence[torch.Tensor],
        indexers: Sequence[IndexerRows],
        tails: Sequence[TailRows] = (),
    ) -> StepUpdate:
        """Make a `StepUpdate` with the implementation that a plugin provides, else the built-in one."""
        impl = best_impl(rows.seq_lens.device)  # interpreted on a CPU, where vLLM's own kernels are interpreted too
        return StepUpdate(rows, slots, request_maps, indexers, tails, impl=impl, bind=self.manager.bind_step_update)

    def draft_steps(self, steps: Sequence[DraftStep], limits: DraftLimits) -> FillDraftSteps:
        """Bind draft steps with the implementation that a plugin provides, else the built-in one."""
        return bind_draft_steps(steps, limits, bind=self.manager.bind_draft_steps)

    def observer(
        self, engine: str, path: str, strategy: str, batch: BatchDescriptor
    ) -> Callable[[BatchDescriptor], None] | None:
        """A function that calls all observers after a replay; None without any. One that raises is not called again."""
        watching = list(self.manager.observers(engine, path, strategy, batch))
        if not watching:
            return None

        def observe(replayed: BatchDescriptor) -> None:
            for watch in tuple(watching):
                try:
                    watch(replayed)
                except Exception:
                    watching.remove(watch)
                    logger.exception("an observer of replays failed: it is not called again")

        return observe

    def fell_back(self, logger: logging.Logger, fallback: Fallback) -> None:
        """Count a fall-back, log the first with its cause, tell observers."""
        kind = type(fallback.error).__name__
        cause = (fallback.engine, fallback.path, fallback.stage, fallback.strategy, kind)
        self.fallbacks[cause] += 1
        self._monitor.fell_back(Labels(fallback.engine, fallback.path, fallback.strategy), fallback.stage, kind)
        if self.fallbacks[cause] == 1:
            logger.error(
                "nsa-plugin: %s: strategy %s failed at %s (%s: %s); %s's own values are used instead. "
                "NSA_PLUGIN_STRATEGY=off switches the plugin off",
                fallback.path,
                fallback.strategy,
                fallback.stage,
                kind,
                fallback.error,
                fallback.engine,
                exc_info=fallback.error,
            )
        self.manager.fell_back(fallback)

    def using(self, logger: logging.Logger, engine: str, path: str, strategy: str) -> None:
        """Log once per process that a path of an engine is served with `strategy`; first what this plugin is, if nobody has."""
        self.introduce()
        if (engine, path, strategy) not in self._said:
            self._said.add((engine, path, strategy))
            logger.info("nsa-plugin: %s: strategy %s", path, strategy)

    def introduce(self, how: Callable[[], None] | None = None) -> None:
        """Call `how`, which logs what was installed, now and once in every process that was forked from this one.

        Such a process may have a log of its own, in which nothing of the parent's is found.
        """
        process = os.getpid()
        if how is not None:
            self._introduction = how
        elif process == self._said_in:
            return
        else:
            self._said = set()
        self._said_in = process
        if self._introduction is not None:
            self._introduction()
