"""Model Runner V2's draft of a model with pooled index keys, as Hopper has it: three attention groups, two KV-cache groups.

FlashInfer's sparse MLA for Hopper, an indexer whose cache has one state for `ratio` tokens, and the tail: a ring of blocks, one
per request. The builders are vLLM's own. FlashInfer's planner, which is compiled, has a stand-in: it cuts rows into work items
as FlashInfer does, and puts them where vLLM's kernel, which is the real one, clamps them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backends.mla import indexer
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, MLAAttentionSpec, UniformTypeKVCacheSpecs
from vllm.v1.worker.gpu.block_table import BlockTables

from nsa_plugin.rigs.vllm.v2_draft import DRAFT, TARGET, Draft, DraftModel, Graphs, Layer, Sizes

SM90 = "vllm.v1.attention.backends.mla.flashinfer_mla_sparse_sm90"
TAIL = "model.layers.2.mtp_block.self_attn.indexer.tail_cache"
TARGET_TAIL = "model.layers.0.self_attn.indexer.tail_cache"
TOKENS_PER_ITEM = 48
CAPACITY = 512
"""Work items that the stand-in has room for."""
SIZES = Sizes()


@dataclass(frozen=True)
class Pools:
    """How index keys are pooled.

    Attributes
    ----------
    ratio : int
        Tokens per state, `index_kpool`.
    block_size : int
        Tokens per block of the KV-cache manager. Above 64 x `ratio` the indexer has kernel blocks, which are smaller.
    ring : int
        Tokens per block of the tail.
    """

    ratio: int = 4
    block_size: int = 256
    ring: int = 8


class Planner:
    """Stands for `flashinfer.mla.BatchMLAPagedAttentionWrapper`, as far as vLLM's builder looks at it."""

    def __init__(self, workspace: torch.Tensor, *, kv_indptr: torch.Tensor, **buffers: Any) -> None:
        self._kv_indptr = kv_indptr
        words = torch.zeros(8 * CAPACITY, dtype=torch.int32)
        self._planned_backend = SimpleNamespace(_int_workspace_buffer=words.view(torch.uint8))
        self.words, self.plans, self._plan_info = words, 0, [0] * 18

    def plan(
        self, qo_indptr: torch.Tensor, kv_indptr: torch.Tensor, indices: Any, lengths: torch.Tensor, *more: Any, **named: Any
    ) -> None:  # fmt: skip
        """Work items of at most `TOKENS_PER_ITEM` tokens, for each row with a query."""
        self.plans += 1
        self._kv_indptr.copy_(kv_indptr)
        rows = int(qo_indptr[-1])
        items = [
            (row, start, min(start + TOKENS_PER_ITEM, int(lengths[row])))
            for row in range(rows)
            for start in range(0, int(lengths[row]), TOKENS_PER_ITEM)
        ]
        info = self._plan_info = [0] * 18
        module = sys.modules[SM90]
        places = (module._PI_Q_INDPTR, module._PI_KV_START, module._PI_KV_END)
        info[module._PI_NUM_BLKS_Y] = 1 + rows  # it depends on the rows, as FlashInfer's does
        info[module._PI_WORK_INDPTR], info[module._PI_KV_INDPTR] = 4 * 7 * CAPACITY, 4 * CAPACITY
        for number, place in enumerate(places):
            at = number * (2 if number else 1) * CAPACITY
            info[place] = 4 * at
            self.words[at : at + len(items)] = torch.tensor([item[number] for item in items], dtype=torch.int32)
        self.words[7 * CAPACITY + 1 + rows] = len(items)

    def covered(self, rows: int) -> torch.Tensor:
        """Tokens that the work items of each row take in: int64 [rows]."""
        count = int(self.words[7 * CAPACITY + self._plan_info[sys.modules[SM90]._PI_NUM_BLKS_Y]])
        row, start, end = (self.words[at * CAPACITY : at * CAPACITY + count].long() for at in (0, 2, 4))
        covered = torch.zeros(CAPACITY, dtype=torch.int64).index_add_(0, row, end - start)
        return covered[:rows]


class _NoCapture:
    """`torch` for a module that asks whether a stream is captured, which a build without CUDA can't say."""

    cuda = SimpleNamespace(is_current_stream_capturing=lambda: False)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def sm90() -> ModuleType:
    """vLLM's module of the backend, with the stand-in for FlashInfer where that is not installed."""
    absent = importlib.util.find_spec("flashinfer") is None
    fake = (
        {name: mock.MagicMock() for name in ("flashinfer", "flashinfer.decode", "flashinfer.utils")} if absent else {}
    )
    with mock.patch.dict(sys.modules, fake):
        module = importlib.import_module(SM90)
    sys.modules[SM90] = module
    if not torch.cuda.is_available():
        module.torch = _NoCapture()  # type: ignore[attr-defined]
    return module


