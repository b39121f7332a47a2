"""Runs at start, when vLLM has made a draft: all ranks that share the draft choose the fused one, or none does.

vLLM warms a captured draft up by running it: the whole draft with all its collectives if it is fused, else one step. A
rank that chose alone would leave the others waiting, at the first captured size. The choice itself comes from the
configuration, which all ranks have; what can differ is whether the plugin is there, which build of it, and whether it is
switched on at that moment. A rank without it takes part in no collective of ours, so ranks meet at the store that
torch.distributed keeps for them, and wait for absent ones no longer than `SECONDS`.

Who shares a draft: vLLM makes a speculator on the last pipeline stage alone, whose collectives are those of its tensor,
context and data parallel groups. Other stages, and other engines that a launcher has put into the same default group,
have no say. Elastic expert parallelism keeps ranks that share it out of the default group: there nothing is fused.
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
"""How long to wait for the vote of a rank. All choose after collectives of their own start-up."""
KEY = "nsa_plugin/fused_draft"
TICK_SECONDS = 0.02
GROUPS = tuple(f"vllm.distributed.parallel_state.get_{name}_group" for name in ("tp", "pcp", "dp"))
AGREED = "agreed"
ABSENT = "nsa-plugin is absent or failing on rank "

_rounds: Counter[int] = Counter()
_absent: dict[int, str] = {}
"""By first rank of those that share a draft: votes so far, and the answer if a rank was absent, which stays."""


def sharing() -> list[int]:
    """The ranks of torch's default group that share this rank's draft, this one included; ascending.

    Raises
    ------
    RuntimeError
        Others share it that are not in that group.
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
    """Empty if every rank that shares this draft asks this, without an objection of its own, with one build of the plugin.

    Else what is wrong, on every rank: it is logged, but for this rank's own objection, `own`. Each rank puts its vote into
    the store and waits for the others'. What it sees then, or that it waited in vain, is a proposal; the first proposal
    in the store is everybody's answer, also that of ranks which come late. A rank that objects proposes that at once, and
    waits for nobody. It never raises.
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
