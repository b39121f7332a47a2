"""`precompute` and `fast_copy`, and how an implementation of them is chosen and bound to buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch

from nsa_plugin.core import reference, triton_binding
from nsa_plugin.core.batch import BatchDescriptor, Geometry
from nsa_plugin.core.checks import boolean, instance, instances
from nsa_plugin.core.errors import reject
from nsa_plugin.core.group_rows import GroupMetadata, check_groups
from nsa_plugin.core.metadata import VECTORS, PrecomputedMetadata, StepMetadata, plane
from nsa_plugin.core.pools import POOL_PLANES, POOL_TABLE
from nsa_plugin.core.validation import check_batch, check_buffers, check_destinations, check_enabled, check_values

Impl = Literal["auto", "reference", "triton"]
BoundImpl = Literal["reference", "triton"]
BoundPrecompute = Callable[[BatchDescriptor], None]
"""Writes the metadata of a batch into the buffers that it was bound to."""
BoundCopy = Callable[[], None]
"""Copies between the buffers that it was bound to."""


def precompute(
    batch: BatchDescriptor,
    geometry: Geometry,
    *,
    impl: Impl = "auto",
    out: PrecomputedMetadata | None = None,
    checked: bool = False,
) -> PrecomputedMetadata:
    """Compute the metadata of `batch` once, for all of its steps.

    Parameters
    ----------
    batch : BatchDescriptor
    geometry : Geometry
    impl : "auto", "reference" or "triton"
        "auto" is Triton on a CUDA device and the plain torch reference elsewhere. All give equal live entries.
    out : PrecomputedMetadata, optional
        Buffers to write into, as `PrecomputedMetadata.allocate` makes them; by default fresh ones. Only live entries
        are defined afterwards.
    checked : bool
        Also check values, which takes a host sync on a GPU: lengths fit the table, `extend_lens` are at most
        `draft_tokens` and the length, request indices are rows of the table, live slots or blocks are not negative.
        Without `extend_lens` a request may have fewer tokens than rows (padding): rows before its start see no token.

    Returns
    -------
    PrecomputedMetadata
        `out`, or fresh buffers.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        A field has a wrong dtype, shape, device, stride or value. Nothing was written.
    UnavailableError
        `impl` can't run here.
    """
    check_batch(batch, geometry)
    boolean("checked", checked)
    if out is None:
        out = PrecomputedMetadata.allocate(batch, geometry)
    else:
        out = PrecomputedMetadata(instance("out", out, PrecomputedMetadata).steps, batch, geometry)
        check_buffers(out, batch, geometry)
    if checked:
        check_values(batch, geometry)
    _bind_precompute(batch, out, impl, None)(batch)
    return out


def fast_copy(precomputed: PrecomputedMetadata, destinations: Sequence[StepMetadata], *, impl: Impl = "auto") -> None:
    """Copy precomputed metadata to any number of consumers' buffers (one launch with Triton).

    Parameters
    ----------
    precomputed : PrecomputedMetadata
        Destination i gets `precomputed.step(i)`.
    destinations : sequence of StepMetadata
        One per step where the source has several. Buffers may be larger than those of the source. Derived planes of a
        destination must be in the source, with equal shape and dtype.
    impl : "auto", "reference" or "triton"
        As in `precompute`.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        A destination can't hold the metadata. Nothing was written.
    UnavailableError
        `impl` can't run here.
    """
    bind_copy(precomputed, destinations, impl=impl)()


def bind_precompute(
    batch: BatchDescriptor,
    out: PrecomputedMetadata | GroupMetadata,
    *,
    impl: Impl = "auto",
    enabled: torch.Tensor | None = None,
) -> BoundPrecompute:
    """Bind `impl` to the buffers `out`, for batches of the mode and size of `batch`.

    `enabled` means what it means in `ReplayPlan`. Raises what `precompute` raises.
    """
    if isinstance(out, GroupMetadata):
        check_batch(batch, out.geometry)
        check_groups(out, batch)
        check_enabled(enabled, batch, ())
        return _bind_groups(GroupMetadata(out.groups, batch, out.geometry), impl, enabled)
    check_batch(batch, instance("out", out, PrecomputedMetadata).geometry)
    check_buffers(out, batch, out.geometry)
    check_enabled(enabled, batch, ())
    return _bind_precompute(batch, out, impl, enabled)


def _bind_groups(out: GroupMetadata, impl: Impl, enabled: torch.Tensor | None) -> BoundPrecompute:
    if resolve_impl(impl, out.batch.seq_lens.device) == "triton":
        return triton_binding.bind_group_rows(out, enabled)
    return lambda live: reference.group_rows(live, out, enabled)


def _bind_precompute(
    batch: BatchDescriptor, out: PrecomputedMetadata, impl: Impl, enabled: torch.Tensor | None
) -> BoundPrecompute:
    if resolve_impl(impl, batch.seq_lens.device) == "triton":
        return triton_binding.bind_precompute(batch, out, enabled=enabled)
    return lambda replayed: reference.precompute(replayed, out, enabled)


def bind_copy(source: PrecomputedMetadata, destinations: Sequence[StepMetadata], *, impl: Impl = "auto") -> BoundCopy:
    """Bind `impl` to the buffers of `source` and `destinations`. Raises what `fast_copy` raises."""
    check_destinations(source, destinations)
    return _bind_copy(source, destinations, impl)


def _bind_copy(source: PrecomputedMetadata, destinations: Sequence[StepMetadata], impl: Impl) -> BoundCopy:
    if resolve_impl(impl, source.batch.seq_lens.device) == "triton":
        return triton_binding.bind_copy(source, destinations)
    return lambda: reference.fast_copy(source, destinations)


def bind(
    batch: BatchDescriptor,
    out: PrecomputedMetadata | GroupMetadata,
    destinations: Sequence[StepMetadata],
    *,
    impl: Impl = "auto",
    enabled: torch.Tensor | None = None,
) -> tuple[BoundPrecompute, BoundCopy | None]:
    """Bind a precompute into `out`, and the copy that then fills `destinations` (None if nothing is left to copy).

    With Triton one launch computes the metadata and writes it to all of them; the copy moves derived planes only.
    `enabled` means what it means in `ReplayPlan`, and excludes `destinations`. Raises what `precompute` and `fast_copy`
    raise.
    """
    if isinstance(out, GroupMetadata):
        if instances("destinations", destinations, StepMetadata):
            reject("destinations", "none for attention groups", len(destinations))
        return bind_precompute(batch, out, impl=impl, enabled=enabled), None
    check_batch(batch, instance("out", out, PrecomputedMetadata).geometry)
    check_buffers(out, batch, out.geometry)
    if instances("destinations", destinations, StepMetadata):
        check_destinations(out, destinations)
    check_enabled(enabled, batch, destinations)
    planes = _of_some_consumers(out.steps[0])
    fusible = len(out.steps) == 1 and all(_of_some_consumers(step) == planes for step in destinations)
    if fusible and resolve_impl(impl, batch.seq_lens.device) == "triton":
        return triton_binding.bind_precompute(batch, out, destinations, enabled), _bind_derived_copy(out, destinations)
    copy = _bind_copy(out, destinations, impl) if destinations else None
    return _bind_precompute(batch, out, impl, enabled), copy


def _of_some_consumers(step: StepMetadata) -> set[str]:
    """Planes that one launch writes to all consumers or to none."""
    return {name for name in (*VECTORS, "page_table_1", *POOL_PLANES, POOL_TABLE) if plane(step, name) is not None}


def _bind_derived_copy(source: PrecomputedMetadata, destinations: Sequence[StepMetadata]) -> BoundCopy | None:
    pairs = [(source.steps[0].derived[name], plane) for step in destinations for name, plane in step.derived.items()]
    if not pairs:
        return None
    origins, targets = (list(planes) for planes in zip(*pairs, strict=True))
    return lambda: torch._foreach_copy_(targets, origins)  # one launch for all of them


def resolve_impl(impl: Impl, device: torch.device) -> BoundImpl:
    """Which implementation `impl` names on `device`; raises `UnavailableError` if it can't run there."""
    instance("device", device, torch.device)
    if impl not in get_args(Impl):
        reject("impl", " or ".join(map(repr, get_args(Impl))), repr(impl))
    if impl == "auto":
        return best_impl(device) if device.type == "cuda" else "reference"
    if impl == "triton":
        triton_binding.require(device)
    return impl


def best_impl(device: torch.device) -> BoundImpl:
    """ "triton" where its kernels can run on tensors of `device`, else "reference".

    Unlike "auto" it takes Triton's interpreter on a CPU too: for an engine whose own kernels are interpreted there.
    """
    return "reference" if triton_binding.unavailable_because(instance("device", device, torch.device)) else "triton"
