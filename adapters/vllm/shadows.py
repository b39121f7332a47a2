"""Copies of vLLM's own objects that write into spare buffers: they compute what it would, beside a draft under way.

A shadow has the attributes of its original but for those that are given; a method of vLLM's, called on it, does what it
always does and writes where no captured graph reads.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from nsa_plugin.adapters.vllm.releases import mapped_table

ROWS: Mapping[str, int] = {
    "req_id_per_token": 0, "seq_lens": 0, "slot_mapping": 0, "decode_lens": 0, "per_req_decode_lens": 0, "indices": 0,
    "positions": 0, "global_seq_lens": 0, "query_start_loc": 1,
}  # fmt: skip
"""Tensors of a draft step's metadata with one entry per request, and so many more: what is defined of them."""
TABLE = "block_table"
WHOLE = "schedule_metadata"
"""Defined in every entry, where DeepGEMM made it."""


def shadow(original: Any, **changes: Any) -> Any:
    """An object of the same class with the attributes of `original`, but for `changes`."""
    made: Any = object.__new__(type(original))
    vars(made).update(vars(original), **changes)
    return made


def spare_group(group: Any, rows: int) -> Any:
    """An `AttentionGroup` whose builder writes into buffers of its own, for drafts of at most `rows` requests.

    Workspaces of floating-point numbers, which are large and no metadata, stay shared: only a prefill would write them.
    """
    builder = group.get_metadata_builder()
    most = builder.vllm_config.scheduler_config.max_num_batched_tokens
    own = {
        name: _like(value, most, rows)
        for name, value in vars(builder).items()
        if isinstance(value, torch.Tensor) and not value.is_floating_point()
    }
    made = copy.copy(group)
    made.metadata_builders = [shadow(builder, **own)]
    if (table := mapped_table(group)) is not None:
        made.kernel_block_table = table.clone()
    return made


def _like(value: torch.Tensor, most_tokens: int, rows: int) -> torch.Tensor:
    """A copy; of what has room for a batch of any size no more rows than a draft has."""
    if value.dim() and value.shape[0] == most_tokens > rows:
        value = value[:rows]
    return value.clone()


def defined(
    metadata: Any, rows: int, lengths: torch.Tensor, block_size: int, schedule: bool
) -> dict[str, torch.Tensor]:
    """What is defined of the metadata of a draft step, copied, by "Class.field.field". Reads lengths on the host.

    Parameters
    ----------
    metadata : dataclass
        Of an attention group, for one query token per request.
    rows : int
        Requests, without padding.
    lengths : int32 tensor [rows]
        Tokens that each sees: block tables are defined as far as these go, and -1 here from there on.
    block_size : int
        Tokens per entry of the block table.
    schedule : bool
        Whether DeepGEMM's schedule is there.
    """
    found: dict[str, torch.Tensor] = {}
    _walk(type(metadata).__name__, metadata, found)
    values: dict[str, torch.Tensor] = {}
    for path, value in found.items():
        leaf = path.rpartition(".")[2]
        if leaf in ROWS:
            values[path] = value.flatten()[: rows + ROWS[leaf]].clone()
        elif leaf == TABLE:
            values[path] = live_blocks(value, lengths, block_size)
        elif value.dim() == 0 or (leaf == WHOLE and schedule):
            values[path] = value.clone()
    return values


def live_blocks(table: torch.Tensor, lengths: torch.Tensor, block_size: int) -> torch.Tensor:
    """The columns of a block table [>= rows, blocks] that lengths [rows] reach, with -1 where a row does not reach."""
    rows = lengths.numel()
    width = min(-(-int(lengths.max()) // block_size), table.shape[1]) if rows else 0
    start = torch.arange(width, device=lengths.device) * block_size
    return torch.where(start[None, :] < lengths[:, None], table[:rows, :width], -1)


def _walk(path: str, value: Any, found: dict[str, torch.Tensor]) -> None:
    """Tensors and numbers in nested dataclasses of attention backends; what kernels keep for themselves is not walked into."""
    if isinstance(value, torch.Tensor):
        found[path] = value
    elif isinstance(value, int):
        found[path] = torch.tensor(int(value))
    elif dataclasses.is_dataclass(value) and type(value).__module__.startswith("vllm.v1."):
        for field in dataclasses.fields(value):
            _walk(f"{path}.{field.name}", getattr(value, field.name), found)
