"""Batches of the real sglang's types and what tests do with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa_plugin import hookimpl
from nsa_plugin.adapters.sglang import hooked, reports
from nsa_plugin.adapters.sglang.compare import differences
from nsa_plugin.core import api
from nsa_plugin.rigs.sglang import backends as kit

CONFIG = kit.Config()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TABLE = kit.req_to_token(CONFIG, DEVICE)
FIELDS = ("cache_seqlens_int32", "cu_seqlens_k", "page_table_1", "real_page_table", "dsa_cache_seqlens_int32",
          "dsa_cu_seqlens_k", "dsa_seqlens_expanded", "paged_mqa_schedule_metadata", "topk_v2_plan")  # fmt: skip


class TritonPrecompute:
    """Makes the plugin use its kernels on a CPU too, where `auto` means the reference."""

    @hookimpl
    def nsa_plugin_bind_precompute(self, batch: Any, geometry: Any, out: Any, enabled: Any) -> Any:
        return api.bind_precompute(batch, out, impl="triton", enabled=enabled)

    @hookimpl
    def nsa_plugin_bind_copy(self, source: Any, destinations: Any) -> Any:
        return api.bind_copy(source, destinations, impl="triton")


def batch(mode: str, seq_lens: list[int], requests: list[int], lengths: torch.dtype = torch.int64) -> Any:
    tokens = len(seq_lens) * (1 if mode == "DECODE" else CONFIG.draft_tokens)
    return kit.make_batch(
        mode, torch.tensor(seq_lens, dtype=lengths, device=DEVICE), torch.tensor(requests, device=DEVICE), tokens
    )


def capture_batch(mode: str, size: int) -> Any:
    """As sglang's runners capture: every request at the fill length 1, request 0."""
    return batch(mode, [1] * size, [0] * size)


def replays(mode: str, longest: int) -> list[Any]:
    """Batches of four: page edges, long, a shrinking one, one padded by two requests, an idle one padded by four."""
    return [
        batch(mode, [63, 64, 65, 600], [3, 1, 0, 6]),
        batch(mode, [longest, 20, 257, 900], [2, 5, 7, 8]),
        batch(mode, [5, 7, 2, 1], [9, 1, 2, 3]),
        batch(mode, [300, 511, 1, 1], [4, 2, 0, 0]),
        batch(mode, [1, 1, 1, 1], [0, 0, 0, 0]),
    ]


def record(owner: Any, static: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What sglang's runners do inside a capture. Without a GPU the stream says that it is being captured."""
    with monkeypatch.context() as patch:
        patch.setattr(hooked, "capturing", lambda: True)
        owner.init_forward_metadata_in_graph(static)


def addresses(backend: Any) -> dict[str, int]:
    """Where the tensors of a backend's metadata are."""
    metadata = backend.forward_metadata
    return {name: getattr(metadata, name).data_ptr() for name in FIELDS if getattr(metadata, name) is not None}


def wrong(mode: str, reference: Any, live: Any, backends: list[Any]) -> list[str]:
    """Fields in which any backend differs from sglang's own per-backend values."""
    expected = kit.engine_metadata(reference, live, mode)
    found = [
        differences(expected, backend.forward_metadata, backend, live, reports.MODES[mode]) for backend in backends
    ]
    return sorted({name for names in found for name in names})
