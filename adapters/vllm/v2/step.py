"""Runs at capture, and at drafts that no graph replays: one kernel per step of vLLM's fused draft.

`TargetDependentARSpeculator._generate_fused_drafts` (Eagle and MTP) does two things for the metadata at the start of each step:
`BlockTables.compute_slot_mappings`, and `_update_draft_decode_metadata`, which asks the builder of every attention
group. Here the first is put off until the second, and the second is one launch of `StepUpdate` for the slots of
all KV-cache groups and for the groups that are understood, then DeepGEMM's schedule and the clamp of a plan, then the other
groups' own updates.
Whatever is not understood leaves the step as vLLM has it; an error hands the draft, and all later ones, back to vLLM's own
code.

vLLM 0.28 to 0.31 (`AutoRegressiveSpeculator`) does the same two things between the steps, without a method for the second:
there one object stands for all groups. The metadata of the first step is rebuilt on the host.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch

from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.vllm import releases
from nsa_plugin.adapters.vllm.builder_rows import Replaced
from nsa_plugin.adapters.vllm.builders import KPOOL_TAIL, TAIL_SLOTS, changes_of, row_of
from nsa_plugin.adapters.vllm.deep_gemm import scheduler
from nsa_plugin.adapters.vllm.reports import report
from nsa_plugin.adapters.vllm.schedules import SCHEDULES
from nsa_plugin.adapters.vllm.v2 import plans
from nsa_plugin.adapters.vllm.v2 import switch as v2_switch
from nsa_plugin.adapters.vllm.v2.observed import ObservedDrafts
from nsa_plugin.core.step_update import DraftRows, IndexerRows, PooledKeys, SlotGroups, TailRows

PATH = "draft step"
GENERATE = "_generate_fused_drafts"
UPDATE_STEP = releases.UPDATE_STEP
Hooks = Mapping[str, Callable[..., Any]]


class Step:
    """The metadata of one draft: bound when its loop starts, run once per step.

    Parameters
    ----------
    speculator : one of `releases.SPECULATORS`
    metadata : mapping of layer name to the metadata that its group's builder made
    num_reqs : int
        Requests, padding included; each has one query token.
    host : Host
        Makes the update of the steps.

    Attributes
    ----------
    others : list of AttentionGroup
        Those that are not understood.

    Raises
    ------
    Uncovered
        Something that this update does not know; the message says what.
    """

    strategy = "graph"
    instead_of: Replaced = "update"
    _first = True

    def __init__(self, speculator: Any, metadata: Mapping[str, Any], num_reqs: int, host: Host) -> None:
        self._after: list[Callable[[], None]] = []
        self._captured: list[tuple[Any, str, Any]] = []
        self.others: list[Any] = []
        self._metadata = metadata
        request_maps, indexers, tails, understood = [], [], [], False
        for group in releases.groups_of(speculator):
            builder, own = group.get_metadata_builder(), metadata[group.layer_names[0]]
            kind = changes_of(builder, own, num_reqs, self.instead_of, host)
            understood |= kind != "other"
            if kind in ("request map", "request map and plan"):
                request_maps.append(own.req_id_per_token)
                if kind == "request map and plan":
                    self._after.append(functools.partial(plans.clamp, builder, own))
            elif kind == "tail slots":
                tails.append(_tail_rows(speculator, group, builder, own))
            elif kind == "lengths and schedule":
                indexers.append(_indexer_rows(builder, own, num_reqs))
                self._after.append(self.schedule(builder, own.decode))
                self._captured.append((own.decode, "schedule_metadata", own.decode.schedule_metadata))
            elif kind in SCHEDULES:
                self._after.append(functools.partial(SCHEDULES[kind], builder, own.decode))
                self._captured.append((own.decode, "scheduler_metadata", own.decode.scheduler_metadata))
            elif kind == "other":
                self.others.append(group)
        if not understood:
            raise Uncovered("no attention group that this update knows")
        buffers = speculator.input_buffers
        rows = DraftRows(num_reqs, buffers.positions, buffers.seq_lens, buffers.query_start_loc, speculator.idx_mapping)
        self._update = host.step_update(rows, slot_groups(speculator.block_tables), request_maps, indexers, tails)

    def run(self) -> None:
        """Write the metadata of the step that begins now."""
        self._update.run(first=self._first)
        self._first = False
        for compute in self._after:
            compute()
        self.run_others()

    def run_others(self) -> None:
        """The updates of the groups that are not understood."""
        for group in self.others:
            group.update_draft_decode_metadata(self._metadata)

    @staticmethod
    def schedule(builder: Any, decode: Any) -> Callable[[], None]:
        """What makes DeepGEMM's schedule anew. Its own tensor takes the captured one's place: its readers are recorded later."""
        make = scheduler(builder)

        def replace() -> None:
            if make is not None:
                decode.schedule_metadata = as_captured(make(decode), decode)

        return replace

    def close(self) -> None:
        """The draft is over: the next one starts with the schedules that were captured, where a rebuild puts its own."""
        for decode, name, captured in self._captured:
            setattr(decode, name, captured)


class RunsStep(Protocol):
    """What a fused draft runs at the start of each step: a `Step`, or what stands for one.

    Attributes
    ----------
    strategy : str
        How it comes by the metadata, for the log.
    """

    strategy: str

    def run(self) -> None:
        """Write the metadata of the step that begins now."""

    def close(self) -> None:
        """The draft is over."""


class Watching(Protocol):
    """What verifies or measures drafts, where the settings ask for it."""

    def step(self, speculator: Any, metadata: Mapping[str, Any], num_reqs: int) -> RunsStep:
        """What a fused draft runs at each step, in place of a `Step`."""

    def prepared(self) -> bool:
        """Whether the draft under way has its metadata, and only copies it: then it does so, on or off."""


class Uncovered(Exception):
    """Something that the one-kernel step does not know; vLLM's own update is used."""


