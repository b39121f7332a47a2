"""Runs only where drafts are verified by their graphs: what every step read is compared after the draft.

With NSA_PLUGIN_VERIFY_MODE=graph a draft computes its metadata as it does without verification, and at each step copies what
the step reads into rows of `Staged`. Before a draft that is due, vLLM's own code builds all steps in spare buffers: a draft
moves its lengths on. After it both are compared. That draft's tokens were proposed with the plugin's values; the target
verifies them as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.verification import Described, Verification, snapshot
from nsa_plugin.adapters.vllm.reports import report
from nsa_plugin.adapters.vllm.v2.step import PATH, Step
from nsa_plugin.adapters.vllm.v2.verified.rebuild import Draft
from nsa_plugin.adapters.vllm.v2.verified.rows import Expected
from nsa_plugin.adapters.vllm.v2.verified.staged import Staged


class ComparedDraft:
    """Drafts of one size, of which every n-th is compared once it has run."""

    def __init__(self, host: Host, staged: Staged) -> None:
        self.staged = staged
        self._host, self._said = host, report(host, PATH)
        self._verification = Verification(self._said, Step.strategy, host.verify)
        self._failed = False
        self._kept: tuple[list[Expected], Described] | None = None

    def try_out(self, draft: Draft) -> None:
        """Compute vLLM's own values, for a draft that does not count: what that takes is there before it is needed."""
        for _ in self.staged.expected(draft):
            pass

    def before(self, draft: Draft) -> None:
        """If the draft that begins is due, keep vLLM's own values of its steps."""
        self._kept = None
        if draft.dummy or self._failed or not self._host.on or not self._verification.is_due():
            return
        try:
            batch, geometry, limits = self.staged.described(draft)
            described = snapshot(batch, geometry), geometry, limits
            self._kept = [value.kept() for value in self.staged.expected(draft)], described
        except Exception as error:
            self._fail(error)

    def after(self, draft: Draft) -> None:
        """Compare what its steps have read."""
        kept, self._kept = self._kept, None
        if kept is None:
            return
        values, described = kept
        try:
            self._verification.settle(self.staged.differences(draft, values), None, lambda: described)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failed = True
        self._said.fell_back("replay", Step.strategy, error)


class WatchedStep:
    """A `Step`, and after each of its steps a copy of what that step reads. A graph records both."""

    strategy = Step.strategy

    def __init__(self, step: Step, staged: Staged, metadata: Mapping[str, Any]) -> None:
        self._step, self._staged, self._metadata, self._next = step, staged, metadata, 0

    def run(self) -> None:
        """Write the metadata of the step that begins now, and keep it."""
        self._step.run()
        self._staged.keep(self._next, self._metadata)
        self._next += 1

    def close(self) -> None:
        """The draft is over."""
        self._step.close()
