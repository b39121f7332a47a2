"""A typed wrapper of `pluggy.PluginManager`: loads third-party plugins and resolves hooks into bound callables."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points

import pluggy
import torch

from nsa_plugin import hookspec
from nsa_plugin.adapters.base import Adapter
from nsa_plugin.adapters.reporting import Fallback, Mismatch
from nsa_plugin.core import api
from nsa_plugin.core.batch import BatchDescriptor
from nsa_plugin.core.draft_steps import DraftLimits, DraftStep, FillDraftSteps
from nsa_plugin.core.errors import UnavailableError
from nsa_plugin.core.group_rows import GroupMetadata
from nsa_plugin.core.metadata import PrecomputedMetadata, StepMetadata
from nsa_plugin.core.step_update import BoundStepUpdate, DraftRows, IndexerRows, SlotGroups

logger = logging.getLogger("nsa_plugin")

HOOKS = tuple(sorted(name for name in vars(hookspec) if name.startswith("nsa_plugin_")))
"""Names of all hooks."""


class Manager:
    """Registered plugins, and what they provide.

    Parameters
    ----------
    allowed : set of str, or None
        Entry-point names that `load_third_parties` may load; None allows all.
    """

    def __init__(self, allowed: frozenset[str] | None = None) -> None:
        self._relay = pluggy.PluginManager(hookspec.PROJECT)
        self._relay.add_hookspecs(hookspec)
        self._allowed = allowed

    def register(self, plugin: object, name: str | None = None) -> None:
        """Add a plugin; it is asked before those that are registered already.

        Raises
        ------
        pluggy.PluginValidationError
            A hook of the plugin is unknown, or has parameters that the specification lacks. The plugin is not added.
        """
        self._relay.register(plugin, name=name)
        try:
            self._relay.check_pending()
        except pluggy.PluginValidationError:
            self._relay.unregister(plugin)
            raise

    def unregister(self, plugin: object) -> None:
        """Remove a plugin."""
        self._relay.unregister(plugin)

    def load_third_parties(self) -> list[str]:
        """Load the allowed plugins of the entry-point group `nsa_plugin`; returns the names of those that loaded.

        A plugin that fails to load is logged and left out. An allowed name that is not installed is logged.
        """
        loaded = []
        found = {point.name: point for point in entry_points(group=hookspec.PROJECT)}
        for name in sorted((self._allowed or set()) - found.keys()):
            logger.error("plugin %r is allowed by NSA_PLUGIN_PLUGINS but not installed; found: %s", name, sorted(found))
        for name, point in sorted(found.items()):
            if self._allowed is not None and name not in self._allowed:
                logger.info("plugin %r is not in NSA_PLUGIN_PLUGINS: not loaded", name)
                continue
            try:
                self.register(point.load(), name=name)
            except Exception:
                logger.exception("plugin %r failed to load: left out", name)
            else:
                loaded.append(name)
        return loaded

    def providers(self) -> dict[str, list[str]]:
        """Names of the plugins that implement each hook, in the order in which they are asked."""
        return {
            hook: [
                implementation.plugin_name
                for implementation in reversed(getattr(self._relay.hook, hook).get_hookimpls())
            ]
            for hook in HOOKS
        }

    def adapter(self, name: str) -> Adapter | None:
        """The adapter of that name; a third party's before the built-in one, None if nobody offers it."""
        return self.adapters().get(name)

    def adapters(self) -> dict[str, Adapter]:
        """All adapters by name; a third party's before the built-in one of that name."""
        found: dict[str, Adapter] = {}
        for offered in self._relay.hook.nsa_plugin_adapters():
            for adapter in offered:
                found.setdefault(adapter.name, adapter)
        return found

    def describe(
        self, engine: str, batch: object, default: Callable[[object], BatchDescriptor]
    ) -> Callable[[object], BatchDescriptor]:
        """The function that describes batches like `batch`: the first plugin's that provides one, else `default`."""
        found: Callable[[object], BatchDescriptor] | None = self._relay.hook.nsa_plugin_describe(
            engine=engine, batch=batch
        )
        return default if found is None else found

    def bind(
        self,
        batch: BatchDescriptor,
        out: PrecomputedMetadata | GroupMetadata,
        destinations: Sequence[StepMetadata],
        *,
        enabled: torch.Tensor | None = None,
    ) -> tuple[api.BoundPrecompute, api.BoundCopy | None]:
        """Bind the precompute and the copy: plugins' implementations where they provide them, else the built-in ones.

        Raises
        ------
        UnavailableError
            `enabled` is given, and the precompute of the plugin that answers does not take it.
        """
        precompute = self._bind_precompute(batch, out, enabled)
        if precompute is not None and not destinations:
            return precompute, None
        copy: api.BoundCopy | None = (
            self._relay.hook.nsa_plugin_bind_copy(source=out, destinations=destinations) if destinations else None
        )
        if isinstance(out, GroupMetadata) or (precompute is None and copy is None):
            return api.bind(batch, out, destinations, enabled=enabled)
        if copy is None and destinations:
            copy = api.bind_copy(out, destinations)
        return api.bind_precompute(batch, out, enabled=enabled) if precompute is None else precompute, copy

    def _bind_precompute(
        self, batch: BatchDescriptor, out: PrecomputedMetadata | GroupMetadata, enabled: torch.Tensor | None
    ) -> api.BoundPrecompute | None:
        """The precompute of the first plugin that answers. They are asked one by one, to know whose answer it is."""
        name = "nsa_plugin_bind_precompute"
        asked = [
            implementation
            for implementation in reversed(getattr(self._relay.hook, name).get_hookimpls())
            if not (implementation.wrapper or implementation.hookwrapper)
        ]
        for implementation in asked:
            others = [other.plugin for other in asked if other is not implementation]
            found: api.BoundPrecompute | None = self._relay.subset_hook_caller(name, others)(
                batch=batch, geometry=out.geometry, out=out, enabled=enabled
            )
            if found is None:
                continue
            if enabled is not None and "enabled" not in implementation.argnames:
                raise UnavailableError(
                    f"plugin {implementation.plugin_name!r}: its {name} does not take 'enabled', so what it provides can't "
                    "be recorded in a CUDA graph: it could not be switched off there; add the parameter, or set "
                    "NSA_PLUGIN_STRATEGY=share"
                )
            return found
        return None

    def bind_step_update(
        self, rows: DraftRows, slots: SlotGroups, request_maps: Sequence[torch.Tensor], indexers: Sequence[IndexerRows]
    ) -> BoundStepUpdate | None:
        """The step update of the first plugin that provides one; None for the built-in implementation."""
        found: BoundStepUpdate | None = self._relay.hook.nsa_plugin_bind_step_update(
            rows=rows, slots=slots, request_maps=request_maps, indexers=indexers
        )
        return found

    def bind_draft_steps(self, steps: Sequence[DraftStep], limits: DraftLimits) -> FillDraftSteps | None:
        """The `fill` of the first plugin that provides one for these steps; None for the built-in implementation."""
        found: FillDraftSteps | None = self._relay.hook.nsa_plugin_bind_draft_steps(steps=steps, limits=limits)
        return found

    def observers(
        self, engine: str, path: str, strategy: str, batch: BatchDescriptor
    ) -> tuple[Callable[[BatchDescriptor], None], ...]:
        """The functions that plugins want called after each replay of a plan."""
        return tuple(
            self._relay.hook.nsa_plugin_observe_replays(engine=engine, path=path, strategy=strategy, batch=batch)
        )

    def fell_back(self, fallback: Fallback) -> None:
        """Tell observers of a fall-back; their errors are logged, not raised."""
        try:
            self._relay.hook.nsa_plugin_fell_back(fallback=fallback)
        except Exception:
            logger.exception("an observer of fall-backs failed")

    def mismatched(self, mismatch: Mismatch) -> None:
        """Tell observers of a mismatch; their errors are logged, not raised."""
        try:
            self._relay.hook.nsa_plugin_mismatched(mismatch=mismatch)
        except Exception:
            logger.exception("an observer of mismatches failed")
