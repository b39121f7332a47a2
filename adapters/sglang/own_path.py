"""sglang's own code for a batch. Runs while the plugin is off, after an error of ours, and when a replay is verified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from nsa_plugin.adapters.sglang.registry import beneath_hooks
from nsa_plugin.adapters.sglang.releases import generation, own_path_fields


def native_replay(backends: Sequence[Any], batch: Any, native_mode: Any) -> None:
    """Let sglang's per-backend code compute the metadata of a batch, into the buffers that the backends hold."""
    more = own_path_fields(batch)
    for backend in backends:
        unhooked(backend, generation().own_path)(
            bs=batch.batch_size,
            req_pool_indices=batch.req_pool_indices,
            seq_lens=batch.seq_lens,
            seq_lens_cpu=batch.seq_lens_cpu,
            forward_mode=native_mode,
            spec_info=batch.spec_info,
            **more,
        )


def unhooked(backend: Any, method: str) -> Callable[..., None]:
    """A method of a backend, without the hooks of a method that we hook: ours would be asked for the same batch again."""
    if generation().is_entry(method):
        return partial(beneath_hooks(getattr(type(backend), method)), backend)
    bound: Callable[..., None] = getattr(backend, method)
    return bound
