"""Only when a replay is verified, and in tests: which entries of a `DSAMetadata` are defined, and which of them differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch

from nsa_plugin.adapters.reporting import differing
from nsa_plugin.adapters.sglang.describe import consumer, describe, geometry
from nsa_plugin.adapters.sglang.pools import TOPK_PLAN
from nsa_plugin.adapters.sglang.releases import derived_planes, topk_plan_is_written
from nsa_plugin.adapters.verification import SpareBuffers
from nsa_plugin.core.batch import BatchDescriptor, ForwardMode, Geometry
from nsa_plugin.core.metadata import PAGE_TABLES, VECTORS, PrecomputedMetadata, differing_fields, live_entries
from nsa_plugin.core.pools import POOL_PLANES


def defined_values(
    metadata: Any, expected: Any, batch: BatchDescriptor, sizes: Geometry, tables: Collection[str] = PAGE_TABLES
) -> dict[str, torch.Tensor]:
    """Copies of the defined entries of a `DSAMetadata`, undefined ones set to -1 or left out. Reads lengths on the host.

    Undefined are tails of page tables, the top-k plan of small batches, its rows past its count (the others come in any
    order), and FlashMLA's scheduler tensor, which has an unused end.

    Parameters
    ----------
    metadata : DSAMetadata
    expected : DSAMetadata
        The engine's own of the same batch: its lengths say what is live.
    batch : BatchDescriptor
    sizes : Geometry
    tables : collection of str
        The page tables that are wanted.
    """
    fields = (*VECTORS, *POOL_PLANES, *tables)
    values = live_entries(PrecomputedMetadata((consumer(expected),), batch, sizes), consumer(metadata), 0, fields)
    return values | {name: value.clone() for name, value in _others(metadata, expected).items()}


def _others(metadata: Any, expected: Any) -> dict[str, torch.Tensor]:
    """The defined values of a `DSAMetadata` that its engine's own functions compute from the others."""
    values = derived_planes(metadata)
    step = consumer(expected)
    planned = {"topk_v2_plan": step.seqlens_expanded}
    if step.pools is not None:
        planned[TOPK_PLAN] = step.pools.seqlens
    for name, lengths in planned.items():
        plan = values.pop(name, None)
        if plan is not None and topk_plan_is_written(lengths):
            rows = plan[1 : int(plan[0, 1]) + 1]
            values[name] = torch.cat([plan[:1], rows[rows[:, 0].argsort()]])
    if metadata.flashmla_metadata is not None:
        values["num_splits"] = metadata.flashmla_metadata.num_splits
    return values


def compare(expected: Any, got: Any, batch: BatchDescriptor, sizes: Geometry) -> list[str]:
    """Names of the defined values in which two `DSAMetadata` of the same batch differ; a wide page table may be missing.

    The comparison takes no memory in proportion to the page tables, see `differing_fields`.
    """
    tables = differing_fields(PrecomputedMetadata((consumer(expected),), batch, sizes), consumer(got))
    return sorted(tables + differing(_others(expected, expected), _others(got, expected)))


def differing_values(
    expected: Any, got: Any, batch: BatchDescriptor, sizes: Geometry
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | None:
    """The defined values of two `DSAMetadata` of the same batch if they differ, without page tables that are equal.

    The values are copies. The copy of a page table is as large as its used part.
    """
    wrong = compare(expected, got, batch, sizes)
    if not wrong:
        return None
    tables = [name for name in PAGE_TABLES if name in wrong]
    want, have = (defined_values(metadata, expected, batch, sizes, tables) for metadata in (expected, got))
    return want, have


def differences(expected: Any, got: Any, backend: Any, batch: Any, mode: ForwardMode) -> list[str]:
    """Names of the defined values in which two `DSAMetadata` of the same batch differ."""
    return compare(expected, got, describe(batch, backend=backend, mode=mode), geometry(backend, expected))


def spare_metadata(metadata: Any, spares: SpareBuffers) -> Any:
    """A `DSAMetadata` with the shapes and aliases of `metadata`, in spare buffers; all that are made share page tables.

    Captures go from the largest batch to the smallest.
    """
    copies: dict[tuple[int, int], torch.Tensor] = {}

    def copy(name: str, value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.replace(
                value,
                **{field.name: copy(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)},
            )
        if not isinstance(value, torch.Tensor):
            return value
        key = (value.data_ptr(), value.numel())
        if key not in copies:
            is_table = name.endswith(("page_table", "page_table_1"))
            copies[key] = spares.shared(name, value) if is_table else spares.own(value)
        return copies[key].view(value.shape)

    return copy("", metadata)
