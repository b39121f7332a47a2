"""Runs at capture and after every replay: batches of Model Runner V2 are described for plugins, and shown to those that observe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nsa_plugin.adapters.attached import Attached
from nsa_plugin.adapters.reporting import PathReport
from nsa_plugin.adapters.vllm.describe import DraftBatch, describe_draft
from nsa_plugin.core.batch import BatchDescriptor


@dataclass
class Observed:
    """Batches of one captured size that somebody observes.

    Attributes
    ----------
    report : PathReport
    describe : callable
        Describes a live batch of vLLM's.
    observe : callable, or None
        What is told about each; None once a batch could not be described.
    """

    report: PathReport
    describe: Callable[[Any], BatchDescriptor]
    observe: Callable[[BatchDescriptor], None] | None

    def show(self, batch: Any) -> None:
        """Tell observers of a batch that is done."""
        if self.observe is None:
            return
        try:
            live = self.describe(batch)
        except Exception:
            self.observe = None
            self.report.logger.exception(
                "nsa-plugin: %s: a batch could not be described for observers: its size is observed no more",
                self.report.path,
            )
        else:
            self.observe(live)


def observed(
    report: PathReport, strategy: str, describe: Callable[[Any], BatchDescriptor], batch: BatchDescriptor
) -> Observed | None:
    """Who observes the size of `batch`, which has just been bound; None if nobody does."""
    observe = report.observer(strategy, batch)
    return None if observe is None else Observed(report, describe, observe)


class ObservedDrafts:
    """The drafts of all speculators, by captured size.

    Parameters
    ----------
    report : PathReport
    """

    def __init__(self, report: PathReport) -> None:
        self._report = report
        self._known: Attached[dict[int, Observed | None]] = Attached(f"observed_{report.path}".replace(" ", "_"))

    def bound(self, speculator: Any, num_rows: int, strategy: str) -> None:
        """Describe a size that has just been bound, and ask who observes it. Raises what a plugin's `describe` raises."""
        batch = _batch(speculator, num_rows)
        describe = self._report.describe(batch, describe_draft)
        found = observed(self._report, strategy, describe, describe(batch))
        self._known.setdefault(speculator, {})[num_rows] = found

    def drafted(self, speculator: Any, num_rows: int, num_reqs: int) -> None:
        """Tell observers of a draft of `num_reqs` requests, padded to `num_rows`, that is done."""
        sizes = self._known.get(speculator)
        if sizes is not None and (found := sizes.get(num_rows)) is not None:
            found.show(_batch(speculator, num_reqs))

    def around(self, draft: Callable[..., Any], live: Callable[[], bool]) -> Callable[..., Any]:
        """In place of `_fused_multi_step_decode`: `draft`, then its observers."""

        def fused_multi_step_decode(
            speculator: Any, num_reqs: int, skip_attn: bool, batch_desc: Any, *args: Any, **kwargs: Any
        ) -> Any:
            drafted = draft(speculator, num_reqs, skip_attn, batch_desc, *args, **kwargs)
            if not skip_attn and live():
                self.drafted(speculator, batch_desc.num_reqs or num_reqs, num_reqs)
            return drafted

        return fused_multi_step_decode


def _batch(speculator: Any, num_reqs: int) -> DraftBatch:
    steps = speculator.num_speculative_steps - 1
    return DraftBatch(speculator.input_buffers, speculator.block_tables, num_reqs, steps)