class DeferredSlots:
    """Stands for a speculator's `BlockTables` during a fused draft: slots wait for the update that follows."""

    def __init__(self, tables: Any, step: RunsStep | None) -> None:
        self.tables = tables
        self.step: RunsStep | None = step
        self._waiting: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tables, name)

    def compute_slot_mappings(
        self, idx_mapping: Any, query_start_loc: Any, positions: Any, num_tokens_padded: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Remember the call; returns where the slots will be."""
        args = idx_mapping, query_start_loc, positions, num_tokens_padded, *args
        if self.step is None:
            return self.tables.compute_slot_mappings(*args, **kwargs)
        self._waiting = args, kwargs
        return self.tables.slot_mappings[:, :num_tokens_padded]

    def give_up(self) -> None:
        """Make up for the call that was put off, and put off none any more."""
        self.step = None
        if self._waiting is not None:
            args, kwargs = self._waiting
            self.tables.compute_slot_mappings(*args, **kwargs)


def hooks(
    host: Host,
    owner: type,
    live: Callable[[], bool],
    observed: ObservedDrafts,
    watching: Watching | None,
) -> Hooks:
    """Replacements of the methods of `owner`, one of `releases.SPECULATORS`, that make and update the steps of a draft."""
    generate, said = getattr(owner, GENERATE), report(host, PATH)
    asks_groups = releases.asks_groups(owner)
    update = releases.update_groups if asks_groups else getattr(owner, UPDATE_STEP)
    failed = False

    def uncovered(speculator: Any) -> str:
        """Empty, or why this speculator's step stays as it is: slots may only be put off if nothing comes in between."""
        if not asks_groups:
            if getattr(type(speculator), UPDATE_STEP) is not update_draft_decode_metadata:
                return f"{type(speculator).__name__}.{UPDATE_STEP} is not this plugin's"
            if problem := releases.not_vllms(update):
                return problem
        return releases.uncovered_speculator(speculator)

    def fell_back(error: Exception) -> None:
        nonlocal failed
        failed = True
        said.fell_back("capture", "graph", error)

    def generate_fused_drafts(
        speculator: Any, num_reqs: int, num_tokens_padded: int, attn_metadata: Any, *args: Any, **kwargs: Any
    ) -> Any:
        def original() -> Any:
            return generate(speculator, num_reqs, num_tokens_padded, attn_metadata, *args, **kwargs)

        if (
            failed
            or attn_metadata is None
            or not live()
            or not (host.on or (watching is not None and watching.prepared()))
        ):
            return original()
        try:
            if problem := uncovered(speculator):
                raise Uncovered(problem)
            batch = (speculator, attn_metadata, num_reqs)
            step = Step(*batch, host) if watching is None else watching.step(*batch)
            observed.bound(speculator, num_reqs, step.strategy)
        except Uncovered as reason:
            said.left_alone(str(reason))
            return original()
        except Exception as error:
            fell_back(error)
            return original()
        said.using(step.strategy)
        v2_switch.of(host, speculator).recorded = True
        tables, groups = speculator.block_tables, speculator.attn_groups
        speculator.block_tables = DeferredSlots(tables, step)
        if asks_groups:
            ask = releases.EveryGroup(
                groups,
                lambda metadata, *more, **named: update_draft_decode_metadata(
                    speculator, metadata, num_reqs, groups, *more, **named
                ),
            )
            speculator.attn_groups = [[ask]]
        try:
            return original()
        finally:
            speculator.block_tables, speculator.attn_groups = tables, groups
            step.close()

    def update_draft_decode_metadata(
        speculator: Any, attn_metadata: Any, num_reqs: int, *args: Any, **kwargs: Any
    ) -> Any:
        deferred = speculator.block_tables
        if isinstance(deferred, DeferredSlots) and deferred.step is not None:
            try:
                return deferred.step.run()
            except Exception as error:
                deferred.give_up()
                fell_back(error)
        updated = update(speculator, attn_metadata, num_reqs, *args, **kwargs)
        try:
            if v2_switch.of(host, speculator).fuses:
                mend_tails(speculator, attn_metadata, num_reqs)
        except Exception as error:
            fell_back(error)
        return updated

    hooked = {} if asks_groups else {UPDATE_STEP: update_draft_decode_metadata}
    return MappingProxyType({GENERATE: generate_fused_drafts, **hooked})


def slot_groups(tables: Any) -> SlotGroups:
    """The block tables of vLLM's `BlockTables`, one per KV-cache group, and its slot mappings. Copies no tensor."""
    return SlotGroups(
        [table.gpu for table in tables.block_tables],
        tables.block_table_ptrs,
        tables.block_table_strides,
        releases.slot_block_sizes(tables),
        releases.slots_enabled(tables),
        tables.slot_mappings,
    )


def _indexer_rows(builder: Any, metadata: Any, num_reqs: int) -> IndexerRows:
    decode, ratio = metadata.decode, releases.tokens_per_state(builder)
    states = releases.states_per_block(builder.kv_cache_spec) if ratio > 1 else 0
    return IndexerRows(
        decode.seq_lens.view(-1),
        tuple(getattr(decode, name) for name in releases.ones_of(decode)),
        decode.indices,
        releases.indexer_table(metadata)[:num_reqs],
        decode.block_table,
        PooledKeys(ratio, states, metadata.slot_mapping) if ratio > 1 else None,
    )


def _tail_rows(speculator: Any, group: Any, builder: Any, metadata: Any) -> TailRows:
    mapped = releases.mapped_table(group)
    table = speculator.block_tables.input_block_tables[group.kv_cache_group_id] if mapped is None else mapped[0]
    return TailRows(table, builder.kv_cache_spec.block_size, metadata.slot_mapping)


def mend_tails(speculator: Any, metadata: Mapping[str, Any], num_reqs: int) -> None:
    """Compute by vLLM's own code what its updates in place leave stale, in a draft that it fuses because of this adapter."""
    for group in releases.groups_of(speculator):
        builder = group.get_metadata_builder()
        if row_of(builder) is KPOOL_TAIL:
            tail = _tail_rows(speculator, group, builder, metadata[group.layer_names[0]])
            buffers, compute = speculator.input_buffers, pkgutil.resolve_name(TAIL_SLOTS.path)
            compute(
                tail.slots, tail.table, buffers.query_start_loc[: num_reqs + 1], buffers.positions, num_reqs, num_reqs,
                tail.ring, out=tail.slots,
            )  # fmt: skip


def as_captured(made: torch.Tensor, decode: Any) -> torch.Tensor:
    """`made`, a schedule, unless it has another shape than the one that was captured."""
    if made.shape != decode.schedule_metadata.shape:
        raise RuntimeError(f"a schedule of shape {tuple(made.shape)}, not {tuple(decode.schedule_metadata.shape)}")
    return made
