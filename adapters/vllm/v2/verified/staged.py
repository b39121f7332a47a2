"""Runs only where drafts are verified: the metadata of every step of a fused draft, in rows of this module's own.

With NSA_PLUGIN_VERIFY_MODE=graph these rows are where each step copies to what it reads; `afterwards` compares them. Otherwise
the metadata is there before the draft begins.

What a CUDA graph computes can't be repaired before it is used, and a rank that left the graph alone would leave the
others waiting in custom all-reduces, whose buffers in a graph are not those of eager code. With NSA_PLUGIN_VERIFY the
graph therefore computes no metadata: before each replay the same kernel as ever, once per step, writes that of all steps
into rows of this module's own, and what the graph records at each step is a copy of its row (strategy `copy`). Every n-th
time vLLM's own code computes the same into spare buffers. On a difference its values take the place of ours in those rows,
and from then on vLLM's own code fills them: replays, and what ranks say to each other, stay as they were captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch

from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.verification import Described
from nsa_plugin.adapters.vllm.builders import changes_of
from nsa_plugin.adapters.vllm.deep_gemm import scheduler
from nsa_plugin.adapters.vllm.describe import DraftBatch, describe_draft, positions_geometry
from nsa_plugin.adapters.vllm.rebuilds import live_blocks
from nsa_plugin.adapters.vllm.releases import groups_of, tokens_per_state
from nsa_plugin.adapters.vllm.v2.step import Uncovered, slot_groups
from nsa_plugin.adapters.vllm.v2.verified.rebuild import Draft, Rebuild
from nsa_plugin.adapters.vllm.v2.verified.rows import Arena, Expected, Field, StagedGroup
from nsa_plugin.core.batch import PAD_SLOT
from nsa_plugin.core.draft_steps import DraftLimits, PastEnd
from nsa_plugin.core.metadata import same_buffer
from nsa_plugin.core.step_update import DraftRows, IndexerRows, StepUpdate


class Staged:
    """The metadata of every step of a draft of a size, in rows of its own.

    Parameters
    ----------
    speculator : TargetDependentARSpeculator
    metadata : mapping of layer name to the metadata that its group's builder made
    num_reqs : int
        Requests, padding included; each has one query token.
    arena : Arena
    rebuild : callable
        Makes the `Rebuild` for these groups.
    host : Host
        Makes the updates of the steps.

    Raises
    ------
    Uncovered
        Something that is not known; the message says what.
    """

    def __init__(
        self,
        speculator: Any,
        metadata: Mapping[str, Any],
        num_reqs: int,
        arena: Arena,
        rebuild: Callable[[list[Any]], Rebuild],
        host: Host,
    ) -> None:
        if not speculator.advance_draft_positions:
            raise Uncovered("a draft that stays at one position")
        self._speculator, self._n, self._arena = speculator, num_reqs, arena
        self._steps = speculator.num_speculative_steps - 1
        self._most = max(speculator.max_num_reqs, num_reqs)
        self._others: list[Callable[[], None]] = []
        self.groups: list[StagedGroup] = []
        tables = speculator.block_tables
        self._limit = speculator.max_model_len
        self._positions = self._take("positions", torch.int64)
        self._seq_lens = self._take("seq_lens", torch.int32)
        self._ahead = arena.numbers(self._steps)[:, None]
        self._slots = arena.take("slots", (self._steps, *tables.slot_mappings.shape), torch.int64)
        self._slot_target = tables.slot_mappings
        request_maps, indexers = [], []
        for group in groups_of(speculator):
            builder, own = group.get_metadata_builder(), metadata[group.layer_names[0]]
            kind = changes_of(builder, own, num_reqs, "update", host)
            if kind in ("tail slots", "request map and plan") or (
                kind == "lengths and schedule" and tokens_per_state(builder) > 1
            ):
                raise Uncovered(f"{type(builder).__name__}: drafts with pooled index keys are not verified")
            if kind == "request map":
                request_maps.append(self._stage_request_map(group, own))
            elif kind == "lengths and schedule":
                indexers.append(self._stage_indexer(group, own, builder))
            else:
                self._others.append(lambda group=group: group.update_draft_decode_metadata(metadata))  # type: ignore[misc]
        if not self.groups:
            raise Uncovered("no attention group that this update knows")
        self._bound, self._host = (request_maps, indexers), host
        self._rebuild = rebuild([staged.group for staged in self.groups])

    @cached_property
    def _updates(self) -> list[StepUpdate]:
        """What writes the rows of each step."""
        request_maps, indexers = self._bound
        buffers, shared = self._speculator.input_buffers, slot_groups(self._speculator.block_tables)
        updates = []
        for step in range(self._steps):
            rows = DraftRows(
                self._n,
                self._positions[step],
                self._seq_lens[step],
                buffers.query_start_loc,
                self._speculator.idx_mapping,
            )
            slots = replace(shared, slot_mapping=self._slots[step])
            maps, of_step = (request_maps, 0) if step == 0 else ([], step)
            updates.append(self._host.step_update(rows, slots, maps, [indexer(of_step) for indexer in indexers]))
        return updates

    def _take(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return self._arena.take(name, (self._steps, self._most), dtype)[:, : self._n]

    def _once(self, name: str) -> torch.Tensor:
        return self._arena.take(name, (self._most,))[: self._n]

    def _stage_request_map(self, group: Any, own: Any) -> torch.Tensor:
        row = self._once(f"{len(self.groups)} request map")
        field = Field(type(own).__name__, "req_id_per_token", [row] * self._steps, own.req_id_per_token[: self._n])
        self.groups.append(StagedGroup(group, [field]))
        return row

    def _stage_indexer(self, group: Any, own: Any, builder: Any) -> Callable[[int], IndexerRows]:
        n, steps, decode, number = self._n, self._steps, own.decode, len(self.groups)
        lengths = self._take(f"{number} lengths", torch.int32)
        fields: list[Field] = []
        once: dict[str, torch.Tensor] = {}

        def stage(leaf: str, rows: list[torch.Tensor], target: torch.Tensor) -> None:
            fields.append(Field(type(own).__name__, f"decode.{leaf}", rows, target))

        stage("seq_lens", list(lengths), decode.seq_lens.view(-1))
        for leaf in ("decode_lens", "per_req_decode_lens", "indices"):
            if (target := getattr(decode, leaf)) is not None:
                once[leaf] = self._once(f"{number} {leaf}")
                stage(leaf, [once[leaf]] * steps, target[:n])
        source = table = own.block_table[:n]
        if not same_buffer(source, decode.block_table):
            table = self._arena.take(f"{number} table", (self._most, source.shape[1]))[:n]
            stage("block_table", [table] * steps, decode.block_table[:n])
        schedule = scheduler(builder)
        if schedule is not None:
            shape = tuple(decode.schedule_metadata.shape)
            rows = self._arena.take(f"{number} schedule {shape}", (steps, *shape))
            stage("schedule_metadata", list(rows), decode.schedule_metadata)
        self.groups.append(StagedGroup(group, fields, schedule))

        def of_step(step: int) -> IndexerRows:
            ones = tuple(once[leaf] for leaf in ("decode_lens", "per_req_decode_lens") if leaf in once)
            return IndexerRows(lengths[step], ones, once.get("indices"), source, source if step else table)

        return of_step

    def recorded(self, metadata: Mapping[str, Any]) -> RecordedStep:
        """What a draft with this metadata runs at the start of each step."""
        copies: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        for step in range(self._steps):
            width = self._n if step else self._slots.shape[-1]  # padding stays
            pairs = [(self._slot_target[:, :width], self._slots[step][:, :width])]
            for staged in self.groups:
                pairs += [(field.target, field.rows[step]) for field in staged.fields if step == 0 or not field.once]
            copies.append(pairs)
        return RecordedStep(copies, self._others)

    def keep(self, step: int, metadata: Mapping[str, Any]) -> None:
        """Copy what a step reads from where it reads it. Capture-safe."""
        width = self._n if step else self._slots.shape[-1]
        self._slots[step][:, :width].copy_(self._slot_target[:, :width])
        self._fill(step, metadata)

    def _fill(self, step: int, metadata: Mapping[str, Any]) -> None:
        """Copy the fields of all groups into the rows of a step."""
        for staged in self.groups:
            for field in staged.fields:
                field.rows[step].copy_(field.read(staged.own(metadata)))

    def prepare(self, draft: Draft) -> None:
        """Write the metadata of every step of the draft that begins: this plugin's.

        vLLM maps the batch's block tables to kernel blocks right before the replay only: here it is asked to do so now.
        """
        buffers, n = self._speculator.input_buffers, self._n
        tables = self._speculator.block_tables.input_block_tables
        for group in groups_of(self._speculator):
            group.map_to_kernel_block_table(tables[group.kv_cache_group_id])
        torch.add(buffers.positions[:n], self._ahead, out=self._positions).clamp_(max=self._limit - 1)
        torch.add(buffers.seq_lens[:n], self._ahead, out=self._seq_lens).clamp_(max=self._limit)
        for update in self._updates[: draft.steps]:
            update.run(first=True)
        for staged in self.groups:
            for step in range(draft.steps if staged.schedule is not None else 0):
                row, made = self._row(staged, "schedule_metadata", step), self._schedule(staged, step)
                if made.shape != row.shape:
                    raise RuntimeError(f"a schedule of shape {tuple(made.shape)}, not {tuple(row.shape)}")
                row.copy_(made)

    def prepare_natively(self, draft: Draft) -> None:
        """The same: vLLM's own."""
        for step, (metadata, slots, _) in enumerate(self._rebuild.steps(draft)):
            self._slots[step].copy_(slots)
            self._fill(step, metadata)

    def described(self, draft: Draft) -> Described:
        """The draft as `Mismatch` has it."""
        speculator, first = self._speculator, self.groups[0]
        buffers, tables, group = speculator.input_buffers, speculator.block_tables, first.group.kv_cache_group_id
        batch = describe_draft(DraftBatch(buffers, tables, draft.num_reqs, draft.steps, group))
        topk = getattr(first.group.get_metadata_builder(), "topk_tokens", None)
        geometry = positions_geometry(batch, self._limit, first.block_size, topk)
        return batch, geometry, DraftLimits(self._limit, PastEnd.CLAMP, PAD_SLOT)

    def expected(self, draft: Draft) -> Iterator[Expected]:
        """vLLM's own values of each step; gone at the next, unless they are kept."""
        for metadata, slots, lengths in self._rebuild.steps(draft):
            fields = [[field.read(staged.own(metadata)) for field in staged.fields] for staged in self.groups]
            yield Expected(slots, lengths, fields)

    def differences(
        self, draft: Draft, values: Iterable[Expected] | None = None
    ) -> Iterator[tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
        """Of each step its index, and what is defined: vLLM's own values, and those that are there.

        `values` are those of vLLM if they were kept: without them it computes them now.
        """
        n = draft.num_reqs
        for step, own in enumerate(self.expected(draft) if values is None else values):
            expected: dict[str, torch.Tensor] = {}
            got: dict[str, torch.Tensor] = {}
            for group, (want, have) in enumerate(zip(own.slots, self._slots[step], strict=True)):
                name = f"slot_mapping.{group}" if group else "slot_mapping"
                expected[name], got[name] = want[:n].clone(), have[:n].clone()
                expected[f"{name}.padding"], got[f"{name}.padding"] = (
                    want[n : draft.rows].clone(),
                    have[n : draft.rows].clone(),
                )
            for number, (staged, fields) in enumerate(zip(self.groups, own.fields, strict=True)):
                for field, want in zip(staged.fields, fields, strict=True):
                    name = f"{field.kind}.{field.path}"
                    name = name if name not in expected else f"{number}.{name}"
                    pair = self._defined(staged, field, step, want, own.lengths[:n])
                    expected[name], got[name] = (value.clone() for value in pair)
            yield step, expected, got

    def _defined(
        self, staged: StagedGroup, field: Field, step: int, want: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is defined of vLLM's own value of a field and of the one that is there.

        Lengths of padding are not: vLLM's rebuild gives it none, its update in place lets it grow. A schedule counts
        padding too, so that of a padded batch is vLLM's own for the lengths which are there behind the live ones.
        """
        have, live = field.rows[step], lengths.numel()
        if field.leaf == "block_table":
            return live_blocks(want, lengths, staged.block_size), live_blocks(have, lengths, staged.block_size)
        if field.leaf != "schedule_metadata":
            return want[:live], have[:live]
        if live < self._n:
            rows = self._row(staged, "seq_lens", step).clone()
            rows[:live] = lengths
            want = self._schedule(staged, step, rows)
        return want, have

    def _row(self, staged: StagedGroup, leaf: str, step: int) -> torch.Tensor:
        return next(field.rows[step] for field in staged.fields if field.leaf == leaf)

    def _schedule(self, staged: StagedGroup, step: int, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """DeepGEMM's, for a step's lengths or others."""
        assert staged.schedule is not None
        rows = self._row(staged, "seq_lens", step) if lengths is None else lengths
        indices = next((field.rows[step] for field in staged.fields if field.leaf == "indices"), None)
        return staged.schedule(SimpleNamespace(seq_lens=rows.unsqueeze(-1), indices=indices))


class RecordedStep:
    """What the fused draft runs, or records, instead of computing: copies of what is there already."""

    strategy = "copy"

    def __init__(self, copies: list[list[tuple[torch.Tensor, torch.Tensor]]], others: list[Callable[[], None]]) -> None:
        self._copies = [
            [[list(side) for side in zip(*same, strict=True)] for same in _by_dtype(pairs)] for pairs in copies
        ]
        self._others, self._next = others, 0

    def run(self) -> None:
        """Bring the metadata of the step that begins now to where it is read."""
        for targets, sources in self._copies[self._next]:
            torch._foreach_copy_(targets, sources)
        self._next += 1
        for update in self._others:
            update()

    def close(self) -> None:
        """The draft is over; nothing was put in place of what was captured."""


def _by_dtype(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """One launch each."""
    kinds = {target.dtype for target, _ in pairs}
    return [[pair for pair in pairs if pair[0].dtype == kind] for kind in sorted(kinds, key=str)]
