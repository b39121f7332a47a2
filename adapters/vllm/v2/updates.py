"""Runs at capture, and at drafts that no graph replays: captured metadata of a builder is updated in place at each step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from nsa_plugin.adapters.attached import Attached
from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.vllm import releases
from nsa_plugin.adapters.vllm.builder_rows import BuilderRow, Changes
from nsa_plugin.adapters.vllm.builders import FLASHMLA_SPARSE
from nsa_plugin.adapters.vllm.deep_gemm import scheduler
from nsa_plugin.adapters.vllm.reports import report
from nsa_plugin.adapters.vllm.schedules import SCHEDULES
from nsa_plugin.adapters.vllm.v2 import plans

PATH = "draft decode"
METHOD = "update_draft_decode_metadata"
Hooks = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True)
class Served:
    """A class of builders to which this adapter gives an update in place.

    Attributes
    ----------
    row : BuilderRow
    path : str
        For the log.
    live : callable
        Whether the update was not undone.
    """

    row: BuilderRow
    path: str
    live: Callable[[], bool]


_served: dict[type, Served] = {}
stale: Attached[bool] = Attached("stale")
"""Builders whose update has failed: what captured drafts read of theirs is that of another step."""


def has_own(owner: type) -> bool:
    """Whether a class of builders has an update in place: vLLM's, or another plugin's that came first."""
    return METHOD in vars(owner)


def served(builder: Any) -> Served | None:
    """What serves a builder; None for one of another class, even a subclass, which may build metadata of its own."""
    found = _served.get(type(builder))
    return found if found is not None and found.live() else None


def hooks(row: BuilderRow, host: Host, owner: type, live: Callable[[], bool]) -> Hooks:
    """Replacements of the methods of `owner`, the builder of a row, by name."""
    if row.changes is None:
        raise ValueError(f"{row.builder}: expected a row that says what changes, got one that is left to vLLM")
    _served[owner] = Served(row, PATH if row is FLASHMLA_SPARSE else f"{PATH}, {row.backend}", live)
    update = UPDATES[row.changes](host)
    # The function itself is in it: functools.wraps copies attributes to wrappers, which may do more.
    update.understood = (row.changes, update)  # type: ignore[attr-defined]
    return MappingProxyType({METHOD: update})


def _update_request_map(host: Host) -> Callable[..., None]:
    on_device = releases.vllms_request_map() or request_map
    failed = False

    def update_draft_decode_metadata(builder: Any, metadata: Any, *args: Any, **kwargs: Any) -> None:
        """Recompute the request map of captured decode metadata in place; capture-safe."""
        nonlocal failed
        tokens = metadata.num_decode_tokens
        if not tokens:
            return
        if not failed:
            try:
                on_device(metadata.query_start_loc, metadata.req_id_per_token, tokens)
                return
            except Exception as error:
                failed = True
                report(host, PATH).fell_back("capture", "graph", error)
        request_map(metadata.query_start_loc, metadata.req_id_per_token, tokens)

    return update_draft_decode_metadata


def _update_map_and_plan(host: Host) -> Callable[..., None]:
    update_map = _update_request_map(host)

    def update_draft_decode_metadata(builder: Any, metadata: Any, *args: Any, **kwargs: Any) -> None:
        """Recompute the request map of captured decode metadata in place, and clamp the plan; capture-safe."""
        if metadata.num_decode_tokens:
            update_map(builder, metadata)
            plans.clamp(builder, metadata)

    return update_draft_decode_metadata


def update_indexer(builder: Any, metadata: Any, *args: Any, **kwargs: Any) -> None:
    """Recompute what follows from the lengths of a draft step in captured indexer metadata; capture-safe.

    The rest is the same in all steps of a draft, and vLLM before 0.32 rebuilds the metadata of the first one.
    """
    decode = metadata.decode
    if decode is None or not metadata.num_decode_tokens:
        return
    if metadata.num_prefills or decode.seq_lens.numel() != metadata.num_decode_tokens:
        got = f"{metadata.num_prefills} prefills and {decode.seq_lens.numel()} lengths"
        raise RuntimeError(f"expected {metadata.num_decode_tokens} requests of one token each, got {got}")
    decode.seq_lens.view(-1).copy_(metadata.seq_lens[: metadata.num_decode_tokens])
    schedule = scheduler(builder)
    if schedule is not None:
        decode.schedule_metadata.copy_(schedule(decode))


def update_nothing(builder: Any, metadata: Any, *args: Any, **kwargs: Any) -> None:
    """All that changes from step to step are values in the runner's own buffers, of which the metadata has views."""


def _update_schedule(host: Host, make: Callable[[Any, Any], None]) -> Callable[..., None]:
    def update_draft_decode_metadata(builder: Any, metadata: Any, *args: Any, **kwargs: Any) -> None:
        """Make the schedule of captured decode metadata anew; capture-safe. After an error vLLM drafts unfused: see `switch`."""
        if metadata.decode is None:
            return
        try:
            make(builder, metadata.decode)
        except Exception as error:
            stale.set(builder, True)
            report(host, PATH).fell_back("capture", "graph", error)

    return update_draft_decode_metadata


def request_map(query_start_loc: torch.Tensor, out: torch.Tensor, tokens: int) -> None:
    """The request map in plain torch: the request of each of the first `tokens` tokens, into `out` [>= tokens].

    `query_start_loc` [requests + 1] is ascending. Tokens past its end belong to the last request.
    """
    token = torch.arange(tokens, dtype=query_start_loc.dtype, device=query_start_loc.device)
    request = torch.searchsorted(query_start_loc[1:], token, right=True)
    out[:tokens].copy_(request.clamp_(max=query_start_loc.numel() - 2))


UPDATES: dict[Changes, Callable[[Host], Callable[..., None]]] = {
    "request map": _update_request_map,
    "request map and plan": _update_map_and_plan,
    "lengths and schedule": lambda host: update_indexer,
    "FlashAttention schedule": functools.partial(_update_schedule, make=SCHEDULES["FlashAttention schedule"]),
    "FlashMLA schedule": functools.partial(_update_schedule, make=SCHEDULES["FlashMLA schedule"]),
    "nothing": lambda host: update_nothing,
}
"""By what changes: what makes the update in place. The updates ignore what a later vLLM passes besides the metadata."""
