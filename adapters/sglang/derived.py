"""Bound at capture, runs at every replay: planes that sglang's own functions compute from the lengths.

These are the DeepGEMM schedule, the top-k plan and FlashMLA's metadata; with pooled index keys the schedule and the plan are
those of pools. FlashMLA's metadata follow from the number of rows alone where its kernel reads a fixed number of top-k
indices. They are then computed once, at capture.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from nsa_plugin.adapters.sglang import pools, releases
from nsa_plugin.adapters.sglang.describe import vectors_and_tables
from nsa_plugin.adapters.sglang.reports import logger
from nsa_plugin.adapters.side_by_side import Refresh
from nsa_plugin.core.metadata import same_buffer

FLASHMLA = "flashmla_metadata"
"""A field of `DSAMetadata`, and of the buffers from which a backend gives each captured size a part of the same memory."""


def constants(backend: Any, metadata: Any) -> Mapping[str, Any]:
    """Fields of a captured `DSAMetadata` that hold the same at every replay, in memory that no other size writes to.

    FlashMLA's metadata are one if several lengths give the same. The call synchronizes the device: it can't be captured.

    Parameters
    ----------
    backend : DeepseekSparseAttnBackend
    metadata : DSAMetadata
        That of the backend, for one batch size.
    """
    if not _has_flashmla(backend):
        return {}
    try:
        plane = _constant_flashmla(backend, metadata)
    except Exception as error:
        logger.info("nsa-plugin: FlashMLA's metadata are computed at every replay: %s: %s", type(error).__name__, error)
        return {}
    return {} if plane is None else {FLASHMLA: plane}


def _constant_flashmla(backend: Any, metadata: Any) -> Any:
    """FlashMLA's metadata for one batch size, in memory of its own, or None if they depend on the lengths."""
    held, of_all_sizes = metadata.flashmla_metadata, backend.decode_cuda_graph_metadata[FLASHMLA]
    made = _whatever_the_lengths(backend, vectors_and_tables(metadata)["nsa_cache_seqlens"])
    if made is None or made.num_splits.shape != held.num_splits.shape:
        return None
    if same_buffer(held.num_splits, of_all_sizes.num_splits):
        return made
    held.copy_(made)  # an earlier capture has made it
    return held


def _whatever_the_lengths(backend: Any, lengths: torch.Tensor) -> Any:
    """The backend's FlashMLA metadata for as many rows as `lengths` has; None if they depend on what the lengths are."""
    topk = getattr(backend, releases.generation().of("_index_topk"))
    rising = torch.arange(lengths.numel(), dtype=lengths.dtype, device=lengths.device) % topk + 1
    filled = [torch.full_like(lengths, value) for value in (1, topk // 2 + 1, topk, 4 * topk + 1)]
    with filled_memory():
        made = [
            backend._compute_flashmla_metadata(cache_seqlens=seen, seq_len_q=1)
            for seen in (lengths, lengths, *filled, rising, topk + 1 - rising)
        ]
    words = torch.stack([torch.cat([each.flashmla_metadata.flatten(), each.num_splits]) for each in made]).cpu()
    undefined = words[0] != words[1]  # equal lengths
    return made[0] if bool(((words == words[0]) | undefined).all()) else None


@contextmanager
def filled_memory() -> Iterator[None]:
    """Let new tensors not hold what was in memory before: FlashMLA does not write all words of its schedule."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


def _has_flashmla(backend: Any) -> bool:
    return bool(getattr(backend, releases.generation().of("_decode_impl")) == "flashmla_kv")


def refreshers(
    backend: Any, metadata: Any, forward_mode: Any, batch_size: int, constant: Collection[str]
) -> list[Refresh]:
    """What refreshes the derived planes of `metadata` in place. None depends on another.

    Together they do what a backend's own path (`Generation.own_path`) does once the lengths are written, but for the fields
    named in `constant`.
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
    if _has_flashmla(backend) and FLASHMLA not in constant:
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
