"""Runs only where drafts of Model Runner V2 are verified or measured: each draft is seen to begin.

`TargetDependentARSpeculator._fused_multi_step_decode` replays a captured draft, or runs it: the one place on the host
that every fused draft passes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from nsa_plugin.adapters.attached import Attached
from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.side_by_side import capturing
from nsa_plugin.adapters.verification import Moment, Verification, moment
from nsa_plugin.adapters.vllm import releases
from nsa_plugin.adapters.vllm.reports import logger, recorded, report
from nsa_plugin.adapters.vllm.v2 import switch as v2_switch
from nsa_plugin.adapters.vllm.v2.step import PATH, RunsStep, Step, Uncovered
from nsa_plugin.adapters.vllm.v2.verified.afterwards import ComparedDraft, WatchedStep
from nsa_plugin.adapters.vllm.v2.verified.rebuild import Draft, Rebuild
from nsa_plugin.adapters.vllm.v2.verified.rows import Arena
from nsa_plugin.adapters.vllm.v2.verified.staged import Staged


def watch(host: Host, live: Callable[[], bool]) -> Watch | None:
    """What sees every draft, if the settings ask for anything that takes it."""
    if not host.verify and report(host, PATH).instrument(recorded, "graph", 1) is recorded:
        return None
    return Watch(host, live)


def verified(host: Host) -> Moment | None:
    """When fused drafts are verified: before, unless the settings ask for the graph; None if they ask for no verification."""
    return moment(host.verify_mode, "before", "graph") if host.verify else None


class PreparedDraft:
    """How the metadata of the captured drafts of one size is prepared before each, verified, and handed back to vLLM."""

    def __init__(self, host: Host, speculator: Any, staged: Staged) -> None:
        self._host, self._speculator, self._staged = host, speculator, staged
        self._steps = speculator.num_speculative_steps - 1
        self._said = report(host, PATH)
        self._ours = self._said.instrument(staged.prepare, "copy", self._steps)
        self._native = self._said.instrument(staged.prepare_natively, "off", self._steps)
        self._verification = Verification(self._said, "copy", host.verify)
        self._handed_back = False

    def __call__(self, draft: Draft) -> None:
        """Prepare the draft that begins."""
        if self._handed_back or not self._host.on:
            return self._hand_back(draft)
        try:
            self._ours(draft)
            if draft.dummy:
                return None
            if self._verification.is_due():
                self._verification.settle(
                    self._staged.differences(draft),
                    lambda: self._staged.prepare_natively(draft),
                    lambda: self._staged.described(draft),
                )
        except Exception as error:
            self._handed_back = True
            self._report(error, "copy")
            self._hand_back(draft)
        return None

    def _hand_back(self, draft: Draft) -> None:
        """Let vLLM's own code prepare it. Should that fail on spare buffers, this plugin's does, unverified."""
        try:
            self._native(draft)
        except Exception as error:
            self._report(error, "off")
            self._native = self._ours
            self._ours(draft)

    def _report(self, error: Exception, strategy: str) -> None:
        self._said.fell_back("replay", strategy, error)


class _Speculator:
    """What belongs to one speculator, for as long as its block tables and attention groups stay."""

    def __init__(self, speculator: Any) -> None:
        self.tables, self.groups = speculator.block_tables, speculator.attn_groups
        self.arena = Arena(speculator.device)
        self.prepare: dict[int, PreparedDraft] = {}
        self.compare: dict[int, ComparedDraft] = {}
        self.count: dict[int, Callable[[None], None]] = {}
        self._rebuilds: dict[tuple[int, ...], Rebuild] = {}

    def fits(self, speculator: Any) -> bool:
        """Whether they stayed."""
        return self.tables is speculator.block_tables and self.groups is speculator.attn_groups

    def rebuild(self, speculator: Any, groups: list[Any]) -> Rebuild:
        """The one for these groups; every size uses it."""
        key = tuple(map(id, groups))
        if key not in self._rebuilds:
            self._rebuilds[key] = Rebuild(speculator, groups)
        return self._rebuilds[key]


class Watch:
    """Every fused draft of a process.

    Attributes
    ----------
    verified : "before", "graph" or None
        When drafts are, if they were asked to be and can be.
    """

    def __init__(self, host: Host, live: Callable[[], bool]) -> None:
        self._host, self._live, self._said = host, live, report(host, PATH)
        self.verified = verified(host)
        self._known: Attached[_Speculator] = Attached("watched")
        self._draft: Draft | None = None
        self._prepared = False
        self._compared: ComparedDraft | None = None
        self._measured: _Measured | None = None

    def begin(self, original: Callable[..., None]) -> Callable[..., None]:
        """In place of `_fused_multi_step_decode`."""

        def fused_multi_step_decode(
            speculator: Any, num_reqs: int, skip_attn: bool, batch_desc: Any, num_tokens_across_dp: Any,
            seq_lens_cpu_upper_bound: Any, num_speculative_steps: int, *args: Any, **kwargs: Any,
        ) -> None:  # fmt: skip
            arguments = (
                num_reqs, skip_attn, batch_desc, num_tokens_across_dp, seq_lens_cpu_upper_bound, num_speculative_steps,
                *args,
            )  # fmt: skip
            if not self._live():
                return original(speculator, *arguments, **kwargs)
            captured = batch_desc.cg_mode.name == "FULL"
            known = self._known.get(speculator) if captured else None
            if known is not None and (count := known.count.get(batch_desc.num_reqs)) is not None:
                count(None)
                if batch_desc.num_reqs not in known.compare:
                    return original(speculator, *arguments, **kwargs)
            tokens = num_speculative_steps
            if captured:  # a graph runs the steps that it was captured with, however many are wanted
                tokens = releases.captured_steps(speculator, batch_desc)
            draft = self._draft = Draft(num_reqs, batch_desc, seq_lens_cpu_upper_bound, tokens - 1, skip_attn)
            self._prepared, self._compared, self._measured = False, None, None
            try:
                if known is not None and known.fits(speculator):
                    prepare = known.prepare.get(draft.rows)
                    if prepare is not None:
                        prepare(draft)
                        self._prepared = True
                    self._compare(known, draft)
                original(speculator, *arguments, **kwargs)
                if self._compared is not None:
                    self._compared.after(draft)
                if self._measured is not None:
                    self._measured.record()
            finally:
                self._draft, self._compared, self._prepared = None, None, False

        return fused_multi_step_decode

    def prepared(self) -> bool:
        """Whether the metadata of the draft under way is there."""
        return self._prepared

    def step(self, speculator: Any, metadata: Mapping[str, Any], num_reqs: int) -> RunsStep:
        """What a fused draft runs at each step: while it is captured, or now."""
        known = self._of(speculator)
        if self.verified is not None:
            prepares = self.verified == "before"
            try:
                step = (self._staged if prepares else self._watched)(known, speculator, metadata, num_reqs)
            except Exception as error:
                if not isinstance(error, Uncovered):
                    self._said.fell_back("capture", "copy" if prepares else "graph", error)
                if self._draft is None:  # what is captured now stays as it is
                    self.verified, v2_switch.of(self._host, speculator).switchable = None, False
                    logger.warning("nsa-plugin: %s: NSA_PLUGIN_VERIFY can't be had: %s", PATH, error)
            else:
                v2_switch.of(self._host, speculator).switchable = prepares
                return step
        if self._draft is None or self._prepared:
            self.count(speculator, num_reqs)
            return Step(speculator, metadata, num_reqs, self._host)
        seconds = self._said.durations("graph", self._draft.steps)
        if seconds is None:
            return Step(speculator, metadata, num_reqs, self._host)
        self._measured = _Measured(seconds, lambda: Step(speculator, metadata, num_reqs, self._host))
        return self._measured

    def count(self, speculator: Any, num_reqs: int) -> None:
        """Count the replays of a graph that computes the metadata of drafts of a size."""
        steps = speculator.num_speculative_steps - 1
        self._of(speculator).count[num_reqs] = self._said.instrument(recorded, "graph", steps)

    def _of(self, speculator: Any) -> _Speculator:
        known = self._known.get(speculator)
        if known is None or not known.fits(speculator):
            known = self._known.set(speculator, _Speculator(speculator))
        return known

    def _compare(self, known: _Speculator, draft: Draft) -> None:
        self._compared = known.compare.get(draft.rows)
        if self._compared is not None:
            self._compared.before(draft)

    def _watched(self, known: _Speculator, speculator: Any, metadata: Mapping[str, Any], num_reqs: int) -> RunsStep:
        """A step as it is without verification, and what keeps what it reads."""
        compare, before = known.compare.get(num_reqs), known.arena.size
        if compare is None and capturing():
            raise Uncovered("captured without a warm-up")
        if compare is None or (self._draft is None and not capturing()):
            staged = Staged(
                speculator, metadata, num_reqs, known.arena, functools.partial(known.rebuild, speculator), self._host
            )
            compare = known.compare[num_reqs] = ComparedDraft(self._host, staged)
            compare.try_out(_warm_up(num_reqs, speculator))
            if known.arena.size > before:
                self._said.buffers("graph", known.arena.size - before)
        if self._draft is None:
            self.count(speculator, num_reqs)
        elif self._compared is None:  # no graph runs this draft, and its lengths are those that it began with
            self._compare(known, self._draft)
        return WatchedStep(Step(speculator, metadata, num_reqs, self._host), compare.staged, metadata)

    def _staged(self, known: _Speculator, speculator: Any, metadata: Mapping[str, Any], num_reqs: int) -> RunsStep:
        before = known.arena.size
        rebuild = functools.partial(known.rebuild, speculator)
        staged = Staged(speculator, metadata, num_reqs, known.arena, rebuild, self._host)
        step = staged.recorded(metadata)
        if self._prepared:
            return step
        prepare = known.prepare.get(num_reqs)
        if capturing():
            if prepare is None:
                raise Uncovered("captured without a warm-up")
            return step
        if prepare is None or self._draft is None:
            known.count.pop(num_reqs, None)
            prepare = known.prepare[num_reqs] = PreparedDraft(self._host, speculator, staged)
        if known.arena.size > before:
            self._said.buffers("copy", known.arena.size - before)
        if self._draft is not None:
            prepare(self._draft)
        else:  # vLLM warms up what it is about to capture: what it takes is shown to work before it is needed
            for way in (staged.prepare_natively, staged.prepare):
                way(_warm_up(num_reqs, speculator))
        return step


class _Measured:
    """A `Step` of a draft that no graph replays, with its host time."""

    strategy = Step.strategy

    def __init__(self, seconds: Callable[[float], None], make: Callable[[], Step]) -> None:
        start = time.perf_counter()
        self._step, self._seconds = make(), seconds
        self._spent = time.perf_counter() - start

    def run(self) -> None:
        """Run it."""
        start = time.perf_counter()
        self._step.run()
        self._spent += time.perf_counter() - start

    def close(self) -> None:
        """The draft is over."""
        self._step.close()

    def record(self) -> None:
        """The draft has been run."""
        self._seconds(self._spent)


def _warm_up(rows: int, speculator: Any) -> Draft:
    from vllm.config.compilation import CUDAGraphMode

    descriptor = SimpleNamespace(cg_mode=CUDAGraphMode.FULL, num_tokens=rows, num_reqs=rows)
    bound = torch.full((rows,), speculator.max_model_len, dtype=torch.int32)
    return Draft(rows, descriptor, bound, speculator.num_speculative_steps - 1, dummy=True)
