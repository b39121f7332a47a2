"""Runs at start, when vLLM has made a draft: all ranks that share the draft choose the fused one, or none does.

vLLM warms up a captured draft by running it. A fused draft runs whole, with all its collectives; another draft runs one
step. A rank that chose alone would leave the others waiting at the first captured size. All ranks have the same
configuration. They can differ in three things: whether the plugin is there, which build of it, and whether it is switched
on at that moment. A rank without the plugin takes part in no collective of ours. So ranks meet at the store of
torch.distributed, and wait for absent ranks no longer than `SECONDS`.

Who shares a draft: vLLM makes a speculator on the last pipeline stage alone. Its collectives are those of its tensor,
context and data parallel groups. Other stages have no say. Nor have other engines that a launcher has put into the same
default group. Under elastic expert parallelism, ranks that share a draft are not in one default group: nothing is fused.
"""

from __future__ import annotations

import logging
import pkgutil
import time
from collections import Counter
from typing import Any

import torch.distributed as dist

from nsa_plugin.adapters.build import build

logger = logging.getLogger("vllm.plugins.nsa_plugin")
SECONDS = 60.0
"""How long to wait for the vote of a rank. Ranks choose at about the same time, after collectives of their start-up."""
KEY = "nsa_plugin/fused_draft"
TICK_SECONDS = 0.02
GROUPS = tuple(f"vllm.distributed.parallel_state.get_{name}_group" for name in ("tp", "pcp", "dp"))
AGREED = "agreed"
ABSENT = "nsa-plugin is absent or failing on rank "

_rounds: Counter[int] = Counter()
_absent: dict[int, str] = {}
"""Votes so far, and the answer that stays after a vote in which a rank was absent. Both by the first rank of those that
share a draft."""


def sharing() -> list[int]:
    """The ranks of torch's default group that share this rank's draft, this rank included; ascending.

    Raises
    ------
    RuntimeError
        A rank shares it that is not in that group.
    """
    if not dist.is_initialized():
        return [0]
    me, world = dist.get_rank(), dist.get_world_size()
    found = {me}
    for group in GROUPS:  # each spans one axis of vLLM's grid of ranks
        found = {rank + other - me for rank in found for other in pkgutil.resolve_name(group)().ranks}
    if not found <= set(range(world)):
        raise RuntimeError(f"expected the draft's ranks in torch's default group of {world}, got {sorted(found)}")
    return sorted(found)


def is_elastic(speculator: Any) -> bool:
    """Whether ranks that share its draft come and go (elastic expert parallelism): they can't be asked."""
    return bool(speculator.vllm_config.parallel_config.enable_elastic_ep)


def objection(own: str = "") -> str:
    """Empty if all ranks that share this draft agree: each asks this, none objects, and all have one build of the plugin.

    Otherwise every rank learns what is wrong. This logs it, unless it is this rank's own objection, `own`.

    Each rank puts its vote into the store and waits for the votes of the others. Then it proposes an answer: what the votes
    say, or that it waited in vain. The first proposal in the store is the answer of all ranks, also of those that come late.
    A rank that objects proposes its objection at once, and waits for nobody. Never raises.
    """
    try:
        ranks = sharing()
        if len(ranks) == 1:
            return own
        answer = _absent.get(ranks[0]) or _vote(ranks, own)
    except Exception as error:
        answer = f"ranks can't agree ({type(error).__name__}: {error})"
    if own:
        return own
    if answer:
        logger.warning("nsa-plugin: every rank drafts as vLLM does: %s", answer)
    return answer


def _vote(ranks: list[int], own: str) -> str:
    from torch.distributed.distributed_c10d import _get_default_store

    store, me = _get_default_store(), dist.get_rank()
    key = f"{KEY}/{ranks[0]}/{_rounds[ranks[0]]}"
    _rounds[ranks[0]] += 1
    votes = [f"{key}/{rank}" for rank in ranks]
    if own:
        proposal = f"rank {me}: {own}"
    else:
        store.set(f"{key}/{me}", build())
        deadline = time.monotonic() + SECONDS
        while (
            not (present := store.check(votes)) and not store.check([f"{key}/answer"]) and time.monotonic() < deadline
        ):
            time.sleep(TICK_SECONDS)
        if present:
            proposal = _compared({rank: store.get(vote).decode() for rank, vote in zip(ranks, votes, strict=True)})
        else:
            absent = [str(rank) for rank, vote in zip(ranks, votes, strict=True) if not store.check([vote])]
            proposal = f"{ABSENT}{', '.join(absent)} of {len(ranks)} that share the draft"
    answer: str = store.compare_set(f"{key}/answer", "", proposal).decode()
    if answer.startswith(ABSENT):
        _absent[ranks[0]] = answer
    return "" if answer == AGREED else answer


def _compared(builds: dict[int, str]) -> str:
    ranks_of: dict[str, list[str]] = {}
    for rank, name in builds.items():
        ranks_of.setdefault(name, []).append(str(rank))
    if len(ranks_of) == 1:
        return AGREED
    named = (f"{name} on rank {', '.join(ranks)}" for name, ranks in sorted(ranks_of.items()))
    return f"ranks have different builds of nsa-plugin: {'; '.join(named)}"
