"""The hooks that plugins implement: they say who provides what. None is called per replay or per draft step.

A third party implements any of these in an object that its distribution names in the entry-point group `nsa_plugin`,
each marked with `nsa_plugin.hookimpl`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pluggy
import torch

from nsa_plugin.core.batch import BatchDescriptor, Geometry
from nsa_plugin.core.draft_steps import DraftLimits, DraftStep, FillDraftSteps
from nsa_plugin.core.group_rows import GroupMetadata
from nsa_plugin.core.metadata import PrecomputedMetadata, StepMetadata
from nsa_plugin.core.step_update import DraftRows, IndexerRows, SlotGroups

if TYPE_CHECKING:
    from nsa_plugin.adapters.base import Adapter
    from nsa_plugin.adapters.reporting import Fallback, Mismatch

PROJECT = "nsa_plugin"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def nsa_plugin_adapters() -> Sequence[Adapter]:
    """Offer engine adapters.

    Fires when an engine's entry point loads this package, once per process. The first adapter of a name wins, and
    plugins are asked before the built-in adapters.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def nsa_plugin_describe(engine: str, batch: object) -> Callable[[object], BatchDescriptor] | None:
    """Provide the function that maps one of the engine's batches onto a `BatchDescriptor`.

    Fires when an implementation is bound for a captured size, with a batch of that size. Return None to leave the batch
    to the next plugin; the adapter's own `describe` is the last resort. The function is called at each replay. It must
    copy no tensor.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def nsa_plugin_bind_precompute(
    batch: BatchDescriptor,
    geometry: Geometry,
    out: PrecomputedMetadata | GroupMetadata,
    enabled: torch.Tensor | None,
) -> Callable[[BatchDescriptor], None] | None:
    """Provide a precompute implementation bound to the buffers `out`.

    Fires when a `ReplayPlan` is made. Return None to leave the buffers to the next plugin; the built-in implementation is
    the last resort. The bound function is called at each replay. It must write every live entry of `out`, allocate
    nothing and not sync. `out` is a `GroupMetadata` where an engine's attention groups keep planes of their own, as vLLM's
    target does.
    With `enabled`, an int32 tensor [1] on the device, the function is recorded in a CUDA graph. It must read the flag on
    the device at each run, and leave `out` as it is where the flag is 0. An implementation that lacks the parameter is
    not recorded.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def nsa_plugin_bind_copy(
    source: PrecomputedMetadata, destinations: Sequence[StepMetadata]
) -> Callable[[], None] | None:
    """Provide a copy implementation bound to the buffers of `source` and `destinations`.

    Fires when a `ReplayPlan` with the strategy `copy` is made. Return None to leave the copy to the next plugin; the
    built-in implementation is the last resort. The bound function is called at each replay. It must copy every live
    entry, allocate nothing and not sync.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def nsa_plugin_bind_step_update(
    rows: DraftRows, slots: SlotGroups, request_maps: Sequence[torch.Tensor], indexers: Sequence[IndexerRows]
) -> Callable[[bool], None] | None:
    """Provide a step-update implementation bound to the buffers of a draft that the engine advances from step to step.

    Fires when such a draft is bound (vLLM's Model Runner V2), unless its index keys are pooled. Return None to leave it to the
    next plugin; the built-in implementation is the last resort. The bound function is called at the start of each draft step, or recorded there in
    a CUDA graph. Its argument says whether the step is the first of its draft. It must write what `StepUpdate` writes,
    allocate nothing and not sync.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def nsa_plugin_bind_draft_steps(steps: Sequence[DraftStep], limits: DraftLimits) -> FillDraftSteps | None:
    """Provide an implementation that computes positions, slots and lengths of all steps of a draft at once.

    Fires when such a draft is bound (vLLM's Model Runner V1). Return None to leave it to the next plugin; the built-in
    implementation is the last resort. The bound function is called once per draft, with the arguments that
    `bind_draft_steps` names. It must allocate nothing and not sync.
    """
    raise NotImplementedError


@hookspec
def nsa_plugin_observe_replays(
    engine: str, path: str, strategy: str, batch: BatchDescriptor
) -> Callable[[BatchDescriptor], None] | None:
    """Provide a function to be called after each replay.

    Fires when an implementation is bound for a captured size. The functions of all plugins are called, outside of any
    CUDA graph. One that raises is logged and not called again.
    """
    raise NotImplementedError


@hookspec
def nsa_plugin_fell_back(fallback: Fallback) -> None:
    """Learn that something was handed back to the engine's own path.

    Fires once per fall-back, after the engine's path has run. Errors raised here are logged and ignored.
    """
    raise NotImplementedError


@hookspec
def nsa_plugin_mismatched(mismatch: Mismatch) -> None:
    """Learn that a verification found values other than the engine's own.

    Fires once per mismatch, after the engine's values are in place and a repro file has been written. Errors raised here
    are logged and ignored. Tensors of `mismatch.batch` are the engine's: copy those that you keep.
    """
    raise NotImplementedError
