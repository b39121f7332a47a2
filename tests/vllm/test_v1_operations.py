"""What a draft step of Model Runner V1 spends on metadata, counted: stock and with the plugin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from vllm.v1.attention.backends.mla import indexer
from vllm.v1.spec_decode.eagle import EagleProposer

from nsa_plugin import host as host_module
from nsa_plugin.adapters.vllm.v1 import proposer as v1_proposer
from nsa_plugin.adapters.vllm.v1.proposer import BUILD, UPDATE
from nsa_plugin.core.draft_steps import bind_draft_steps
from nsa_plugin.host import Host
from nsa_plugin.rigs.vllm.drafts import BATCHES, LAYOUTS
from nsa_plugin.rigs.vllm.v1_draft import V1Draft, proposals

Install = Callable[[], Host]


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that are no views, Triton launches, and DeepGEMM calls, whose insides it leaves out."""

    VIEWS = ("slice", "view", "unsqueeze", "select", "alias", "detach", "expand", "as_strided")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.inside = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(op).removeprefix("aten.").split(".")[0]
        if not self.inside and name not in self.VIEWS:
            self.counts[name] += 1
        return op(*args, **(kwargs or {}))

    @contextmanager
    def whole(self, name: str) -> Iterator[None]:
        """Count what happens here as one."""
        self.counts[name] += not self.inside
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


def counted(draft: V1Draft, monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """Operations of each draft step's metadata, of a batch whose like has been drafted before."""
    steps: list[Counter[str]] = []
    proposals(draft, BATCHES[:1])
    with monkeypatch.context() as patch:
        current = Count()

        def whole(name: Callable[..., str], call: Callable[..., Any]) -> Callable[..., Any]:
            def counting(*args: Any, **kwargs: Any) -> Any:
                with current.whole(name(*args)):
                    return call(*args, **kwargs)

            return counting

        launch = interpreter.GridExecutor.__call__
        patch.setattr(
            interpreter.GridExecutor, "__call__", whole(lambda grid, *_: f"triton {grid.fn.__name__}", launch)
        )
        schedule = indexer.get_paged_mqa_logits_metadata
        patch.setattr(indexer, "get_paged_mqa_logits_metadata", whole(lambda *_: "deepgemm schedule", schedule))
        stock_update, stock_build = getattr(EagleProposer, UPDATE), getattr(EagleProposer, BUILD)

        def update(proposer: Any, *args: Any) -> Any:
            with current:
                return stock_update(proposer, *args)

        def build(proposer: Any, *args: Any, draft_index: int = 0) -> Any:
            with current:
                out = stock_build(proposer, *args, draft_index=draft_index)
            if draft_index:
                steps.append(Counter(current.counts))
            current.counts.clear()
            return out

        patch.setattr(EagleProposer, UPDATE, update, raising=False)
        patch.setattr(EagleProposer, BUILD, build, raising=False)
        proposals(draft, BATCHES[-1:])
    return steps


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [2, 3, 4, 8])
def test_operations_per_draft_step(
    install_v1: Install, hopper: None, monkeypatch: pytest.MonkeyPatch, layout: str, tokens: int
) -> None:
    draft = V1Draft(*LAYOUTS[layout], tokens)
    stock = counted(draft, monkeypatch)
    monkeypatch.setattr(host_module, "bind_draft_steps", partial(bind_draft_steps, impl="triton"))
    install_v1()
    monkeypatch.setattr(v1_proposer.Patch, "_unsupported", lambda patch, proposer: "")  # the counters are overrides
    ours = counted(draft, monkeypatch)
    for index, (theirs, mine) in enumerate(zip(stock, ours, strict=True)):
        print(
            f"{layout}, K = {tokens}, step {index + 1}: stock {theirs.total()} {dict(theirs)}, ours {mine.total()} {dict(mine)}"
        )
        assert theirs.total() >= 15
        expected = Counter({"deepgemm schedule": 1, "_foreach_copy_" if index else "triton draft_steps_kernel": 1})
        if index == tokens - 2:
            expected["add_"] = 1  # the host's bound of the lengths, once per draft
        assert mine == expected
