"""Model Runner V2 as the conformance kit sees it: the fused draft of a model with pooled index keys."""

from __future__ import annotations

from collections.abc import Sequence

from nsa_plugin.adapters.vllm import builders
from nsa_plugin.adapters.vllm.v2.updates import PATH as DECODE
from nsa_plugin.rigs.vllm.drafts import BATCHES
from nsa_plugin.rigs.vllm.engine import VllmCase, draft_steps
from nsa_plugin.rigs.vllm.v2_draft import Draft
from nsa_plugin.rigs.vllm.v2_engine import V2Engine, V2Session
from nsa_plugin.rigs.vllm.v2_pooled import PooledDraft, Pools, sm90
from nsa_plugin.testing.engine import Case

PATH = f"{DECODE}, FLASHINFER_MLA_SPARSE_SM90"
POOLS = {"pools of 4": Pools(), "pools of 2, kernel blocks": Pools(2, 256, 2), "pools of 8": Pools(8, 512, 32)}


class PooledCase(VllmCase):
    """A draft with pooled index keys."""

    column = "pooled index keys"
    """What the release matrix has it under."""


def draft(pools: str, tokens: int) -> PooledCase:
    """A draft of `tokens` tokens, whose graph has one size: smaller batches are padded to it."""
    covers = frozenset({"decode", "padded rows", "int32 lengths", draft_steps(tokens)})
    return PooledCase(f"{tokens} draft tokens, {pools}", PATH, len(BATCHES), covers, layout=pools, tokens=tokens)


CASES = tuple(draft(pools, tokens) for pools, tokens in zip(POOLS, (3, 2, 5), strict=True))
"""The first is the one in which errors are planted."""


class PooledSession(V2Session):
    """A speculator that has captured its draft."""

    poisoned = ("req_id_per_token_buffer", "compressed_slot_mapping_buffer", "slot_mapping_buffer")

    @staticmethod
    def make(case: VllmCase) -> Draft:
        """The speculator of a case."""
        return PooledDraft(case.tokens, POOLS[case.layout])


class PooledEngine(V2Engine):
    """The installed vLLM's Model Runner V2, from 0.32 on."""

    tried = CASES
    session = PooledSession
    needs = tuple(need for row in builders.POOLED for need in row.needs)

    def __init__(self, cases: Sequence[Case] = ()) -> None:
        sm90()  # before anything else imports it
        super().__init__(cases)
