"""Drafts of Model Runner V2 whose CUDA graph is captured and replayed, as shipped and with this plugin.

A batch is put into the runner's buffers as vLLM leaves them before the draft steps, the speculator's own code runs the
steps, and what each step's model saw is compared with what it sees where vLLM rebuilds its metadata. On a CPU the graphs
are emulated.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from nsa_plugin.adapters.probe import installed_version
from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.adapters.vllm.v2 import step as v2_step
from nsa_plugin.adapters.vllm.v2 import unfused as v2_unfused
from nsa_plugin.core.errors import UnavailableError
from nsa_plugin.rigs.vllm.drafts import BLOCK_SIZE, LAYOUTS
from nsa_plugin.rigs.vllm.v2_draft import Draft, DraftModel, Graphs, Sizes, Speculator
from nsa_plugin.settings import Settings
from nsa_plugin.testing.watching import WatchedHost

STOCK, KEPT, IN_PLACE, ONE_KERNEL = "vllm shipped", "metadata kept", "vllm in place", "graph"
STEP_METHODS = (v2_step.GENERATE, v2_step.UPDATE_STEP)
"""Methods of the speculator that "graph" replaces and "vllm in place" leaves as they are."""
POISON = 7
BUFFERS = (
    "req_id_per_token_buffer", "decode_seq_lens_buffer", "decode_lens_buffer", "per_req_decode_lens_buffer",
    "expanded_block_table_buffer",
)  # fmt: skip
"""What builders keep from one batch to the next."""
Step = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """A batch as it is when its draft steps begin.

    Attributes
    ----------
    lengths : int32 tensor [requests of the batch], on the CPU
    rows : integer tensor [requests of the batch]
        Their slots in the runner's block table.
    table : int32 tensor [slots, blocks]
        The runner's block table.
    """

    lengths: torch.Tensor
    rows: torch.Tensor
    table: torch.Tensor


class _Model(DraftModel):
    """Writes down whole block tables; logits without a sync."""

    columns = 1 << 20

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Some logits."""
        return hidden[:, :128].float()


class _Captured(Graphs):
    """The decode graph, really captured where there is a GPU; what its steps saw is kept after each replay."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self.seen: list[dict[str, torch.Tensor]] = []
        self._static: list[dict[str, torch.Tensor]] = []
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self, record: bool) -> None:
        """Warm up and capture as vLLM does, each with fresh metadata; replays keep what was seen if `record`."""
        model = self._draft.model
        model.record = record
        model.seen.clear()
        self._metadata, self._slots = self.inputs()
        if self._draft.sizes.device.type == "cpu":
            self._static = model.seen
            return
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.body()
            self.body()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._metadata, self._slots = self.inputs()
        model.seen.clear()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.body()
        self._static = list(model.seen)

    def run_fullgraph(self, descriptor: Any) -> None:
        """Replay, and keep copies of what was seen."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._static.clear()
            self.body()
        self.seen += [{name: value.clone() for name, value in step.items()} for step in self._static]


