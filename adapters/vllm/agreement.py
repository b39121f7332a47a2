"""All ranks of an engine choose the fused draft, or none does.

vLLM warms a captured draft up by running it: the whole draft with all its collectives if it is fused, else one step. A
rank that chose alone would leave the others waiting, at the first captured size. The choice itself comes from the
configuration, which all ranks have; what can differ is whether the plugin is there and switched on. A rank without it
takes part in no collective of ours, so ranks meet at the store that torch.distributed keeps for them, and wait for
absent ones no longer than `SECONDS`.
"""

from __future__ import annotations

import logging
import time

import torch.distributed as dist

from nsa_plugin import __version__

logger = logging.getLogger("vllm.plugins.nsa_plugin")
SECONDS = 60.0
"""How long to wait for the vote of a rank. All make their metadata builders after collectives of their own start-up."""
KEY = "nsa_plugin/fused_draft"
TICK_SECONDS = 0.02


def objection() -> str:
    """Empty if every rank of this engine asks this, with one version of the plugin; else what is wrong, on every rank.

    Each rank puts its vote into the store and waits for the others'. What it sees then, or that it waited in vain, is a
    proposal; the first proposal in the store is everybody's answer, also that of ranks which come late. It never raises.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return ""
    try:
        answer = _vote(dist.get_rank(), dist.get_world_size())
    except Exception as error:
        answer = f"ranks can't agree ({type(error).__name__}: {error})"
    if answer:
        logger.warning("nsa-plugin: every rank drafts as vLLM does: %s", answer)
    return answer


def _vote(rank: int, world: int) -> str:
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    votes = [f"{KEY}/{other}" for other in range(world)]
    store.set(votes[rank], __version__)
    deadline = time.monotonic() + SECONDS
    while not (present := store.check(votes)) and not store.check([f"{KEY}/answer"]) and time.monotonic() < deadline:
        time.sleep(TICK_SECONDS)
    if present:
        versions = sorted({vote.decode() for vote in store.multi_get(votes)})
        proposal = "agreed" if len(versions) == 1 else f"ranks have nsa-plugin {' and '.join(versions)}"
    else:
        absent = [str(other) for other, vote in enumerate(votes) if not store.check([vote])]
        proposal = f"nsa-plugin is absent, off or failing on rank {', '.join(absent)} of {world}"
    answer = store.compare_set(f"{KEY}/answer", "", proposal).decode()
    return "" if answer == "agreed" else answer
