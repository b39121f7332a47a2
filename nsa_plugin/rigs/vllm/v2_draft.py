"""Model Runner V2's draft without a worker: real MTPSpeculator, BlockTables, metadata builders and Triton kernels.

The draft model is a stand-in that writes down the metadata that each draft step hands it. CUDA graphs are emulated: the
metadata of the captured batch is built once, frozen, and every replay runs the captured Python body with it, so that
only updates in place can make it right.
"""

from __future__ import annotations

import inspect
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed.parallel_state import (
    ensure_model_parallel_initialized,
    init_distributed_environment,
    model_parallel_is_initialized,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backends.mla import flashmla_sparse, indexer
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, MLAAttentionSpec, UniformTypeKVCacheSpecs
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer, init_attn_backend
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.spec_decode.mtp.speculator import MTPSpeculator

from nsa_plugin.adapters.vllm.v2.updates import METHOD
from nsa_plugin.rigs.models import TINY_DSV3, TINY_DSV32
from nsa_plugin.rigs.vllm.drafts import ATTENTION, BLOCK_SIZE, INDEXER, tiny_config
from nsa_plugin.rigs.vllm.stand_ins import without_compiled_flashmla

CPU = torch.device("cpu")
CAPTURED = 4
TARGET = ("model.layers.0.self_attn.attn", "model.layers.0.self_attn.indexer.k_cache")
DRAFT = (ATTENTION, INDEXER)
"""Attention layers of the target, and of the draft model."""


@dataclass(frozen=True)
class Model:
    """A tiny model with MTP: its configuration, and the attention layers of the target and of the draft model."""

    config: Path
    target: tuple[str, ...] = TARGET
    draft: tuple[str, ...] = DRAFT


DSA = Model(TINY_DSV32)
DENSE = Model(TINY_DSV3, TARGET[:1], DRAFT[:1])


@dataclass(frozen=True)
class Sizes:
    """Where a draft runs, and how large it may be."""

    device: torch.device = CPU
    captured: int = CAPTURED
    model_len: int = 1024
    requests: int = 16
    tokens: int = 256
    block: int = BLOCK_SIZE


class HostBuffer:
    """Stands for `UvaBuffer` where the device is the host."""

    def __init__(self, size: Any, dtype: torch.dtype) -> None:
        self.cpu = self.uva = torch.zeros(size, dtype=dtype)
        self.np = self.cpu.numpy()


def without_pinned_memory() -> None:
    """Let vLLM's runner do without memory that a GPU can read; 0.30 and later know how, 0.28 insists on it."""
    buffer_utils.is_uva_available = lambda: False
    if not hasattr(buffer_utils, "NonUvaBuffer"):
        buffer_utils.UvaBuffer = HostBuffer
        torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign]


class Prefill:
    """Stands for the prefill backend of a dense MLA layer, which decode metadata do without."""

    def clone(self) -> Prefill:
        """Itself."""
        return self


def block_tables(
    block_size: int, requests: int, tokens: int, blocks: int, device: torch.device, kernel_block: int = 0
) -> BlockTables:
    """vLLM's tables of one KV-cache group, which until 0.31 ask for the kernels' block size too; by default the same."""
    asked = (
        {"kernel_block_sizes": [kernel_block or block_size]}
        if "kernel_block_sizes" in inspect.signature(BlockTables).parameters
        else {}
    )
    return BlockTables([block_size], requests, tokens, [blocks], device, **asked)


class Layer(AttentionLayerBase):  # type: ignore[misc]
    """An attention layer as far as metadata builders look at it."""

    prefill_backend = Prefill()
    num_heads = 4
    impl = SimpleNamespace(num_heads=num_heads)  # where vLLM 0.28 looks
    q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim = 64, 512, 128, 64, 128

    def __init__(self, backend: Any, spec: Any) -> None:
        self._backend, self._spec = backend, spec

    def get_attn_backend(self) -> Any:
        """Its backend."""
        return self._backend

    def get_kv_cache_spec(self, config: Any) -> Any:
        """Its cache."""
        return self._spec


