"""Drafts of both model runners, as the tests make and compare them."""

from __future__ import annotations

import pkgutil
from typing import Any

import torch

from nsa_plugin.adapters.vllm import releases
from nsa_plugin.rigs.vllm import v1_draft
from nsa_plugin.rigs.vllm.drafts import BATCHES, LAYOUTS
from nsa_plugin.rigs.vllm.v2_draft import CAPTURED, Draft

Step = dict[str, torch.Tensor]
LAYOUT, TOKENS = LAYOUTS["bf16"], 3
SOME = [("bf16", 2), ("bf16", 4), ("fp8 mixed", 3), ("fp8 separate", 2), ("fp8 separate", 8)]
"""A layout and a number of draft tokens: all of both, from the fewest tokens on. The kit tries more pairs."""
LARGE = ([100, 107, 126, 65, 700, 64], [1, 0, 2, 2, 0, 1], 1)
"""More requests than were captured."""
FIRST_IS_REBUILT = not hasattr(pkgutil.resolve_name(releases.speculator()), releases.UPDATE_STEP)
"""vLLM 0.28 to 0.31 rebuilds the metadata of the first draft step, and updates that of the others."""
POISONED = (
    "req_id_per_token_buffer", "expanded_block_table_buffer", "decode_seq_lens_buffer", "decode_lens_buffer",
    "per_req_decode_lens_buffer", "decode_indices_buffer",
)  # fmt: skip
"""Buffers of the builders that captured metadata refer to."""
OWNERS = (releases.BUILDER, releases.INDEXER, releases.speculator(), releases.V1_PROPOSER)


def captured(layout: str = "bf16", tokens: int = TOKENS) -> Draft:
    """A speculator that has warmed up its captured size."""
    draft = Draft(*LAYOUTS[layout], tokens)
    draft.warm_up()
    return draft


def assert_same(want: list[v1_draft.Step], have: list[v1_draft.Step]) -> None:
    """Every field of every draft step of Model Runner V1."""
    for index, (theirs, ours) in enumerate(zip(want, have, strict=True)):
        assert not (wrong := v1_draft.differing(theirs, ours)), f"step {index}: {wrong}"


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
    """The same as `unequal_steps`, for `proposals`."""
    assert len(want) == len(have) == (TOKENS - 1) * (len(BATCHES) + 1)
    return sorted(unequal_steps(want, have))


def unequal_steps(want: list[Step], have: list[Step], rebuilt: bool = True) -> set[str]:
    """Names of what differs in any step.

    A rebuild gives rows of padding no length, vLLM's own update in place lets them grow with the draft: the schedules of a
    padded batch can only be compared with that.
    """
    wrong = set()
    for theirs, ours in zip(want, have, strict=True):
        assert theirs.keys() == ours.keys()
        padded = rebuilt and len(theirs["positions"]) < CAPTURED
        names = theirs.keys() - ({"schedule"} if padded else set())
        wrong |= {name for name in names if not torch.equal(theirs[name], ours[name])}
    return wrong


def methods() -> list[dict[str, Any]]:
    """Every attribute of the classes that are patched."""
    return [dict(vars(pkgutil.resolve_name(owner))) for owner in OWNERS]
