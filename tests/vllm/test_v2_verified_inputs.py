"""What verified drafts are prepared from is this batch's: any block size, several KV-cache groups, sizes in random order."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, UniformTypeKVCacheSpecs
from vllm.v1.worker.gpu.attn_utils import init_attn_backend
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch

from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.host import Host
from nsa_plugin.rigs.vllm.v2_draft import DRAFT, TARGET, Draft, DraftModel, Graphs, Sizes

Step = dict[str, torch.Tensor]
Install = Callable[..., tuple[Host, VllmAdapter]]
LENGTH, REQUESTS, POISON = 1024, 8, 3
SIZES = Sizes(captured=4, model_len=LENGTH, requests=REQUESTS, tokens=256)
CAPTURED = (4, 2, 1)
GROUPS = {
    1: ((*TARGET, *DRAFT),),
    2: ((*TARGET, DRAFT[0]), (DRAFT[1],)),
    3: (TARGET, (DRAFT[0],), (DRAFT[1],)),
}
"""Layers of each KV-cache group, by how many there are."""
pytestmark = pytest.mark.usefixtures("hopper")


class WholeTable(DraftModel):
    """Writes down all of a block table that the longest batch could reach."""

    columns = LENGTH // 64


class SeveralGraphs(Graphs):
    """Stands for the decode CUDA-graph manager: the metadata of each captured size is built once and kept."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._captured: dict[int, Any] = {}

    def capture(self) -> None:
        """Build what every size reads, and warm it up as vLLM does."""
        for size in CAPTURED:
            self._captured[size] = self.inputs(size)
            self._run(size)

    def dispatch(self, num_reqs: int, num_tokens: int, uniform_token_count: Any = None, **_: Any) -> Any:
        """The smallest size that holds the batch, if there is one."""
        for size in sorted(CAPTURED):
            if num_reqs <= size:
                return BatchExecutionDescriptor(CUDAGraphMode.FULL, size, size, 1)
        return BatchExecutionDescriptor(CUDAGraphMode.NONE, num_tokens, num_reqs)

    def run_fullgraph(self, descriptor: Any) -> None:
        """What the captured graph does."""
        self._run(descriptor.num_reqs)

    def _run(self, size: int) -> None:
        speculator = self._draft.speculator
        run = speculator._generate_fused_drafts if self._draft.fused else speculator._generate_draft
        run(size, size, *self._captured[size], None, CUDAGraphMode.NONE, speculator.num_speculative_steps)


