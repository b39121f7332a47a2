"""`ReplayPlan`: everything bound at capture, so that a replay only runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, Protocol

import torch

from nsa_plugin.core import api
from nsa_plugin.core.batch import BatchDescriptor, Geometry
from nsa_plugin.core.checks import instance, instances
from nsa_plugin.core.errors import InvalidTypeError, reject
from nsa_plugin.core.group_rows import GroupMetadata, GroupRows, check_groups
from nsa_plugin.core.metadata import PrecomputedMetadata, StepMetadata
from nsa_plugin.core.validation import check_batch, check_buffers, check_destinations, check_enabled, check_shared

PlanStrategy = Literal["copy", "share"]


class Bind(Protocol):
    """Binds implementations to buffers: the precompute, and what fills the destinations after it (None if nothing must).

    With `enabled` (int32 [1]) the precompute leaves `out` as it is where that is 0 on the device.
    """

    def __call__(
        self,
        batch: BatchDescriptor,
        out: PrecomputedMetadata | GroupMetadata,
        destinations: Sequence[StepMetadata],
        *,
        enabled: torch.Tensor | None,
    ) -> tuple[api.BoundPrecompute, api.BoundCopy | None]: ...


Consumers = Sequence[StepMetadata] | Sequence[GroupRows]
"""What a plan fills: the buffers of each step, or of each attention group."""


class ReplayPlan:
    """Prepares the metadata of every replay of one captured shape.

    Parameters
    ----------
    batch : BatchDescriptor
        A batch of the captured mode and (padded) size; its tensors are only looked at for validation.
    geometry : Geometry
    consumers : sequence of StepMetadata, or of GroupRows
        The buffers that captured kernels read, one set per step; with `share` and a batch that has `query_start_loc`
        those of any number of attention groups, whose block tables stay those of `batch`.
        `copy`: each has its own; the metadata is computed once and written to all.
        `share`: computed in place. Steps of equal lengths all read `consumers[0]`; others share the page tables.
    strategy : "copy" or "share"
    derive : callable, optional
        Computes the derived planes of `consumers[0]` after the rest of it is there (an engine's own functions).
    bind : Bind, optional
        Where implementations other than the built-in ones come from.
    enabled : int32 tensor [1] on the batch's device, optional
        A switch that each run reads on the device: where it is 0, the run leaves the consumers as they are; where it is
        1, it writes them. Whoever changes it does so on the stream of the runs. `derive` is called in either case.
        Not with further consumers to copy to.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        From the constructor, if anything does not fit.

    Notes
    -----
    `run` may be recorded in a CUDA graph. Its kernels read tables that the plan owns: keep the plan for as long as the
    graph. Making the plan and running it once compiles all that its replays need.
    """

    def __init__(
        self,
        batch: BatchDescriptor,
        geometry: Geometry,
        consumers: Consumers,
        *,
        strategy: PlanStrategy,
        derive: Callable[[], None] | None = None,
        bind: Bind = api.bind,
        enabled: torch.Tensor | None = None,
    ) -> None:
        if strategy not in ("copy", "share"):
            reject("strategy", "'copy' or 'share'", repr(strategy))
        check_batch(batch, geometry)
        for name, value in (("derive", derive), ("bind", bind)):
            if not callable(value) and (value is not None or name == "bind"):
                reject(name, "a callable", type(value).__name__, error=InvalidTypeError)
        self.strategy = strategy
        self.mode = batch.mode
        self.batch_size = batch.batch_size
        self._bound = _shape(batch)
        self._derive = derive
        self.metadata: PrecomputedMetadata | GroupMetadata
        copies: Sequence[StepMetadata] = ()
        if isinstance(consumers, Sequence) and consumers and isinstance(consumers[0], GroupRows):
            if strategy != "share":
                reject("strategy", "'share' for attention groups", repr(strategy))
            self.metadata = GroupMetadata(instances("consumers", consumers, GroupRows), batch, geometry)
            check_groups(self.metadata, batch)
        else:
            steps = instances("consumers", consumers, StepMetadata)
            self.metadata, copies = _of_steps(batch, geometry, steps, strategy)
        check_enabled(enabled, batch, copies)
        self._precompute, self._copy = bind(batch, self.metadata, copies, enabled=enabled)

    def run(self, batch: BatchDescriptor) -> None:
        """Write the metadata of `batch` to where the captured kernels read it.

        Allocates nothing and does not sync with the host (`derive` and foreign implementations aside).

        Raises
        ------
        InvalidTypeError, InvalidValueError
            The batch is of another mode, size or layout (`LAYOUT`) than the plan's. Nothing was written. Its tensors are
            not looked at.
        """
        size, mode, draft_tokens, step_offsets, static, all_exist, slots = self._bound
        try:
            other = (
                batch.batch_size != size
                or batch.mode is not mode
                or batch.draft_tokens != draft_tokens
                or batch.step_offsets != step_offsets
                or (batch.extend_lens is None) is not static
                or (batch.query_start_loc is None) is not all_exist
                or batch.slots.__class__ is not slots
            )
        except AttributeError:
            other = True
        if other:
            self._refuse(batch)
        self._precompute(batch)
        if self._derive is not None:
            self._derive()
        if self._copy is not None:
            self._copy()

    def _refuse(self, batch: BatchDescriptor) -> NoReturn:
        instance("batch", batch, BatchDescriptor)
        size, mode, *bound = self._bound
        if batch.batch_size != size or batch.mode is not mode:
            came = getattr(batch.mode, "name", repr(batch.mode))
            reject("batch", f"{mode.name} of {size} requests", f"{came} of {batch.batch_size}")
        for name, wanted, came in zip(LAYOUT, bound, _shape(batch)[2:], strict=True):
            if wanted != came:
                reject(f"batch.{name}", f"{wanted}, as the plan was made for", came, fix="make another plan")
        raise AssertionError("the batch is what the plan was made for")


LAYOUT = ("draft_tokens", "step_offsets", "extend_lens is None", "query_start_loc is None", "slots")
"""What else of a batch must be as it was bound, besides its mode and size: of `slots` the kind, of optional tensors whether they are there."""


def _of_steps(
    batch: BatchDescriptor, geometry: Geometry, consumers: Sequence[StepMetadata], strategy: PlanStrategy
) -> tuple[PrecomputedMetadata, Sequence[StepMetadata]]:
    """What is computed for these consumers, and to which of them it is copied."""
    planes = len(batch.offsets)
    copies: Sequence[StepMetadata] = ()
    if len(consumers) not in {1, batch.num_steps} or len(consumers) < planes:
        reject("consumers", f"{batch.num_steps} (num_steps)", len(consumers))
    if strategy == "share" or planes == 1:
        metadata = PrecomputedMetadata(tuple(consumers[:planes]), batch, geometry)
        copies = consumers[1:] if strategy == "copy" else ()
    else:
        tokens = consumers[0].positions is not None
        metadata = PrecomputedMetadata.allocate(batch, geometry, tokens=tokens)
        copies = consumers
    check_buffers(metadata, batch, geometry)
    if strategy == "share" and planes == 1:
        check_shared(consumers)
    if copies:
        check_destinations(metadata, copies)
    return metadata, copies


def _shape(batch: BatchDescriptor) -> tuple[Any, ...]:
    return (
        batch.batch_size, batch.mode, batch.draft_tokens, batch.step_offsets, batch.extend_lens is None,
        batch.query_start_loc is None, type(batch.slots),
    )  # fmt: skip
