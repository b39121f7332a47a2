"""Runs at capture: what a rebuild of the target's metadata would write, as planes of the core.

A replayed graph reads metadata objects that were frozen at its capture. A rebuild makes new objects, which are thrown away,
over the same buffers: those count. All else in the frozen objects is a view of the runner's own buffers, or a constant of
the captured size; the rows of `builders` say so field by field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nsa_plugin.adapters.side_by_side import side_by_side
from nsa_plugin.adapters.vllm import builders, releases
from nsa_plugin.adapters.vllm.deep_gemm import scheduler
from nsa_plugin.adapters.vllm.v2.step import Uncovered, as_captured
from nsa_plugin.core.batch import BatchDescriptor, BlockTable
from nsa_plugin.core.group_rows import GroupRows


@dataclass(frozen=True)
class Frozen:
    """What vLLM has built for the batch that it captures.

    Attributes
    ----------
    groups : list of lists of AttentionGroup
        The model's, by KV-cache group.
    metadata : mapping of layer name to metadata
    block_tables : tuple of int32 tensors [requests, blocks]
        The runner's own, by KV-cache group.
    num_reqs, num_tokens : int
        Requests and rows, padding included.
    seq_lens : int32 tensor [num_reqs]
        The runner's own.
    """

    groups: Sequence[Sequence[Any]]
    metadata: Mapping[str, Any]
    block_tables: Sequence[torch.Tensor]
    num_reqs: int
    num_tokens: int
    seq_lens: torch.Tensor

    def each(self) -> Iterator[tuple[Any, Any, torch.Tensor]]:
        """Attention groups with what their builders made and the block table of their KV-cache group."""
        for number, same_cache in enumerate(self.groups):
            for group in same_cache:
                yield group, self.metadata[group.layer_names[0]], self.block_tables[number]


class Planes:
    """The planes of all attention groups of a captured batch.

    Attributes
    ----------
    groups : list of GroupRows
    page_size : int
        Tokens per page of the groups' tables.
    first_block_size : int
        Tokens per entry of the first KV-cache group's table.
    sparse : FlashMLASparseMetadataBuilder
        Of one of the groups.

    Raises
    ------
    Uncovered
        Something that is left to vLLM; the message says what.
    """

    def __init__(self, frozen: Frozen) -> None:
        self.groups: list[GroupRows] = []
        self._schedules: list[tuple[torch.Tensor, Callable[[], None]]] = []
        self._frozen = frozen
        self.sparse: Any = None
        known: set[int] = set()
        sizes: list[tuple[int, int]] = []
        for group, own, table in frozen.each():
            builder = group.get_metadata_builder()
            row = builders.row_of(builder)
            if row is not builders.FLASHMLA_SPARSE and row is not builders.INDEXER:
                raise Uncovered(f"{type(builder).__name__} is not covered")
            if len(group.metadata_builders) > 1:
                raise Uncovered("microbatches (DBO) are not covered")
            if problem := row.refused(builder) or _not_uniform(own, frozen):
                raise Uncovered(problem)
            pages = _Pages(group, builder, table)
            sizes.append((pages.page_size, pages.block_size))
            indexer = row is builders.INDEXER
            self.sparse = self.sparse if indexer else builder
            vectors = self._indexer(builder, own, pages) if indexer else {"request_map": own.req_id_per_token}
            made = GroupRows(
                **pages.planes, **vectors, slots=BlockTable(table, pages.block_size), page_stride=pages.stride
            )
            self._add(made, known)
        if len({page_size for page_size, _ in sizes}) != 1:
            raise Uncovered("attention groups with pages of different sizes are not covered")
        if self.sparse is None:
            raise Uncovered("a target without sparse attention is not covered")
        self.page_size, self.first_block_size = sizes[0]

    @property
    def derive(self) -> Callable[[], None] | None:
        """What computes DeepGEMM's schedules from the lengths that are there; None if there are none."""
        return side_by_side([call for _, call in self._schedules])

    def written(self, batch: BatchDescriptor) -> dict[str, torch.Tensor]:
        """All that a refresh writes, by name: views of vLLM's buffers."""
        found: dict[str, torch.Tensor] = {}
        for index, group in enumerate(self.groups):
            for name, (plane, size) in {**group.vectors(batch), **group.tables(batch)}.items():
                found[f"group {index} {name}"] = plane[:size]
        for index, (schedule, _) in enumerate(self._schedules):
            found[f"schedule {index}"] = schedule
        return found

    def _indexer(self, builder: Any, own: Any, pages: _Pages) -> dict[str, Any]:
        decode, frozen = own.decode, self._frozen
        if decode is None or decode.indices is not None:
            raise Uncovered("an indexer whose kernels take query lengths that vary is not covered")
        if decode.requires_padding or decode.seq_lens.numel() != frozen.num_tokens:
            raise Uncovered(f"an indexer with {decode.seq_lens.numel()} lengths for {frozen.num_tokens} rows")
        flat = decode.block_table.data_ptr() == builder.expanded_block_table_buffer.data_ptr()
        if not flat and decode.block_table.data_ptr() not in pages.addresses:
            raise Uncovered("an indexer's block table that is in no known place")
        per_request = [decode.per_req_decode_lens] if flat else [decode.decode_lens, decode.per_req_decode_lens]
        if (make := scheduler(builder)) is not None:
            self._schedules.append((decode.schedule_metadata, _rescheduled(make, decode)))
        moved = decode.seq_lens.data_ptr() != frozen.seq_lens.data_ptr()  # else they are the runner's own: one row each
        return {
            "lengths": decode.seq_lens.view(-1) if moved else None,
            "query_lens": tuple(lens for lens in per_request if lens is not None),
            "ones": decode.decode_lens if flat else None,
            "row_pages": decode.block_table if flat else None,
        }

    def _add(self, group: GroupRows, known: set[int]) -> None:
        """Keep a group, without the map that another one keeps already: builders may share theirs."""
        request_map = group.request_map
        if request_map is not None and request_map.data_ptr() in known:
            group = replace(group, request_map=None)
        elif request_map is not None:
            known.add(request_map.data_ptr())
        if group.request_map is not None or group.request_pages is not None or group.query_lens:
            self.groups.append(group)


class _Pages:
    """How a group's pages follow from the manager's blocks.

    Attributes
    ----------
    planes : dict
        The table by request, where the group keeps one: kernels with smaller pages than the manager's blocks.
    page_size, block_size, stride : int
    addresses : set of int
        Where the block table of the requests may be.
    """

    def __init__(self, group: Any, builder: Any, table: torch.Tensor) -> None:
        self.page_size: int = builder.kv_cache_spec.block_size
        self.block_size, self.stride, self.planes = self.page_size, 0, dict[str, Any]()
        self.addresses = {table.data_ptr()}
        mapped = releases.mapped_table(group)
        if mapped is not None:
            self.block_size = group.kv_cache_spec.block_size
            self.stride = group.kernel_block_stride
            self.planes = {"request_pages": mapped[0]}
            self.addresses = {mapped[0].data_ptr()}


def _not_uniform(own: Any, frozen: Frozen) -> str:
    """Empty, or that metadata are not those of decode tokens alone."""
    if own.num_prefills == 0 and own.num_decodes == frozen.num_reqs and own.num_decode_tokens == frozen.num_tokens:
        return ""
    return f"{type(own).__name__} of {own.num_decodes} decodes and {own.num_prefills} prefills is not covered"


def _rescheduled(make: Callable[[Any], torch.Tensor], decode: Any) -> Callable[[], None]:
    return lambda: decode.schedule_metadata.copy_(as_captured(make(decode), decode))
