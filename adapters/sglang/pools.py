"""At start, at capture and at every replay: what sglang keeps for pooled index keys (`index_kpool` above 1). Since 0.5.22.

There the indexer reads pooled lengths, a page table of k pages each, a plan of writes, and a schedule and a top-k plan of
its own. It does not read `paged_mqa_schedule_metadata`, `paged_mqa_ctx_lens_2d`, `topk_v2_plan` and the plan's
`seqlens_per_q`: these are not computed. A draft extend has no pooled page table. The indexer makes one in each layer;
sglang's own path would not refresh one that we gave it, and so it would be stale after a fall-back.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from nsa_plugin.core.batch import ForwardMode
from nsa_plugin.core.pools import PoolMetadata

PLAN_MODULE = "sglang.srt.layers.attention.dsa.kpool_plan"
INDEX_MODULE = "sglang.srt.layers.attention.dsa.kpool_fp8_index"
POOLED_TABLE = "pooled_real_page_table"
SCHEDULE, TOPK_PLAN = "pool_schedule_metadata", "pool_topk_v2_plan"
"""Derived planes of pooled index keys; the second since 0.5.23."""
_OF_DRAFT = {SCHEDULE: "pooled_paged_mqa_schedule_metadata", TOPK_PLAN: "pooled_topk_v2_plan"}
"""Where a draft decode has them in its `DSAMetadata`; other modes have them in the plan of writes."""


def keys_per_index_key(backend: Any) -> int:
    """How many keys share an index key (k): 1 until 0.5.18."""
    return int(getattr(backend, "dsa_index_kpool", 1))


def write_plan(metadata: Any) -> Any:
    """The `KPoolWritePlan` of a `DSAMetadata`; None without pooled index keys."""
    return getattr(metadata, "kpool_write_plan", None)


def pools_of(metadata: Any) -> PoolMetadata | None:
    """The buffers of pooled index keys in a captured `DSAMetadata`; None without them."""
    plan = write_plan(metadata)
    if plan is None:
        return None
    lengths = plan.pool_seqlens_per_q
    return PoolMetadata(
        seqlens=metadata.pooled_cache_seqlens_int32 if lengths is None else lengths,
        write_start=plan.write_start,
        tail_start=plan.tail_logical_start,
        requests=plan.req,
        write_loc=plan.write_loc,
        page_table=metadata.pooled_real_page_table,
        accepted=plan.effective_n_per_batch,
    )


def pooled_table(metadata: Any) -> torch.Tensor | None:
    """The page table of pooled index keys of a `DSAMetadata`; None without them, and in a draft extend."""
    table: torch.Tensor | None = getattr(metadata, POOLED_TABLE, None)
    return table


def pool_planes(metadata: Any) -> dict[str, torch.Tensor]:
    """The derived planes of pooled index keys that a `DSAMetadata` has. On Hopper some numbers of heads have no schedule."""
    plan = write_plan(metadata)
    if plan.pool_seqlens_per_q is None:
        planes = {ours: getattr(metadata, theirs, None) for ours, theirs in _OF_DRAFT.items()}
    else:
        planes = {name: getattr(plan, name, None) for name in (SCHEDULE, TOPK_PLAN)}
    return {name: plane for name, plane in planes.items() if plane is not None}


def pool_refreshers(backend: Any, metadata: Any) -> list[Callable[[], None]]:
    """What refreshes these planes in place, as sglang does once the lengths of pools are written."""
    planes, pools = pool_planes(metadata), pools_of(metadata)
    assert pools is not None
    lengths = pools.seqlens
    refreshers: list[Callable[[], None]] = []
    if (schedule := planes.get(SCHEDULE)) is not None:
        make = importlib.import_module(PLAN_MODULE)._compute_pool_schedule_metadata
        page = backend._kpool_index_page_size()

        def write_schedule() -> None:
            schedule.copy_(make(lengths, index_page_size=page))

        refreshers.append(write_schedule)
    if (topk := planes.get(TOPK_PLAN)) is not None:
        refresh = importlib.import_module(INDEX_MODULE).refresh_kpool_topk_v2_plan
        refreshers.append(lambda: refresh(plan=topk, pool_lens=lengths))
    return refreshers


def accepted_rows(batch: Any, backend: Any, mode: ForwardMode) -> torch.Tensor | None:
    """Of each request's rows in a draft extend the number that were accepted: only these complete pools."""
    if mode is not ForwardMode.DRAFT_EXTEND or keys_per_index_key(backend) == 1:
        return None
    return getattr(batch.spec_info, "num_accept_tokens", None)


@cache
def foreign_formulas(k: int) -> str:
    """Empty, or what the installed sglang computes in another way than `PoolMetadata` says. 0.5.20 numbers pages otherwise."""
    try:
        module = importlib.import_module(INDEX_MODULE)
        pages = torch.tensor([[7, 8, 9]], dtype=torch.int32).repeat_interleave(k, 1) * k
        table = module.build_pooled_page_table_64(pages, k).tolist()
        slots = module.compute_pooled_write_locs(pages[0], torch.tensor([0, 65]), k).tolist()
    except Exception as error:
        return f"looked for the formulas of pooled index keys in {INDEX_MODULE}, found {type(error).__name__}: {error}"
    found, wanted = (table, slots), ([[7, 8, 9]], [7 * 64, 8 * 64 + 1])
    if found == wanted:
        return ""
    return f"pooled pages and slots: looked for {wanted}, found {found}; use sglang 0.5.22 or later"
