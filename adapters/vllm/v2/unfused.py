"""Runs at every draft that vLLM does not fuse: understood groups keep their metadata from step to step.

vLLM takes `_multi_step_decode` as soon as one group can't update its metadata in place. That loop rebuilds the metadata of
every attention group for each step, then replays a graph of one step. Here the rebuild of the first step stays. In later
steps one launch writes what changes into the buffers of that rebuild, which the graph reads. Only groups that are not
understood are rebuilt.

Positions and lengths of later steps need no precomputation: the graph of a step advances them in the runner's buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from nsa_plugin.adapters.attached import Attached
from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.probe import Need
from nsa_plugin.adapters.vllm import releases
from nsa_plugin.adapters.vllm.deep_gemm import scheduler
from nsa_plugin.adapters.vllm.reports import report
from nsa_plugin.adapters.vllm.v2.observed import ObservedDrafts
from nsa_plugin.adapters.vllm.v2.step import DeferredSlots, Hooks, Step, Uncovered, as_captured

PATH = "draft steps that are not fused"
LOOP = "_multi_step_decode"
UNVERIFIED = "NSA_PLUGIN_VERIFY does not cover it"
KEPT_BATCHES = 128
"""How many bound steps are kept: one for each batch size and place of its metadata."""


def needs(speculator: str) -> tuple[Need, ...]:
    """What this needs of the speculator at a dotted path."""
    return (
        Need(
            f"{speculator}.{LOOP}",
            ("num_reqs", "skip_attn", "batch_desc"),
            "know when the steps begin and end",
            hooked=True,
            known=("num_tokens_across_dp", "seq_lens_cpu_upper_bound", "num_speculative_steps"),
        ),
        releases.SLOTS,
    )


class KeptStep(Step):
    """The later steps of a draft. vLLM's rebuild of the first step has written all that stays the same."""

    instead_of = "rebuild"
    _first = False

    def run_others(self) -> None:
        """They are rebuilt."""

    @staticmethod
    def schedule(builder: Any, decode: Any) -> Callable[[], None]:
        """Copies DeepGEMM's schedule to where the graph reads it."""
        make = scheduler(builder)

        def copy() -> None:
            if make is not None:
                decode.schedule_metadata.copy_(as_captured(make(decode), decode))

        return copy


@dataclass
class Bound:
    """The later steps of a speculator's drafts, by the places of their metadata, for as long as its groups stay."""

    groups: Any
    steps: dict[Any, KeptStep]


class Steps:
    """The steps of one draft: stands in for the method of a speculator that builds the metadata of each.

    Parameters
    ----------
    speculator : one of `releases.SPECULATORS`
    num_rows : int
        Requests, padding included.
    bind : callable
        `bind(speculator, metadata, num_rows)`: the later steps, or None.
    fell_back : callable
        Told about an error.
    """

    def __init__(
        self,
        speculator: Any,
        num_rows: int,
        bind: Callable[[Any, Any, int], KeptStep | None],
        fell_back: Callable[[Exception], None],
    ) -> None:
        self._speculator, self._num_rows, self._bind, self._fell_back = speculator, num_rows, bind, fell_back
        self._name = releases.builds(speculator)
        self._build = getattr(speculator, self._name)
        self._before = {name: vars(speculator)[name] for name in (self._name,) if name in vars(speculator)}
        self._groups = speculator.attn_groups
        self._slots = DeferredSlots(speculator.block_tables, None)
        self._step: KeptStep | None = None
        self._metadata: Any = None

    def __enter__(self) -> None:
        self._speculator.block_tables = self._slots
        setattr(self._speculator, self._name, self.build)

    def __exit__(self, *_: object) -> None:
        self._speculator.block_tables = self._slots.tables
        delattr(self._speculator, self._name)
        vars(self._speculator).update(self._before)

    @property
    def kept(self) -> bool:
        """Whether later steps kept the metadata of the first."""
        return self._slots.step is not None

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """The metadata of the step that begins now."""
        step = self._step
        if step is None or self._slots.step is None:
            first = self._metadata is None
            self._metadata = self._build(*args, **kwargs)
            if first and self._metadata is not None:
                self._slots.step = self._step = self._bind(self._speculator, self._metadata, self._num_rows)
            return self._metadata
        try:
            step.run()
        except Exception as error:
            self._slots.give_up()
            self._fell_back(error)
            return self._build(*args, **kwargs)
        if step.others:
            self._speculator.attn_groups = [
                [group for group in same if any(group is other for other in step.others)] for same in self._groups
            ]
            try:
                self._metadata = {**self._metadata, **self._build(*args, **kwargs)}
            finally:
                self._speculator.attn_groups = self._groups
        return self._metadata


def hooks(host: Host, owner: type, live: Callable[[], bool]) -> Hooks:
    """Replacement of the loop of `owner`, one of `releases.SPECULATORS`, by name.

    It passes its calls on to the original when it is not `live`.
    """
    loop, said = getattr(owner, LOOP), report(host, PATH)
    observed = ObservedDrafts(said)
    kept: Attached[Bound] = Attached("kept_steps")
    failed = False

    def fell_back(error: Exception) -> None:
        nonlocal failed
        failed = True
        said.fell_back("replay", "copy", error)

    def bind(speculator: Any, metadata: Any, num_rows: int) -> KeptStep | None:
        """The steps for metadata in these places, bound when the places are new. New attention groups start afresh."""
        try:
            known = kept.get(speculator)
            if known is None or known.groups is not speculator.attn_groups:
                known = kept.set(speculator, Bound(speculator.attn_groups, {}))
            key = places(speculator, metadata, num_rows)
            if key not in known.steps:
                if len(known.steps) >= KEPT_BATCHES:
                    del known.steps[next(iter(known.steps))]
                known.steps[key] = KeptStep(speculator, metadata, num_rows, host)
                observed.bound(speculator, num_rows, "copy")
        except Uncovered as reason:
            said.left_alone(str(reason))
            return None
        except Exception as error:
            fell_back(error)
            return None
        said.using("copy")
        return known.steps[key]

    def multi_step_decode(
        speculator: Any, num_reqs: int, skip_attn: bool, batch_desc: Any, *args: Any, **kwargs: Any
    ) -> Any:
        def original() -> Any:
            return loop(speculator, num_reqs, skip_attn, batch_desc, *args, **kwargs)

        if failed or skip_attn or not live() or "copy" not in host.strategies or speculator.num_speculative_steps < 3:
            return original()
        if problem := UNVERIFIED if host.verify else releases.uncovered_speculator(speculator):
            said.left_alone(problem)
            return original()
        num_rows = batch_desc.num_reqs or num_reqs
        steps = Steps(speculator, num_rows, bind, fell_back)
        with steps:
            drafted = original()
        if steps.kept:
            observed.drafted(speculator, num_rows, num_reqs)
        return drafted

    return MappingProxyType({LOOP: multi_step_decode})


def places(speculator: Any, metadata: Mapping[str, Any], num_rows: int) -> tuple[Any, ...]:
    """Where every tensor is that the later steps of a draft could read or write."""
    buffers = speculator.input_buffers
    found: list[Any] = [num_rows, buffers.seq_lens.data_ptr(), speculator.block_tables.slot_mappings.data_ptr()]
    for group in releases.groups_of(speculator):
        own = metadata[group.layer_names[0]]
        for holder in (own, getattr(own, "decode", None)):
            for value in vars(holder).values() if holder is not None else ():
                if isinstance(value, torch.Tensor):
                    found.append((value.data_ptr(), value.shape))
    return tuple(found)
