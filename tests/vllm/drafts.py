"""Drafts of Model Runner V2, as the tests of faults and of other plugins compare them."""

from __future__ import annotations

import pkgutil
from typing import Any

import torch

from nsa_plugin.adapters.vllm import capabilities
from tests.vllm.engine import BATCHES, LAYOUTS
from tests.vllm.harness import Draft

Step = dict[str, torch.Tensor]
LAYOUT, TOKENS = LAYOUTS["bf16"], 3
LARGE = ([100, 107, 126, 65, 700, 64], [1, 0, 2, 2, 0, 1], 1)
"""More requests than were captured."""
FIRST_IS_REBUILT = not hasattr(pkgutil.resolve_name(capabilities.speculator()), capabilities.UPDATE)
"""vLLM 0.28 to 0.31 rebuilds the metadata of the first draft step, and updates that of the others."""
OWNERS = (capabilities.BUILDER, capabilities.INDEXER, capabilities.speculator(), capabilities.V1_PROPOSER)


def proposals(draft: Draft) -> list[Step]:
    """What every draft step of every batch saw, from poisoned buffers; the last batch is larger than any captured one."""
    seen = []
    for lengths, rejected, first_block in (*BATCHES, LARGE):
        draft.tables.slot_mappings.fill_(3)
        for builder in draft.builders:
            if hasattr(builder, "req_id_per_token_buffer"):
                builder.req_id_per_token_buffer.fill_(3)
        seen += draft.propose(lengths, rejected, first_block)
    return seen


def unequal(want: list[Step], have: list[Step]) -> list[str]:
    """Names of what differs in any step."""
    assert len(want) == len(have) == (TOKENS - 1) * (len(BATCHES) + 1)
    pairs = zip(want, have, strict=True)
    return sorted({name for ours, theirs in pairs for name in ours if not torch.equal(ours[name], theirs[name])})


def methods() -> list[dict[str, Any]]:
    """Every attribute of the classes that are patched."""
    return [dict(vars(pkgutil.resolve_name(owner))) for owner in OWNERS]
