"""vLLM's real target of Model Runner V2 on a CPU: its builders, its runner's preparation, its managers of CUDA graphs.

The model is a stand-in that writes down every tensor of the metadata that it reads. CUDA graphs are emulated: a replay calls
the forward that was captured, over the metadata that were frozen then, so that only what is written into vLLM's buffers counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import pkgutil
import random
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from vllm.config import set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed.parallel_state import (
    ensure_model_parallel_initialized,
    init_distributed_environment,
    model_parallel_is_initialized,
)
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backends.mla import flashmla_sparse, indexer
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, MLAAttentionSpec, UniformTypeKVCacheSpecs
from vllm.v1.worker.gpu import cudagraph_utils, model_runner
from vllm.v1.worker.gpu.attn_utils import init_attn_backend
from vllm.v1.worker.gpu.input_batch import InputBuffers
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState

from nsa_plugin.adapters.vllm import releases
from nsa_plugin.rigs.vllm.drafts import LAYOUTS, tiny_config
from nsa_plugin.rigs.vllm.stand_ins import emulated_cuda, without_compiled_flashmla
from nsa_plugin.rigs.vllm.v2_draft import CPU, DRAFT, TARGET, Layer, Prefill, block_tables, without_pinned_memory

REQUESTS, MODEL_LEN, BLOCKS, PAGE, NUM_SMS = 16, 1024, 512, 64, 132
KEPT = ("arange_buffer", "offsets_buffer", "topk_tokens_tensor", "dcp_rank_tensor")
"""Buffers of builders that are constants."""
Seen = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """What a target is like.

    Attributes
    ----------
    layout : a key of `LAYOUTS`
    tokens : tokens that are drafted for each request; one more is verified
    block_size : tokens of a block of the KV cache's manager; kernels have pages of 64
    draft_heads : attention heads of the draft's layers; other than the target's, they have groups of their own
    sizes : requests of the graphs
    """

    layout: str = "bf16"
    tokens: int = 3
    block_size: int = 64
    draft_heads: int = 0
    sizes: Sequence[int] = (2, 4)


class _Graph:
    """Stands for a CUDA graph."""

    def __init__(self) -> None:
        self.forward: Callable[[Any], Any] = lambda mode: None

    def replay(self) -> None:
        self.forward(CUDAGraphMode.NONE)


@contextlib.contextmanager
def _capturing(graph: _Graph, *_: Any, **__: Any) -> Iterator[None]:
    """Stands for `torch.cuda.graph`: the forward that vLLM is about to capture is what replays call."""
    graph.forward = sys._getframe(2).f_locals["forward_fn"]
    yield


@contextlib.contextmanager
def emulated_graphs() -> Iterator[None]:
    """Within it vLLM's managers capture emulated graphs."""
    platform = type(cudagraph_utils.current_platform)
    pools: dict[str, Any] = (
        {"capture_pool": lambda pool, config: contextlib.nullcontext(pool)}
        if hasattr(cudagraph_utils, "capture_pool")
        else {"set_graph_pool_id": lambda pool: None}  # until 0.31
    )
    with (
        mock.patch.object(cudagraph_utils, "graph_capture", lambda device=None: contextlib.nullcontext()),
        mock.patch.multiple(cudagraph_utils, **pools),
        mock.patch.object(cudagraph_utils, "current_stream", lambda: None),
        mock.patch.object(platform, "get_global_graph_pool", lambda self=None: (0, 0)),
        mock.patch.object(torch.cuda, "CUDAGraph", _Graph),
        mock.patch.object(torch.cuda, "graph", _capturing),
    ):
        yield


