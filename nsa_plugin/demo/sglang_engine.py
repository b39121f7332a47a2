"""The same trace over the real sglang: its own per-backend code, its shipped code, and this plugin."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch

from nsa_plugin.bench.measure import synchronize
from nsa_plugin.core.batch import ForwardMode
from nsa_plugin.core.errors import UnavailableError
from nsa_plugin.host import Host
from nsa_plugin.rigs.sglang import backends as kit
from nsa_plugin.settings import Settings
from nsa_plugin.trace import Round, Sizes


class SglangHarness:
    """Real `DeepseekSparseAttnMultiStepBackend`s, one per contender, over one token table.

    Attributes
    ----------
    seconds : contender to list of seconds, one per round
    stale : int
        Rounds in which sglang's shipped code left a plane of some draft backend stale.
    """

    contenders: tuple[str, ...] = ("sglang, every backend", "sglang, shipped", "plugin, copy", "plugin, share")

    def __init__(self, sizes: Sizes, index_topk: int, num_steps: int, table: torch.Tensor) -> None:
        config = kit.Config(
            width=sizes.width, max_requests=sizes.max_requests, max_batch_size=max(sizes.captured),
            draft_tokens=num_steps, index_topk=index_topk, page_size=sizes.page_size,
        )  # fmt: skip
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.stale = 0
        self._multi: dict[str, Any] = {}
        host = Host()
        adapter = host.manager.adapter("sglang")
        if adapter is None:
            raise UnavailableError("no adapter for sglang")
        self._adapter = adapter
        for name, strategy in zip(self.contenders, (None, None, "copy", "share"), strict=True):
            if strategy is not None:  # what was captured before stays sglang's own
                host.settings = Settings(strategy=strategy)
                if problems := adapter.install(host):
                    raise UnavailableError("; ".join(problems))
            multi = self._multi[name] = kit.make_multi_step(config, table, num_steps)
            for size in sizes.captured:
                fill = torch.ones(size, dtype=torch.int64, device=table.device)
                kit.before_capture(multi, kit.make_batch("DECODE", fill, fill - 1))

    def run(self, entry: Round) -> list[str]:
        """Prepare a round with every contender; returns the plugin's values that differ from sglang's per-backend code."""
        first, shipped, *ours = self.contenders
        device = self._multi[first].attn_backends[0].device
        batch = kit.make_batch(
            "DECODE", torch.tensor(entry.seq_lens, device=device), torch.tensor(entry.requests, device=device)
        )
        for name, multi in self._multi.items():
            synchronize()
            start = time.perf_counter()
            if name == first:
                for backend in multi.attn_backends:
                    kit.engine_metadata(backend, batch, "DECODE")
            else:
                kit.preparation(multi, batch)()
            synchronize()
            self.seconds[name].append(time.perf_counter() - start)
        expected = self._multi[first].attn_backends[0].forward_metadata
        wrong = {
            name: [
                f"{name}, draft backend {index}: {field}"
                for index, backend in enumerate(self._multi[name].attn_backends)
                for field in kit.differences(expected, backend.forward_metadata, backend, batch, ForwardMode.DECODE)
            ]
            for name in (shipped, *ours)
        }
        self.stale += bool(wrong[shipped])
        return [line for name in ours for line in wrong[name]]

    def close(self) -> None:
        """Leave sglang as it was found."""
        self._adapter.undo()
