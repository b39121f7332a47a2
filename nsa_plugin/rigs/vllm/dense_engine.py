"""Model Runner V2's draft with dense MLA as the conformance kit sees it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from nsa_plugin.adapters.vllm.releases import FUSED_UPDATE
from nsa_plugin.rigs.vllm import dense
from nsa_plugin.rigs.vllm.drafts import BATCHES
from nsa_plugin.rigs.vllm.engine import VllmCase, draft_steps
from nsa_plugin.rigs.vllm.v2_draft import CAPTURED
from nsa_plugin.rigs.vllm.v2_engine import V2Engine, V2Session
from nsa_plugin.testing.engine import Values


class DenseCase(VllmCase):
    """A draft with dense MLA."""

    column = "dense MLA drafts"
    """What the release matrix has it under."""


def draft(layout: str, tokens: int) -> DenseCase:
    """A draft of `tokens` tokens with a layout of `dense.LAYOUTS`."""
    covers = frozenset({"decode", "padded rows", "int32 lengths", draft_steps(tokens)})
    path = f"draft decode, {layout.partition(',')[0]}"
    return DenseCase(f"{tokens} draft tokens, {layout}", path, len(BATCHES), covers, layout=layout, tokens=tokens)


CASES = (
    *(draft(layout, 3) for layout in dense.LAYOUTS),
    draft("FLASH_ATTN_MLA", 2), draft("FLASHMLA, fp8", 8),
)  # fmt: skip


class DenseSession(V2Session):
    """A speculator that has captured its draft."""

    draft: dense.DenseDraft
    _padded = False

    def make(self, case: VllmCase) -> dense.DenseDraft:
        """The draft of a case."""
        return dense.DenseDraft(dense.LAYOUTS[case.layout], case.tokens)

    def poison(self) -> None:
        """Fill what nobody may read unwritten."""
        self.draft.poison()

    def prepare(self, round: int) -> None:
        """Run the whole draft."""
        self._padded = len(BATCHES[round][0]) < CAPTURED
        super().prepare(round)

    def read(self) -> list[Values]:
        """What each draft step saw; of a padded batch not the schedule itself, see `dense.DUE`."""
        return [
            {name: value for name, value in step.items() if not (self._padded and name == "schedule")}
            for step in super().read()
        ]


class DenseEngine(V2Engine):
    """The installed vLLM's Model Runner V2 with dense MLA, from 0.32 on."""

    tried = CASES
    session = DenseSession
    needs = (FUSED_UPDATE,)

    def patched(self) -> Sequence[object]:
        """The builders of dense MLA, too."""
        return [*super().patched(), *dense.builders()]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """With stand-ins for the compiled schedulers."""
        with super().running(), dense.emulated_schedulers():
            yield