class ReplayedDraft(Draft):
    """A speculator whose draft steps are replayed from a captured graph.

    Its methods are kept as they are when it is made.

    Parameters
    ----------
    layout : a key of `LAYOUTS`
    tokens : speculative tokens
    sizes : Sizes
    """

    def __init__(self, layout: str, tokens: int, sizes: Sizes) -> None:
        super().__init__(*LAYOUTS[layout], tokens, sizes, _Model, _Captured)
        for request in range(sizes.requests):
            self.tables.append_block_ids(request, ([1] * (sizes.model_len // BLOCK_SIZE),), True)
        self.tables.apply_staged_writes()
        self.keep_methods(*STEP_METHODS, v2_unfused.LOOP)

    def without_metadata(self) -> None:
        """Leave the metadata of the steps as it was captured, from the next capture on."""
        setattr(self.speculator, v2_step.UPDATE_STEP, lambda metadata, num_reqs: None)  # slots wait for it, for ever

    def capture(self, record: bool) -> None:
        """Capture; `record` what each step sees, or nothing, to be timed."""
        with set_current_vllm_config(self.config), torch.inference_mode():
            self.graphs.capture(record)

    @torch.inference_mode()
    def prepare(self, batch: Batch, poison: bool = False) -> None:
        """Leave the runner's buffers as vLLM leaves them before the draft steps; `poison` what builders have kept."""
        speculator, tables, size, device = self.speculator, self.tables, len(batch.lengths), self.sizes.device
        buffers = speculator.input_buffers
        if poison:
            tables.slot_mappings.fill_(POISON)
            for builder in self.builders:
                for name in vars(builder).keys() & set(BUFFERS):
                    vars(builder)[name].fill_(POISON)
        tables.block_tables[0].gpu.copy_(batch.table, non_blocking=True)
        speculator.idx_mapping.fill_(-1)
        speculator.idx_mapping[:size].copy_(batch.rows)
        tables.gather_block_tables(speculator.idx_mapping[:size], num_reqs_padded=self.sizes.captured)
        buffers.seq_lens.fill_(0)
        buffers.positions.fill_(0)
        buffers.seq_lens[:size].copy_(batch.lengths)
        buffers.positions[:size].copy_(batch.lengths - 1)
        starts = torch.arange(self.sizes.requests + 1, dtype=torch.int32, device=device)
        buffers.query_start_loc.copy_(starts.clamp_(max=size))

    @torch.inference_mode()
    def run(self, batch: Batch) -> None:
        """The draft steps of a batch that was prepared, by the speculator's own code."""
        speculator, size = self.speculator, self.sizes.captured
        steps = speculator._fused_multi_step_decode if self.fused else speculator._multi_step_decode
        descriptor = BatchExecutionDescriptor(CUDAGraphMode.FULL, size, size, 1)
        steps(len(batch.lengths), False, descriptor, None, batch.lengths, self.tokens)

    def steps(self, batch: Batch, poison: bool = True) -> Sequence[Step]:
        """What each of the `tokens` - 1 steps of a batch sees, every captured row; it was captured to record."""
        self.graphs.seen.clear()
        self.prepare(batch, poison)
        self.run(batch)
        seen: list[Step] = list(self.graphs.seen)
        if len(seen) != self.tokens - 1:
            raise RuntimeError(f"expected {self.tokens - 1} draft steps to be seen, got {len(seen)}")
        return seen


class Comparison:
    """What differs between two drafts, summed up over batches without a sync.

    Attributes
    ----------
    compared : entries of each field
    """

    def __init__(self) -> None:
        self.compared: Counter[str] = Counter()
        self._unequal: dict[str, torch.Tensor] = {}
        self._moved: list[torch.Tensor] = []

    def add(self, want: Sequence[Step], have: Sequence[Step], live: int | None = None) -> None:
        """Compare the steps of one batch: `live` rows, or padding too.

        DeepGEMM's schedule is one for all rows, and padding grows where metadata stays in place: with fewer rows it is
        left out.
        """
        if len(want) > 1:
            self._moved.append((want[0]["positions"] != want[-1]["positions"]).any())
        for expected, got in zip(want, have, strict=True):
            if expected.keys() != got.keys():
                raise RuntimeError(f"expected a step to see {sorted(expected)}, got {sorted(got)}")
            for name, value in expected.items():
                if name == "schedule" and live is not None and live < len(expected["positions"]):
                    continue
                unequal = (value[:live] != got[name][:live]).sum()
                self._unequal[name] = self._unequal.get(name, 0) + unequal
                self.compared[name] += value[:live].numel()

    @property
    def different(self) -> dict[str, int]:
        """Entries of each field that differ, if any.

        Raises
        ------
        RuntimeError
            Nothing was compared, or steps that are all the same.
        """
        if not self.compared or (self._moved and not any(bool(moved) for moved in self._moved)):
            raise RuntimeError("the draft steps did not differ: nothing was compared")
        return {name: int(count) for name, count in self._unequal.items() if int(count)}


@contextlib.contextmanager
def ways(layout: str, tokens: int, sizes: Sizes, verify: int = 0) -> Iterator[dict[str, ReplayedDraft]]:
    """Drafts to compare, not captured yet: as shipped, unfused, with FlashMLA-sparse's hook alone, and with all that is installed.

    vLLM has this package's patches until the end. The last verifies every `verify`-th draft, if that is not 0; drafts that
    are not fused are then left out, because they would be as shipped.

    Raises
    ------
    UnavailableError
        vLLM is too old or cannot be patched, an update could not be had, or a verification found a difference.
    """
    if absent := [name for name in STEP_METHODS if not hasattr(Speculator, name)]:
        raise UnavailableError(
            f"looked for the speculator of vLLM 0.32 and later, found vLLM {installed_version('vllm')} without "
            f"{', '.join(absent)}"
        )
    host, adapter = WatchedHost(Settings(verify=verify)), VllmAdapter()
    shipped, kept = ReplayedDraft(layout, tokens, sizes), ReplayedDraft(layout, tokens, sizes)  # neither is fused
    try:
        if problems := adapter.install(host):
            raise UnavailableError("; ".join(problems))
        delattr(kept.speculator, v2_unfused.LOOP)  # its class has what is installed
        in_place, drafts = ReplayedDraft(layout, tokens, sizes), {STOCK: shipped, **({} if verify else {KEPT: kept})}
        for name in STEP_METHODS:
            setattr(
                in_place.speculator, name, MethodType(getattr(shipped.speculator, name).__func__, in_place.speculator)
            )
        drafts |= {IN_PLACE: in_place, ONE_KERNEL: ReplayedDraft(layout, tokens, sizes)}
        if {name for name, draft in drafts.items() if draft.fused} != {IN_PLACE, ONE_KERNEL}:
            raise UnavailableError(f"expected a draft in one graph with the plugin only; it serves {host.served}")
        yield drafts
        if host.fallbacks or (v2_step.PATH, "copy" if verify else "graph") not in host.served:
            raise UnavailableError(f"the one kernel could not be had: {host.served}, {dict(host.fallbacks)}")
        if not verify and tokens > 2 and (v2_unfused.PATH, "copy") not in host.served:
            raise UnavailableError(f"metadata could not be kept: {host.served}")
        if host.mismatches:
            raise UnavailableError(f"a verification found a difference: {dict(host.mismatches)}")
    finally:
        adapter.undo()
