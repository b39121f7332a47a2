"""`ReplayPlan`: plan at capture, where everything is checked and bound; run at each replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, Protocol

import torch

from nsa_plugin.core import api
from nsa_plugin.core.batch import BatchDescriptor, Geometry
from nsa_plugin.core.checks import function, instance, instances
from nsa_plugin.core.errors import reject
from nsa_plugin.core.group_rows import GroupMetadata, GroupRows, check_groups
from nsa_plugin.core.metadata import PrecomputedMetadata, StepMetadata
from nsa_plugin.core.validation import check_batch, check_buffers, check_destinations, check_enabled, check_shared

PlanStrategy = Literal["copy", "share"]


class Bind(Protocol):
    """Binds implementations to buffers: returns the precompute, and the copy that then fills the destinations.

    The copy is None if the precompute fills the destinations itself. With `enabled` (int32 tensor [1]) the precompute
    leaves `out` as it is where the flag is 0 on the device.
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
        A batch of the captured mode and (padded) size. The plan checks its tensors and reads no value.
    geometry : Geometry
    consumers : sequence of StepMetadata, or of GroupRows
        The buffers that captured kernels read, one set per step.
        With `copy`, each step has buffers of its own; the metadata is computed once and written to all of them.
        With `share`, the metadata is computed in place. Steps of equal lengths all have the buffers of `consumers[0]`.
        Steps of different lengths have vectors of their own and share the page tables.
        `GroupRows` are those of attention groups, any number of them: with `share`, and a batch that has
        `query_start_loc`. Their block tables stay those of `batch`.
    strategy : "copy" or "share"
    derive : callable () -> None, optional
        Computes the derived planes of `consumers[0]` from its other planes (an engine's own functions).
    bind : Bind, optional
        Provides the implementations; by default the built-in ones.
    enabled : int32 tensor [1] on the batch's device, optional
        A switch that each run reads on the device. Where it is 0, the run leaves the consumers as they are; where it is
        1, the run writes them. Change it on the stream of the runs. `derive` is called in either case.
        It excludes a copy to further consumers.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        A buffer, the batch or the geometry has a wrong dtype, shape, device or stride, or they do not fit each other.

    Notes
    -----
    `run` may be recorded in a CUDA graph. Its kernels read tables that the plan owns: keep the plan as long as the
    graph. A plan that has run once has compiled all that its replays need.

    Examples
    --------
    Three draft steps of two requests share one set of buffers. The plan is made once; it runs before each replay.

    >>> import torch
    >>> from nsa_plugin import BatchDescriptor, ForwardMode, Geometry, PrecomputedMetadata, ReplayPlan, TokenTable
    >>> req_to_token = torch.arange(4 * 256, dtype=torch.int32).view(4, 256)  # slot of each token of 4 pooled requests
    >>> seq_lens, req_pool_indices = torch.tensor([3, 130]), torch.tensor([0, 2])
    >>> slots = TokenTable(req_to_token, req_pool_indices)
    >>> batch = BatchDescriptor(ForwardMode.DECODE, 2, seq_lens, slots, num_steps=3)
    >>> geometry = Geometry(index_topk=64, page_size=64, table_width=256)
    >>> buffers = PrecomputedMetadata.allocate(batch, geometry).steps[0]
    >>> plan = ReplayPlan(batch, geometry, [buffers] * 3, strategy="share")
    >>> plan.run(batch)
    >>> buffers.cache_seqlens.tolist(), buffers.nsa_cache_seqlens.tolist()
    ([3, 130], [3, 64])
    >>> buffers.real_page_table[1, :3].tolist()  # request 2 has slots 512 to 641, so pages 8 to 10
    [8, 9, 10]
    >>> seq_lens += 1  # each request accepted one token
    >>> plan.run(batch)
    >>> buffers.cu_seqlens_k.tolist()
    [0, 4, 135]
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
        function("derive", derive, optional=True)
        function("bind", bind)
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

        With Triton it allocates nothing and does not sync with the host; `derive` and foreign implementations may. It
        does not check the batch's tensors: they need the dtypes, device and sizes of the planned ones.

        Raises
        ------
        InvalidTypeError, InvalidValueError
            The batch has another mode, size or layout (`LAYOUT`) than the planned one. Nothing was written.
        """
        size, mode, draft_tokens, step_offsets, no_extend_lens, no_query_start_loc, no_accepted, no_map, slots = (
            self._bound
        )
        try:
            other = (
                batch.batch_size != size
                or batch.mode is not mode
                or batch.draft_tokens != draft_tokens
                or batch.step_offsets != step_offsets
                or (batch.extend_lens is None) is not no_extend_lens
                or (batch.query_start_loc is None) is not no_query_start_loc
                or (batch.accepted is None) is not no_accepted
                or (batch.slot_map is None) is not no_map
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


LAYOUT = (
    "draft_tokens", "step_offsets", "extend_lens is None", "query_start_loc is None", "accepted is None",
    "slot_map is None", "slots",
)  # fmt: skip
"""What must be equal in every batch of a plan, besides mode and size. Of `slots` the class counts, no value."""


def _of_steps(
    batch: BatchDescriptor, geometry: Geometry, consumers: Sequence[StepMetadata], strategy: PlanStrategy
) -> tuple[PrecomputedMetadata, Sequence[StepMetadata]]:
    """What is computed for these consumers, and to which of them it is copied."""
    distinct = len(batch.offsets)
    copies: Sequence[StepMetadata] = ()
    if len(consumers) not in {1, batch.num_steps} or len(consumers) < distinct:
        reject("consumers", f"{batch.num_steps} (num_steps)", len(consumers))
    if strategy == "share" or distinct == 1:
        metadata = PrecomputedMetadata(tuple(consumers[:distinct]), batch, geometry)
        copies = consumers[1:] if strategy == "copy" else ()
    else:
        tokens = consumers[0].positions is not None
        metadata = PrecomputedMetadata.allocate(batch, geometry, tokens=tokens)
        copies = consumers
    check_buffers(metadata, batch, geometry)
    if strategy == "share" and distinct == 1:
        check_shared(consumers)
    if copies:
        check_destinations(metadata, copies)
    return metadata, copies


def _shape(batch: BatchDescriptor) -> tuple[Any, ...]:
    return (
        batch.batch_size, batch.mode, batch.draft_tokens, batch.step_offsets, batch.extend_lens is None,
        batch.query_start_loc is None, batch.accepted is None, batch.slot_map is None,
        type(batch.slots),
    )  # fmt: skip