class GroupedDraft(Draft):
    """A draft over KV-cache groups of any block size."""

    def __init__(self, tokens: int, block_sizes: tuple[int, ...]) -> None:
        super().__init__("auto", 4, tokens, SIZES, WholeTable, SeveralGraphs)
        layers = self.config.compilation_config.static_forward_context
        groups = []
        for names, block_size in zip(GROUPS[len(block_sizes)], block_sizes, strict=True):
            for name in names:
                layers[name]._spec = dataclasses.replace(layers[name]._spec, block_size=block_size)
            specs = UniformTypeKVCacheSpecs(
                block_size=block_size, kv_cache_specs={name: layers[name]._spec for name in names}
            )
            groups.append(KVCacheGroupSpec(list(names), specs))
        self.block_sizes = block_sizes
        with set_current_vllm_config(self.config):
            self.cache = KVCacheConfig(num_blocks=512, kv_cache_tensors=[], kv_cache_groups=groups)
            self.groups, _, _ = init_attn_backend(self.cache, self.config, SIZES.device)
            widths = [LENGTH // size for size in block_sizes]
            self.tables = BlockTables(list(block_sizes), REQUESTS, SIZES.tokens, widths, SIZES.device)
            self.speculator.set_attn(None, self.cache, self.tables, self.buffers, self.groups)
            self.graphs.capture()

    def draft(self, rows: list[int], lengths: list[int], first_block: int) -> list[Step]:
        """Draft for requests of these lengths, whose blocks start at `first_block`, from poisoned buffers."""
        for row in rows:
            blocks = tuple(
                [1 + (first_block + 16 * row + 5 * group + block) % 500 for block in range(LENGTH // size)]
                for group, size in enumerate(self.block_sizes)
            )
            self.tables.append_block_ids(row, blocks, True)
        self.tables.apply_staged_writes()
        size, width = len(rows), self.tokens + 1
        batch = InputBatch.make_dummy(size, size * width, self.buffers, max_query_len=width)
        batch.is_padding.fill_(False)
        batch.idx_mapping = torch.tensor(rows, dtype=torch.int64)
        self.buffers.seq_lens.zero_()
        self.buffers.seq_lens[:size] = torch.tensor(lengths, dtype=torch.int32)
        self.buffers.positions[: size * width] = torch.cat([torch.arange(end - width, end) for end in lengths])
        batch.seq_lens_cpu_upper_bound = torch.tensor(lengths, dtype=torch.int32)
        self.tables.gather_block_tables(batch.idx_mapping, num_reqs_padded=size)
        self._poison()
        metadata = dict.fromkeys(DRAFT)
        self.speculator.model.seen.clear()
        self.speculator.model.record = False  # the first token comes with the target's metadata
        prefill = self.speculator._prefill

        def first(*args: Any, **kwargs: Any) -> None:
            prefill(*args, **kwargs)
            self.speculator.model.record = True

        zeros = [torch.zeros(REQUESTS, dtype=dtype) for dtype in (torch.int64, torch.int32, torch.float32, torch.int64)]
        self.speculator._prefill = first
        try:
            with set_current_vllm_config(self.config), torch.inference_mode():
                self.speculator.propose(
                    batch, metadata, {}, torch.zeros(size * width, 128).bfloat16(), None,
                    torch.full((size,), width, dtype=torch.int32), torch.zeros(size, dtype=torch.int32), *zeros,
                )  # fmt: skip
        finally:
            del self.speculator._prefill
        return [{name: value[:size] for name, value in step.items()} for step in self.speculator.model.seen]

    def _poison(self) -> None:
        self.tables.slot_mappings.fill_(POISON)
        for builder in self.builders:
            for name, value in vars(builder).items():
                if name.endswith("_buffer") and not name.startswith(("arange", "offsets")):
                    value.fill_(POISON)
        for group in (group for groups in self.speculator.attn_groups for group in groups):
            if group.kernel_block_table is not None:
                group.kernel_block_table.fill_(POISON)


def batches(seed: int) -> list[tuple[list[int], list[int], int]]:
    """Of every captured size, padded, too large for any; the same requests with other blocks, and in another order."""
    rng = random.Random(seed)
    made = []
    for size in (6, 4, 4, *rng.sample([1, 2, 3, 4, 5], 5)):
        rows = rng.sample(range(REQUESTS), size)
        made.append(
            (rows, [rng.choice([rng.randint(12, 1023), 64 * rng.randint(1, 15)]) for _ in rows], rng.randint(0, 400))
        )
    return made


def live(step: Step) -> Step:
    """A step without what nobody reads: blocks past a length, and schedules, which count padding."""
    clean = {name: value for name, value in step.items() if name != "schedule"}
    for name in ("blocks", "indexer blocks"):
        width = step[name].shape[1]  # of the manager's blocks, or mapped to those of the kernel
        reached = torch.arange(width)[None] * (LENGTH // width) < step["lengths"][:, None]
        clean[name] = torch.where(reached, step[name], -1)
    return clean


LAYOUTS = [(64,), (256, 64), (256, 128, 128)]
"""Tokens per block of each KV-cache group: those of the kernel, and those that are mapped to them."""


@pytest.mark.parametrize("block_sizes", LAYOUTS, ids=str)
def test_every_value_is_a_rebuilds_and_nothing_is_reported(install: Install, block_sizes: tuple[int, ...]) -> None:
    tokens = 3 + len(block_sizes)  # 5 tokens and more make the indexer flatten
    stock = GroupedDraft(tokens, block_sizes)
    assert not stock.fused
    todo = batches(sum(block_sizes) + len(block_sizes))
    expected = [[live(step) for step in stock.draft(*batch)] for batch in todo]
    for every in (0, 1, 3):
        host, adapter = install(verify=every)
        ours = GroupedDraft(tokens, block_sizes)
        assert ours.fused
        for number, batch in enumerate(todo):
            got = [live(step) for step in ours.draft(*batch)]
            assert len(got) == len(expected[number]) == tokens - 1
            for step, (want, have) in enumerate(zip(expected[number], got, strict=True)):
                wrong = [name for name in want if not torch.equal(want[name], have[name])]
                assert not wrong, f"NSA_PLUGIN_VERIFY={every}, batch {number}, step {step}: {wrong}"
        assert host.on and not host.mismatches and not host.fallbacks
        adapter.undo()
