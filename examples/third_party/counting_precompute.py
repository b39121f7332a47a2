"""Replaces the precompute implementation: the plain torch reference on any device, and a count of the calls.

Install it beside nsa-plugin (`pip install examples/third_party`) and it is used; `nsa-plugin plugins` lists it. To
write your own, return a function of a `BatchDescriptor` that fills `out`; return None for what you don't handle. With
`enabled`, a tensor of one int32, the function leaves `out` as it is where that is 0 when it runs: it may be recorded in a
CUDA graph, so it asks on the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nsa_plugin import BatchDescriptor, Geometry, PrecomputedMetadata, hookimpl
from nsa_plugin.core import api

calls = 0


@hookimpl
def nsa_plugin_bind_precompute(
    batch: BatchDescriptor, geometry: Geometry, out: PrecomputedMetadata, enabled: torch.Tensor | None
) -> Callable[[BatchDescriptor], None] | None:
    """Bind the reference to `out`; leave batches without requests to others."""
    if batch.batch_size == 0:
        return None
    compute = api.bind_precompute(batch, out, impl="reference", enabled=enabled)

    def run(live: BatchDescriptor) -> None:
        global calls
        calls += 1
        compute(live)

    return run