@contextlib.contextmanager
def hopper() -> Iterator[None]:
    """Within it the indexer's builder takes its branches for Hopper, with a stand-in for DeepGEMM."""

    def schedule(context_lens: torch.Tensor, block_size: int, num_sms: int, indices: Any = None) -> torch.Tensor:
        """Does not clamp, unlike the stand-in of others: negative lengths must show."""
        halves = 2 if context_lens.dim() == 2 and context_lens.shape[1] == 4 else 1  # as the real wrapper asks for
        lengths = context_lens.flatten()
        weighted = ((lengths * 7 + lengths // block_size) * torch.arange(1, lengths.numel() + 1)).sum().to(torch.int32)
        slot = torch.arange(num_sms // halves + 1, dtype=torch.int32)
        return torch.stack([slot * weighted, (slot * 31 + weighted) % 97], 1).to(torch.int32)

    with contextlib.ExitStack() as stack:
        stack.enter_context(emulated_cuda(90))
        replaced: dict[str, Any] = {"get_paged_mqa_logits_metadata": schedule, "num_compute_units": lambda *_: NUM_SMS}
        stack.enter_context(mock.patch.multiple(indexer, **replaced))
        yield


class _Prefill(Prefill):
    """Also asked about eager batches with prefills."""

    def prepare_metadata(self, *_: Any, **__: Any) -> None:
        """Nothing: no prefill is run."""


class _Model(torch.nn.Module):
    """Writes down what the target's layers would read."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Seen = {}

    def forward(self, input_ids: Any, positions: Any, intermediate_tensors: Any = None, **_: Any) -> torch.Tensor:
        """Some hidden states."""
        self.seen = read(get_forward_context().attn_metadata)
        return torch.zeros(input_ids.shape[0], 8)


def read(metadata: Any) -> Seen:
    """Copies of every tensor of the metadata of all groups, by the number of the group and a path of fields.

    Block tables are defined in their first column and as far as a row's length goes: -1 stands for the rest.
    """
    objects = list({id(own): own for own in metadata.values()}.values())
    seen: Seen = {}
    for number, own in enumerate(objects):
        found = dict(_tensors(own))
        for path, value in found.items():
            if path.endswith(".block_table"):
                lengths = found[path.replace("block_table", "seq_lens")].reshape(len(value), -1).max(1).values
                columns = torch.arange(value.shape[1]) * PAGE
                value = value.masked_fill((columns > 0) & (columns >= lengths[:, None]), -1)
            seen[f"{number} {type(own).__name__}{path}"] = value.clone()
    return seen


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name), f"{path}.{field.name}")


@dataclass(frozen=True)
class Batch:
    """A uniform batch, as the runner has prepared it.

    Attributes
    ----------
    descriptor : BatchExecutionDescriptor
        Of the graph that it goes to.
    requests : int
        Without padding.
    input_batch, block_tables, slots : what `prepare_attn` of the model's state takes
    """

    descriptor: Any
    requests: int
    input_batch: Any
    block_tables: Any
    slots: Any


def _speculators_manager() -> Any:
    """The class that manages the CUDA graphs of a draft, beside the installed vLLM's speculator."""
    package = releases.speculator().rsplit(".", 2)[0]
    return pkgutil.resolve_name(f"{package}.cudagraph_utils:SpeculatorCudaGraphManager")


def _known(arguments: Mapping[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """Those of the arguments that the installed vLLM's function has: 0.30 has fewer."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in parameters}


class TargetRunner:
    """The parts of a runner that verify tokens, over a tiny DeepSeek-V3.2 with MTP.

    To be used within `hopper` and `inference`.

    Attributes
    ----------
    model : the stand-in
    first_pass : what the draft's first pass has read
    groups, tables, buffers, state : vLLM's own
    manager, speculator : the managers of the target's graphs and of the draft's first pass
    """

    def __init__(self, shape: Shape) -> None:
        without_pinned_memory()
        cache_dtype, heads = LAYOUTS[shape.layout]
        without_compiled_flashmla()
        self.shape, self.width = shape, shape.tokens + 1
        self._most = max(256, REQUESTS * self.width)
        self.config = tiny_config(
            cache_dtype, heads, shape.tokens, max_model_len=MODEL_LEN, max_num_seqs=REQUESTS,
            max_num_batched_tokens=self._most, block_size=shape.block_size,
        )  # fmt: skip
        compilation = self.config.compilation_config
        compilation.cudagraph_capture_sizes = [self.width * size for size in shape.sizes]
        compilation.max_cudagraph_capture_size = self.width * max(shape.sizes)
        self.model, self.first_pass = _Model(), Seen()
        with set_current_vllm_config(self.config):
            if not model_parallel_is_initialized():
                init_distributed_environment(1, 0, "file://" + tempfile.mktemp(), 0, "gloo")
                ensure_model_parallel_initialized(1, 1)
            self.cache = self._cache(heads)
            self.groups, _, kernel_blocks = init_attn_backend(self.cache, self.config, CPU)
            blocks = MODEL_LEN // shape.block_size
            self.tables = block_tables(shape.block_size, REQUESTS, self._most, blocks, CPU, kernel_blocks[0])
            self.buffers = InputBuffers(REQUESTS, self._most, CPU)
            self._runner()
        self.capture()

    def _cache(self, heads: int) -> Any:
        size = self.shape.block_size
        specs = [
            MLAAttentionSpec(block_size=size, num_kv_heads=1, head_size=576, dtype=torch.bfloat16),
            MLAAttentionSpec(block_size=size, num_kv_heads=1, head_size=132, dtype=torch.uint8),
        ]
        backends = (flashmla_sparse.FlashMLASparseBackend, indexer.DeepseekV32IndexerBackend)
        layers = self.config.compilation_config.static_forward_context
        for names in (TARGET, DRAFT):
            for name, backend, spec in zip(names, backends, specs, strict=True):
                layers[name] = Layer(backend, spec)
                layers[name].prefill_backend = _Prefill()
                if names is DRAFT and self.shape.draft_heads:
                    layers[name].num_heads = self.shape.draft_heads
        every = [*TARGET, *DRAFT]
        group = UniformTypeKVCacheSpecs(block_size=size, kv_cache_specs={name: layers[name]._spec for name in every})
        return KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(every, group)])

    def _runner(self) -> None:
        """The state of the model and of its requests, and the object whose methods prepare a batch."""
        self.state: Any = object.__new__(DefaultModelState)
        self.state.supports_mm_inputs, self.state.encoder_cache, self.state.vllm_config = False, None, self.config
        self.state.model_config = self.config.model_config
        if not hasattr(DefaultModelState, "max_model_len"):  # until 0.30
            self.state.max_model_len = MODEL_LEN
        self.state.prompt_embeds_state = self.state.rope_state = None
        self._requests = RequestState(REQUESTS, MODEL_LEN, 1024, self.shape.tokens, BLOCKS, CPU)
        self._self = types.SimpleNamespace(
            input_buffers=self.buffers, device=CPU, model_state=types.SimpleNamespace(num_new_sampled_tokens_per_step=1),
            adaptive_verification=None, max_num_reqs=REQUESTS, req_states=self._requests, decode_query_len=self.width,
            fast_prefill=None, model_config=types.SimpleNamespace(rswa_window=None), pcp_manager=None,
            block_tables=self.tables,
        )  # fmt: skip

    @property
    def builders(self) -> list[Any]:
        """Of all groups."""
        return [group.get_metadata_builder() for same_cache in self.groups for group in same_cache]

    def capture(self) -> None:
        """Make managers, and let them capture: as at a start, or after graphs were released."""
        mode = CUDAGraphMode.FULL_DECODE_ONLY
        with self.inference(), emulated_graphs():
            self.manager = cudagraph_utils.ModelCudaGraphManager(self.config, CPU, mode, self.width)
            self.speculator = _speculators_manager()(self.config, CPU, mode, self.width)
            self.manager.capture(
                self.model, self.state, self.buffers, None, self.tables, self.groups, self.cache
            )  # fmt: skip

            def prefill(num_reqs: Any, num_tokens: Any, metadata: Any, *_: Any, **__: Any) -> None:
                self.first_pass = read(metadata)

            self.speculator.capture(prefill, self.state, self.buffers, self.tables, self.groups, self.cache)

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """As vLLM runs a model."""
        with set_current_vllm_config(self.config), torch.inference_mode():
            yield

    def batch(self, seed: int, requests: int, pad_to: int = 0) -> Batch:
        """A random batch through the runner's own preparation; for other ranks' sake it may be padded beyond the next size."""
        rng, width = random.Random(seed), self.width
        most = MODEL_LEN - width
        rows = np.array(rng.sample(range(REQUESTS), requests), dtype=np.intp)
        for row in map(int, rows):
            computed = rng.choice([0, 1, 62, 63, 64, 65, 127, 128, most, rng.randrange(most)])
            self._requests.num_computed_tokens.gpu[row] = computed
            self._requests.num_computed_tokens_np[row] = min(computed + rng.randrange(width), most)
            self._requests.prefill_len.np[row] = 0
            size = self.shape.block_size
            blocks = min(-(-(computed + width) // size) + rng.randrange(2), MODEL_LEN // size)
            self.tables.append_block_ids(row, ([rng.randrange(1, BLOCKS) for _ in range(blocks)],), True)
        self.tables.apply_staged_writes()
        self._requests.prefill_len.copy_to_uva()
        padded = max(pad_to, requests)
        descriptor = self.manager.dispatch(padded, padded * width, width, 0)
        names, count = [f"r{row}" for row in rows], len(rows)
        scheduled = types.SimpleNamespace(
            scheduled_spec_decode_tokens={name: [0] * (width - 1) for name in names},
            has_structured_output_requests=False,
        )
        fields: dict[str, Any] = {
            "req_ids": names, "num_scheduled_tokens": np.full(count, width, np.int32), "num_tokens": count * width,
            "num_draft_tokens_np": np.full(count, width - 1, np.int32), "idx_mapping_np": rows,
            "prefill_len_np": np.zeros(count, np.int32), "num_computed_prefill_tokens_np": np.zeros(count, np.int32),
            "is_prefilling_np": np.zeros(count, bool), "max_seq_len_np": None, "has_prefill": False,
            "prefill_runs_as_decode_np": None, "decode_graph_eligible": True,
        }  # fmt: skip
        state = model_runner.BatchReqState(**_known(fields, model_runner.BatchReqState))
        prepare = model_runner.GPUModelRunner.prepare_inputs
        made = prepare(self._self, scheduled, state, descriptor, **_known({"num_active_loras": 0}, prepare))
        return Batch(descriptor, requests, made, *model_runner.GPUModelRunner.prepare_attn(self._self, made))

    def prepare(self, batch: Batch, for_capture: bool = False) -> Any:
        """The metadata, as the runner asks for them; `for_capture` in a dummy run."""
        return self.state.prepare_attn(
            batch.input_batch, batch.descriptor.cg_mode, batch.block_tables, batch.slots, self.groups, self.cache,
            for_capture=for_capture,
        )  # fmt: skip

    def replay(self, batch: Batch) -> tuple[Seen, Seen]:
        """Replay the target's graph and that of the draft's first pass; what each of them reads."""
        self.manager.run_fullgraph(batch.descriptor)
        pass_descriptor = self.speculator.dispatch(batch.requests, batch.descriptor.num_tokens, self.width, 0)
        if pass_descriptor.num_tokens != batch.descriptor.num_tokens:
            raise RuntimeError(f"the first pass has a graph of {pass_descriptor.num_tokens} tokens")
        self.speculator.run_fullgraph(pass_descriptor)
        return self.model.seen, self.first_pass

    def poison(self, value: int) -> None:
        """Fill everything that builders keep from one batch to the next."""
        for group in (group for same_cache in self.groups for group in same_cache):
            kept = vars(group.get_metadata_builder()) | {"kernel_block_table": releases.mapped_table(group)}
            for name, buffer in kept.items():
                if isinstance(buffer, torch.Tensor) and not buffer.is_floating_point() and name not in KEPT:
                    buffer.fill_(value)
