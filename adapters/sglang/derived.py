"""Bound at capture, runs at every replay: planes that sglang's own functions compute from the lengths.

These are the DeepGEMM schedule, the top-k plan and FlashMLA's metadata; with pooled index keys the schedule and the plan are
those of pools.
"""

from __future__ import annotations

from typing import Any

from nsa_plugin.adapters.sglang import pools, releases
from nsa_plugin.adapters.sglang.describe import vectors_and_tables
from nsa_plugin.adapters.side_by_side import Refresh
from nsa_plugin.core.metadata import same_buffer


def refreshers(backend: Any, metadata: Any, forward_mode: Any, batch_size: int) -> list[Refresh]:
    """What refreshes the derived planes of `metadata` in place. None depends on another.

    Together they do what a backend's own path (`Generation.own_path`) does once the lengths are written.
    """
    planes, derived = vectors_and_tables(metadata), releases.derived_planes(metadata)
    steps: list[Refresh] = []
    if pools.write_plan(metadata) is not None:
        steps += pools.pool_refreshers(backend, metadata)
    elif releases.backends().is_cuda():
        if "paged_mqa_schedule_metadata" in derived:
            steps.append(_schedule(backend, metadata, forward_mode, batch_size))
        if "topk_v2_plan" in derived:
            steps.append(lambda: backend._refresh_topk_v2_plan(metadata))
    if getattr(backend, releases.generation().of("_decode_impl")) == "flashmla_kv":
        lengths = planes["nsa_cache_seqlens"]
        destination = metadata.flashmla_metadata.slice(slice(0, lengths.shape[0] + 1))
        steps.append(lambda: destination.copy_(backend._compute_flashmla_metadata(cache_seqlens=lengths, seq_len_q=1)))
    return steps


def _schedule(backend: Any, metadata: Any, forward_mode: Any, batch_size: int) -> Refresh:
    planes = vectors_and_tables(metadata)
    vectors = planes["cache_seqlens"], planes["seqlens_expanded"]
    destination = releases.derived_planes(metadata).get("paged_mqa_ctx_lens_2d")
    lengths_of = releases.schedule_lengths(backend, forward_mode, batch_size)
    write = releases.schedule_writer(backend, metadata)

    def refresh() -> None:
        lengths = lengths_of(*vectors)
        write(lengths)
        if destination is not None and not same_buffer(lengths, destination):
            destination.copy_(lengths)

    return refresh
