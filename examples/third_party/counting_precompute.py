"""Replaces the precompute implementation: the plain torch reference on any device, and a count of the calls.

Install it beside nsa-plugin (`pip install examples/third_party`) and it is used; `nsa-plugin plugins` lists it. To
write your own, return a function of a `BatchDescriptor` that fills `out`; return None for what you don't handle.
"""

from __future__ import annotations

from collections.abc import Callable

from nsa_plugin import BatchDescriptor, Geometry, PrecomputedMetadata, hookimpl, precompute

calls = 0


@hookimpl
def nsa_plugin_bind_precompute(
    batch: BatchDescriptor, geometry: Geometry, out: PrecomputedMetadata
) -> Callable[[BatchDescriptor], None] | None:
    """Bind the reference to `out`; leave batches without requests to others."""
    if batch.batch_size == 0:
        return None

    def run(live: BatchDescriptor) -> None:
        global calls
        calls += 1
        precompute(live, geometry, impl="reference", out=out)

    return run
