"""The package at work in one process: settings, plugins, what was counted and logged."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence

from nsa_plugin.adapters.base import Adapter, Fallback, Strategy
from nsa_plugin.adapters.sglang.adapter import SglangAdapter
from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.core.batch import BatchDescriptor, Geometry
from nsa_plugin.core.metadata import StepMetadata
from nsa_plugin.core.plan import PlanStrategy, ReplayPlan
from nsa_plugin.hookspec import hookimpl
from nsa_plugin.manager import Manager
from nsa_plugin.settings import Settings

logger = logging.getLogger("nsa_plugin")

STRATEGIES: dict[str, tuple[Strategy, ...]] = {
    "auto": ("graph", "share", "copy"),
    "graph": ("graph", "share", "copy"),
    "share": ("share", "copy"),
    "copy": ("copy",),
    "off": (),
}
"""What to try for each setting, best first; the engine's own path comes last always."""


class BuiltIn:
    """What this package itself provides, as the plugin that is asked last."""

    def __init__(self) -> None:
        self._adapters = (SglangAdapter(), VllmAdapter())

    @hookimpl(trylast=True)
    def nsa_plugin_adapters(self) -> Sequence[Adapter]:
        """The adapters for sglang and vLLM."""
        return self._adapters


class Host:
    """Implements `nsa_plugin.adapters.base.Host`.

    Attributes
    ----------
    settings : Settings
    manager : Manager
    fallbacks : Counter of (engine, path, stage, strategy, error type)
        Times that something was handed back to the engine's own path.
    """

    def __init__(self, settings: Settings | None = None, manager: Manager | None = None) -> None:
        self.settings = Settings() if settings is None else settings
        self.manager = Manager(self.settings.plugins) if manager is None else manager
        self.manager.register(BuiltIn(), name="built-in")
        self.fallbacks: Counter[tuple[str, ...]] = Counter()
        self._said: set[tuple[str, ...]] = set()

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """Strategies to try, best first; empty when switched off."""
        return STRATEGIES[self.settings.strategy]

    def describe(
        self, engine: str, batch: object, default: Callable[[object], BatchDescriptor]
    ) -> Callable[[object], BatchDescriptor]:
        """The describe function for batches like `batch`: a plugin's, else `default`."""
        return self.manager.describe(engine, batch, default)

    def plan(
        self,
        batch: BatchDescriptor,
        geometry: Geometry,
        consumers: Sequence[StepMetadata],
        strategy: PlanStrategy,
        derive: Callable[[], None] | None,
    ) -> Callable[[BatchDescriptor], None]:
        """Make a `ReplayPlan` with whatever implementations plugins provide; returns its `run`."""
        return ReplayPlan(
            batch,
            geometry,
            consumers,
            strategy=strategy,
            derive=derive,
            bind=self.manager.bind,
        ).run

    def observer(
        self, engine: str, path: str, strategy: str, batch: BatchDescriptor
    ) -> Callable[[BatchDescriptor], None] | None:
        """What to call after each replay; None if nobody watches. An observer that fails is dropped."""
        watching = list(self.manager.observers(engine, path, strategy, batch))
        if not watching:
            return None

        def observe(live: BatchDescriptor) -> None:
            for watch in tuple(watching):
                try:
                    watch(live)
                except Exception:
                    watching.remove(watch)
                    logger.exception("an observer of replays failed: it is not called again")

        return observe

    def fell_back(self, logger: logging.Logger, fallback: Fallback) -> None:
        """Count a fall-back, log its cause once, tell observers."""
        kind = type(fallback.error).__name__
        cause = (fallback.engine, fallback.path, fallback.stage, fallback.strategy, kind)
        self.fallbacks[cause] += 1
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
        """Log once that a path of an engine is served, and how."""
        if (engine, path, strategy) not in self._said:
            self._said.add((engine, path, strategy))
            logger.info("nsa-plugin: %s: strategy %s", path, strategy)
