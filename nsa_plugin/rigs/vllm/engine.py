"""vLLM as the conformance kit sees it, whichever model runner drafts: the adapter, its log, what it patches, what it needs."""

from __future__ import annotations

import contextlib
import logging
import pkgutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar
from unittest import mock

import torch

from nsa_plugin.adapters.probe import Need, missing
from nsa_plugin.adapters.vllm import releases
from nsa_plugin.adapters.vllm.ledger import v2_essential
from nsa_plugin.adapters.vllm.v2 import choice as v2_choice
from nsa_plugin.adapters.vllm.v2.target import hooks as target_hooks
from nsa_plugin.testing.engine import Case, Engine, Obstacle, without


@dataclass(frozen=True)
class VllmCase(Case):
    """A draft of `tokens` tokens, the first of which comes with the target's metadata."""

    layout: str = "bf16"
    tokens: int = 2


def draft_steps(tokens: int) -> str:
    """The situation that a draft of so many tokens covers: the first token needs no draft step."""
    return "one step" if tokens == 2 else "several steps"


class VllmEngine(Engine):
    """The installed vLLM, on CPU tensors. One adapter serves both runners; each has cases and strategies of its own.

    Attributes
    ----------
    tried : tuple of Case
        What to try with this runner.
    never_of_runner : mapping of situation to reason
        What only this runner does not have.
    needs : tuple of Need
        What of vLLM this runner is tried for.

    Parameters
    ----------
    cases : sequence of Case
        Which of `tried` to try; all by default.

    Raises
    ------
    ImportError
        The installed vLLM lacks one of `needs`: there is nothing to try.
    """

    name = "vllm"
    package = "vllm"
    logger = "vllm.plugins.nsa_plugin"
    entry_point = "nsa_plugin.entry:register_vllm"
    tried: ClassVar[tuple[Case, ...]]
    never_of_runner: ClassVar[Mapping[str, str]]
    needs: ClassVar[tuple[Need, ...]] = ()

    def __init__(self, cases: Sequence[Case] = ()) -> None:
        if problems := missing(self.needs):
            raise ImportError(problems[0])
        self._cases = cases or self.tried
        self.never = {
            "int64 lengths": "the runner's lengths are int32",
            "strided inputs": "the runner's buffers are contiguous",
            **self.never_of_runner,
        }

    def cases(self) -> Sequence[Case]:
        """What to try."""
        return self._cases

    def patched(self) -> Sequence[object]:
        """The builders that learn to update their metadata, V2's speculator, V1's proposer, and the classes around the target."""
        owners = [releases.BUILDER, releases.INDEXER, releases.speculator(), releases.V1_PROPOSER]
        owners += [] if missing(target_hooks.needs()) else target_hooks.OWNERS.values()
        return [pkgutil.resolve_name(owner) for owner in owners]

    def obstacles(self) -> Sequence[Obstacle]:
        """Each need in turn, and an installation that breaks off.

        The needs are Model Runner V2's: what Model Runner V1 lacks is logged and stops nothing else.
        """
        absent = [
            Obstacle(need.path.rpartition(".")[2], without(need.path))
            for need in dict.fromkeys(need for part in v2_essential() for need in part.needs)
        ]
        broken = mock.patch.object(v2_choice, "hooks", side_effect=RuntimeError("planted"))
        return [*absent, Obstacle("the update can't be made", broken, probed=False)]

    def running(self) -> AbstractContextManager[object]:
        """With vLLM's own logging as it is in production."""
        logging.getLogger("vllm").propagate = False
        return contextlib.nullcontext()

    @property
    def device(self) -> torch.device:
        """The emulated graphs are the CPU's."""
        return torch.device("cpu")