class DraftModel(torch.nn.Module):
    """Writes down what a draft step's attention would read, block tables up to `columns`."""

    columns = 16
    record = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, torch.Tensor]] = []

    def forward(self, input_ids: Any, positions: Any, hidden_states: Any, inputs_embeds: Any = None) -> Any:
        """Record one step."""
        if not self.record:
            return hidden_states.clone(), hidden_states.clone()
        context = get_forward_context()
        attention, index = (context.attn_metadata[name] for name in DRAFT)
        decode = attention if hasattr(attention, "block_table") else attention.decode  # of a dense backend
        step = {
            "request map": getattr(attention, "req_id_per_token", None),
            "lengths": decode.seq_lens,
            "slots": attention.slot_mapping,
            "blocks": decode.block_table[:, : self.columns],
            "indexer slots": index.slot_mapping,
            "positions": positions,
            "context slots": context.slot_mapping[DRAFT[0]],
        }
        if index.decode is not None:
            step["indexer lengths"] = index.decode.seq_lens.flatten()
            step["indexer blocks"] = index.decode.block_table[:, : self.columns]
            step["query tokens"] = index.decode.decode_lens
            step["query tokens per request"] = getattr(index.decode, "per_req_decode_lens", None)  # not in 0.28
            step["indices"] = index.decode.indices
            if indexer.has_deep_gemm() and indexer.current_platform.is_cuda():
                step["schedule"] = index.decode.schedule_metadata[None]  # whole in every row
        self.seen.append({name: value.clone() for name, value in step.items() if value is not None})
        return hidden_states.clone(), hidden_states.clone()

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Always token 7."""
        return torch.nn.functional.one_hot(torch.full((hidden.shape[0],), 7), 512).float()


class Speculator(MTPSpeculator):  # type: ignore[misc]
    """With the stand-in for the model."""

    def load_draft_model(self, *arguments: Any) -> DraftModel:
        """The stand-in."""
        return DraftModel()


class Graphs:
    """Stands for the decode CUDA-graph manager, with one captured size."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._metadata, self._slots = self.inputs()

    def inputs(self, requests: int | None = None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Metadata and slot mappings of the dummy batch that vLLM captures, for so many requests or those of `Sizes`."""
        draft = self._draft
        size = draft.sizes.captured if requests is None else requests
        speculator, tables = draft.speculator, draft.tables
        batch = InputBatch.make_dummy(size, size, speculator.input_buffers, max_query_len=1)
        slots = tables.get_dummy_slot_mappings(size)
        metadata = build_attn_metadata(
            speculator.attn_groups, size, size, speculator.input_buffers.query_start_loc[: size + 1],
            torch.from_numpy(batch.query_start_loc_np), 1, batch.seq_lens, speculator.max_model_len,
            tables.get_dummy_block_tables(size), slots, draft.cache,
            seq_lens_cpu_upper_bound=batch.seq_lens_cpu_upper_bound, positions=batch.positions,
            is_prefilling=torch.zeros(size, dtype=torch.bool), for_cudagraph_capture=True,
        )  # fmt: skip
        return metadata, build_slot_mappings_by_layer(slots, draft.cache)

    @property
    def captured(self) -> dict[str, Any]:
        """The metadata that was captured, by layer."""
        return self._metadata

    def body(self) -> None:
        """What a graph records: the whole draft if its metadata stays in place, else one step."""
        speculator, size = self._draft.speculator, self._draft.sizes.captured
        run = speculator._generate_fused_drafts if self._draft.fused else speculator._generate_draft
        takes_steps = (
            "num_speculative_steps" in inspect.signature(speculator._generate_draft).parameters
        )  # 0.32 and later
        steps = (speculator.num_speculative_steps,) * takes_steps
        run(size, size, self._metadata, self._slots, None, CUDAGraphMode.NONE, *steps)

    def dispatch(self, num_reqs: int, num_tokens: int, uniform_token_count: Any = None, **_: Any) -> Any:
        """The captured size, if the batch fits."""
        size = self._draft.sizes.captured
        if num_reqs <= size:
            return BatchExecutionDescriptor(CUDAGraphMode.FULL, size, size, 1)
        return BatchExecutionDescriptor(CUDAGraphMode.NONE, num_tokens, num_reqs)

    def specialize_spec_tokens(self, descriptor: Any, tokens: int) -> Any:
        """Nothing to specialize."""
        return descriptor

    def run_fullgraph(self, descriptor: Any) -> None:
        """What the captured graph does."""
        self.body()


class Draft:
    """A speculator over a tiny DeepSeek with MTP.

    Attributes
    ----------
    layers : tuple of str
        Attention layers of the draft model; where a class has none, those of `kind`.

    Parameters
    ----------
    cache_dtype, heads : as in `LAYOUTS`
    tokens : speculative tokens
    sizes : Sizes
    model : stand-in for the draft model
    attention : backend of the draft's attention layer; with a DSA model the tokens before the first draft step stay with
        FlashMLA-sparse. With None all layers keep the backends of `lay_out`
    graphs : stand-in for the decode CUDA-graph manager
    kind : DSA or DENSE
    """

    layers: tuple[str, ...] = ()

    def __init__(
        self,
        cache_dtype: str,
        heads: int,
        tokens: int,
        sizes: Sizes = Sizes(),
        model: type[DraftModel] = DraftModel,
        graphs: type[Graphs] = Graphs,
        attention: Any = flashmla_sparse.FlashMLASparseBackend,
        kind: Model = DSA,
    ) -> None:
        on_cpu = sizes.device.type == "cpu"
        if on_cpu:
            without_pinned_memory()
        if on_cpu and cache_dtype != "auto":
            without_compiled_flashmla()
        self.config = tiny_config(
            cache_dtype, heads, tokens, model=str(kind.config), block_size=sizes.block,
            max_model_len=sizes.model_len, max_num_seqs=sizes.requests, max_num_batched_tokens=sizes.tokens,
        )  # fmt: skip
        self.tokens, self.sizes, device = tokens, sizes, sizes.device
        with set_current_vllm_config(self.config):
            if not model_parallel_is_initialized():
                init_distributed_environment(1, 0, "file://" + tempfile.mktemp(), 0, "gloo")
                ensure_model_parallel_initialized(1, 1)
            layers = self.config.compilation_config.static_forward_context
            self.kind, self.attention, self.layers = kind, attention, self.layers or kind.draft
            self.cache = self.lay_out(layers)
            self.speculator = Speculator(self.config, device)
            self.speculator.model = self.model = model()
            self.speculator.draft_attn_layer_names = set(self.layers)
            self.groups, _, _ = init_attn_backend(self.cache, self.config, device)
            if attention is not None:
                layers[self.layers[0]]._backend = attention
            self.tables = self.make_tables()
            self.buffers = InputBuffers(sizes.requests, sizes.tokens, device)
            self.speculator.set_attn(None, self.cache, self.tables, self.buffers, self.groups)
            self.speculator.init_cudagraph_manager(CUDAGraphMode.NONE)
            self.graphs: Any = graphs(self)
            self.speculator.decode_cudagraph_manager = self.graphs

    def lay_out(self, layers: dict[str, Any]) -> KVCacheConfig:
        """Put the attention layers of target and draft into `layers`; returns their KV cache: one group."""
        kind, block = self.kind, self.sizes.block
        specs = [
            MLAAttentionSpec(block_size=block, num_kv_heads=1, head_size=576, dtype=torch.bfloat16),
            MLAAttentionSpec(block_size=block, num_kv_heads=1, head_size=132, dtype=torch.uint8),
        ]
        first = flashmla_sparse.FlashMLASparseBackend if kind is DSA else self.attention
        backends = (first, indexer.DeepseekV32IndexerBackend)
        for names in (kind.target, kind.draft):
            for name, backend, spec in zip(names, backends, specs, strict=False):
                layers[name] = Layer(backend, spec)
        every = [*kind.target, *kind.draft]
        group = UniformTypeKVCacheSpecs(block_size=block, kv_cache_specs={name: layers[name]._spec for name in every})
        return KVCacheConfig(num_blocks=512, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(every, group)])

    def make_tables(self) -> BlockTables:
        """vLLM's block tables for that cache."""
        sizes = self.sizes
        return block_tables(sizes.block, sizes.requests, sizes.tokens, sizes.model_len // sizes.block, sizes.device)

    def block_ids(self, request: int, first_block: int) -> tuple[list[int], ...]:
        """The blocks of a request, for each KV-cache group."""
        blocks = 16 * BLOCK_SIZE // self.sizes.block
        first = first_block + request * blocks
        return ([*range(first, first + blocks)],)

    @property
    def fused(self) -> bool:
        """Whether the whole draft is one graph, under the name that this vLLM has for it."""
        speculator = self.speculator
        new, old = "supports_decode_metadata_update", "use_fused_multi_step_decode"
        return bool(getattr(speculator, new if hasattr(speculator, new) else old))

    @property
    def builders(self) -> list[Any]:
        """Metadata builders of the draft's groups."""
        return [group.get_metadata_builder() for groups in self.speculator.attn_groups for group in groups]

    def keep_methods(self, *names: str) -> None:
        """Keep these methods of the speculator, and the builders' update, as they are now, whatever is patched or undone later.

        The emulated graphs of a CPU run them, and a real graph is captured more than once: what was recorded stays.
        """
        for builder in self.builders:
            setattr(builder, METHOD, getattr(builder, METHOD))
        for name in names:
            if hasattr(self.speculator, name):
                setattr(self.speculator, name, getattr(self.speculator, name))

    def warm_up(self) -> None:
        """Run what the graph of the captured size records, as vLLM does before it captures, and at every later capture."""
        with set_current_vllm_config(self.config):
            self.graphs.body()

    def propose(self, lengths: list[int], rejected: list[int], first_block: int) -> list[dict[str, torch.Tensor]]:
        """Draft for a batch whose target forward has run; what each draft decode step saw, real rows only."""
        size, width = len(lengths), self.tokens + 1
        for request in range(size):
            self.tables.append_block_ids(request, self.block_ids(request, first_block), True)
        self.tables.apply_staged_writes()
        batch = InputBatch.make_dummy(size, size * width, self.buffers, max_query_len=width)
        if hasattr(batch, "is_padding") and batch.is_padding is not None:
            batch.is_padding.fill_(False)
        seq_lens = torch.tensor(lengths, dtype=torch.int32)
        self.buffers.seq_lens[:size] = seq_lens
        self.buffers.positions[: size * width] = torch.cat([torch.arange(length - width, length) for length in lengths])
        batch.seq_lens_cpu_upper_bound = seq_lens.clone()
        gathered = self.tables.gather_block_tables(batch.idx_mapping, num_reqs_padded=size)
        slots = self.tables.compute_slot_mappings(
            batch.idx_mapping, batch.query_start_loc, batch.positions, size * width
        )
        metadata = build_attn_metadata(
            self.groups, size, size * width, batch.query_start_loc, torch.from_numpy(batch.query_start_loc_np), width,
            batch.seq_lens, max(lengths), gathered, slots, self.cache,
            seq_lens_cpu_upper_bound=batch.seq_lens_cpu_upper_bound, positions=batch.positions,
            is_prefilling=torch.zeros(size, dtype=torch.bool),
        )  # fmt: skip
        self.speculator.model.seen.clear()
        zeros = [torch.zeros(16, dtype=dtype) for dtype in (torch.int64, torch.int32, torch.float32, torch.int64)]
        with set_current_vllm_config(self.config):
            self.speculator.propose(
                batch, metadata, build_slot_mappings_by_layer(slots, self.cache), torch.randn(size * width, 128).bfloat16(), None,
                torch.tensor([width - count for count in rejected], dtype=torch.int32),
                torch.tensor(rejected, dtype=torch.int32), *zeros,
            )  # fmt: skip
        return [{name: value[:size] for name, value in step.items()} for step in self.speculator.model.seen[1:]]
