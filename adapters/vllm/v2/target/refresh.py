"""Runs at capture: the refresh of one captured batch, recorded at the start of its graph, switched on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.reporting import PathReport
from nsa_plugin.adapters.verification import Verification
from nsa_plugin.adapters.vllm.describe import TargetBatch, describe_target, geometry
from nsa_plugin.adapters.vllm.reports import recorded
from nsa_plugin.adapters.vllm.v2.observed import observed
from nsa_plugin.adapters.vllm.v2.target.planes import Frozen, Planes
from nsa_plugin.core.batch import BatchDescriptor

STRATEGY = "graph"


class Refresh:
    """Writes what a rebuild of the target's metadata would write for the live batch, from the runner's buffers.

    A rebuild before the replay writes the same: the two can follow each other. Where the flag is off, the recorded work
    leaves everything as vLLM's own rebuild has left it, and makes the schedules of that anew.

    Parameters
    ----------
    host : Host
    report : PathReport
    batch : InputBatch
        The dummy batch that vLLM captures; its tensors are the runner's buffers.
    frozen : Frozen

    Attributes
    ----------
    planes : Planes
    geometry : Geometry
    recorded : bool
        Whether the graph of this batch has it.
    failed : bool
    observed : Observed or None
        Who is shown the live batch after a replay.
    count : callable
        To be called with None at each replay.
    verification : Verification or None

    Raises
    ------
    Uncovered
        From the constructor: something that is left to vLLM.
    """

    def __init__(self, host: Host, report: PathReport, batch: Any, frozen: Frozen) -> None:
        self.recorded = self.failed = False
        self.planes = Planes(frozen)
        native = self.live(batch, frozen.block_tables)
        self._describe = report.describe(native, describe_target)
        self._static = self._describe(native)
        self.geometry = geometry(self.planes.sparse, self._static)
        with torch.inference_mode(False):  # an undo writes it outside of inference mode
            self._enabled = torch.ones(1, dtype=torch.int32, device=self._static.seq_lens.device)
        self._is_enabled = True
        derive = self.planes.derive
        self._run = host.plan(self._static, self.geometry, self.planes.groups, "share", derive, self._enabled)
        self.observed = observed(report, STRATEGY, self._describe, self._static)
        self.count: Callable[[None], None] = report.instrument(recorded, STRATEGY, 1)
        self.verification = Verification(report, STRATEGY, host.verify) if host.verify else None

    @property
    def usable(self) -> bool:
        """Whether a replay of its graph needs no rebuild."""
        return self.recorded and not self.failed

    def run(self) -> None:
        """Issue the work; on a stream that is being captured, it is recorded."""
        self._run(self._static)

    def obey(self, on: bool) -> None:
        """Write the flag that recorded work reads, if it is not what it should be; in stream order."""
        if self._is_enabled is not on:
            self._enabled.fill_(int(on))
            self._is_enabled = on

    def live(self, batch: Any, block_tables: Any) -> TargetBatch:
        """A live batch, to be described."""
        return TargetBatch(batch, block_tables, self.planes.first_block_size)

    @property
    def batch(self) -> BatchDescriptor:
        """The batch that was captured: over the runner's buffers, and so of the values of the live one."""
        return self._static

    def written(self) -> dict[str, torch.Tensor]:
        """All that it writes, by name: views of vLLM's buffers."""
        return self.planes.written(self._static)