class PooledModel(DraftModel):
    """Writes down the tail's slots and what the plan covers, too."""

    def forward(self, input_ids: Any, positions: Any, hidden_states: Any, inputs_embeds: Any = None) -> Any:
        """Record one step."""
        made = super().forward(input_ids, positions, hidden_states, inputs_embeds)
        metadata = get_forward_context().attn_metadata
        rows = positions.shape[0]
        if self.record:
            self.seen[-1]["tail slots"] = metadata[TAIL].slot_mapping.clone()
            state = getattr(metadata[DRAFT[0]], "state", None)
            if state is not None:
                self.seen[-1]["planned tokens"] = state.wrapper.covered(rows)
        return made


class PooledDraft(Draft):
    """A speculator over a tiny model with pooled index keys.

    Parameters
    ----------
    tokens : speculative tokens
    pools : Pools
    sizes, graphs : as in `Draft`
    attention : backend of the draft's attention layer; FlashInfer's for Hopper without one
    """

    layers = (*DRAFT, TAIL)

    def __init__(
        self,
        tokens: int,
        pools: Pools = Pools(),
        sizes: Sizes = SIZES,
        graphs: type[Graphs] = Graphs,
        attention: Any = None,
    ) -> None:
        self.pools = pools
        self._backend = sm90()
        planners = ModuleType("flashinfer.mla")
        planners.BatchMLAPagedAttentionWrapper = Planner  # type: ignore[attr-defined]
        parent = sys.modules.get("flashinfer") or ModuleType("flashinfer")
        with mock.patch.dict(sys.modules, {"flashinfer": parent, "flashinfer.mla": planners}):
            super().__init__("auto", 4, tokens, sizes, PooledModel, graphs, attention)
        self.warm_up()  # as vLLM does before it captures

    def lay_out(self, layers: dict[str, Any]) -> KVCacheConfig:
        """Two KV-cache groups: attention and indexer, and the tail."""
        from vllm.v1.kv_cache_interface import CircularBufferSpec  # not in 0.28

        pools, module = self.pools, self._backend
        text = self.config.model_config.hf_text_config
        text.index_kpool = pools.ratio
        common = {"block_size": pools.block_size, "num_kv_heads": 1}
        specs = (
            MLAAttentionSpec(**common, head_size=576, dtype=torch.bfloat16),
            MLAAttentionSpec(**common, head_size=132, dtype=torch.uint8, tokens_per_state=pools.ratio),
            CircularBufferSpec(
                block_size=pools.ring, num_kv_heads=2, head_size=128, head_size_v=0, dtype=torch.bfloat16, dcp_sharded=False
            ),
        )  # fmt: skip
        backends = (module.FlashInferMLASparseSM90Backend, indexer.Glm5NextIndexerBackend, indexer.KpoolTailBackend)
        for names in ((*TARGET, TARGET_TAIL), self.layers):
            for name, backend, spec in zip(names, backends, specs, strict=True):
                layers[name] = Layer(backend, spec)
            layers[names[0]].impl = self._implementation(text.index_topk + pools.ratio)
        every = [*TARGET, *DRAFT]
        group = UniformTypeKVCacheSpecs(
            block_size=pools.block_size, kv_cache_specs={name: layers[name]._spec for name in every}
        )
        tails = [TARGET_TAIL, TAIL]
        groups = [KVCacheGroupSpec(every, group), KVCacheGroupSpec(tails, specs[2])]
        return KVCacheConfig(num_blocks=512, kv_cache_tensors=[], kv_cache_groups=groups)

    def _implementation(self, width: int) -> Any:
        made = object.__new__(self._backend.FlashInferMLASparseSM90Impl)
        made.num_heads, made.kv_lora_rank, made.qk_rope_head_dim, made.scale = Layer.num_heads, 512, 64, 1.0
        made.topk_indices_buffer = torch.zeros(1, width, dtype=torch.int32)
        return made

    def make_tables(self) -> BlockTables:
        """The tail has one block per request, and no slots of the usual kind."""
        sizes, pools = self.sizes, self.pools
        blocks = [-(-sizes.model_len // pools.block_size), 1]
        return BlockTables(
            [pools.block_size, pools.ring], sizes.requests, sizes.tokens, blocks, sizes.device,
            slot_mapping_enabled=[True, False],
        )  # fmt: skip

    def block_ids(self, request: int, first_block: int) -> tuple[list[int], ...]:
        """The blocks of a request in both groups."""
        width = self.tables.block_tables[0].gpu.shape[1]
        return [first_block + request * 16 + block for block in range(width)], [first_block + request]

    @property
    def planner(self) -> Planner:
        """Of the draft's attention."""
        (builder,) = (builder for builder in self.builders if hasattr(builder, "state"))
        found: Planner = builder.state.wrapper
        return found

    @property
    def tail_builder(self) -> Any:
        """The metadata builder of the draft's tail."""
        (builder,) = (each for each in self.builders if isinstance(each, indexer.KpoolTailMetadataBuilder))
        return builder
