"""Runs only where drafts are verified: vLLM's own builders over spare buffers, and what of their metadata is defined."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from nsa_plugin.adapters.verification import SpareBuffers, shadow
from nsa_plugin.adapters.vllm.releases import mapped_table

ROWS: Mapping[str, int] = {
    "req_id_per_token": 0, "seq_lens": 0, "slot_mapping": 0, "decode_lens": 0, "per_req_decode_lens": 0, "indices": 0,
    "positions": 0, "global_seq_lens": 0, "query_start_loc": 1,
}  # fmt: skip
"""By name of a tensor of a draft step's metadata, how many entries are defined beyond one per request."""
TABLE = "block_table"
WHOLE = "schedule_metadata"
"""Defined in every entry, where DeepGEMM made it."""


def spare_group(group: Any, rows: int, spares: SpareBuffers) -> Any:
    """An `AttentionGroup` whose builder writes into spare buffers, for drafts of at most `rows` requests.

    Workspaces of floating-point numbers, which are large and no metadata, stay shared: only a prefill writes them.
    """
    builder = group.get_metadata_builder()
    most = builder.vllm_config.scheduler_config.max_num_batched_tokens
    own = {
        name: spares.own(value[:rows] if value.dim() and value.shape[0] == most > rows else value)
        for name, value in vars(builder).items()
        if isinstance(value, torch.Tensor) and not value.is_floating_point()
    }
    made = copy.copy(group)
    made.metadata_builders = [shadow(builder, **own)]
    if (table := mapped_table(group)) is not None:
        made.kernel_block_table = spares.own(table)
    return made


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
