"""vLLM's real V1 proposer on a CPU or a GPU: real EagleProposer, attention groups, metadata builders and Triton kernels.

The draft model is a stand-in that writes down every field of the metadata that each draft step hands it.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from triton.runtime import interpreter
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.mla import flashmla_sparse, indexer
from vllm.v1.kv_cache_interface import MLAAttentionSpec
from vllm.v1.spec_decode.eagle import EagleProposer
from vllm.v1.worker.utils import AttentionGroup

from nsa_plugin.rigs.installed import TINY_DSV32

ATTENTION = "model.layers.2.mtp_block.self_attn.attn"
INDEX = "model.layers.2.mtp_block.self_attn.indexer.k_cache"
BLOCK_SIZE, BLOCKS, HIDDEN = 64, 16, 128
Step = dict[str, Any]
LAYOUTS = {"bf16": ("auto", 4), "fp8 mixed": ("fp8_ds_mla", 4), "fp8 separate": ("fp8_ds_mla", 64)}
BATCHES: tuple[tuple[Any, ...], ...] = (
    ([100, 107, 126], [1, 0, 2], 1),
    ([63, 64, 700], [0, 0, 0], 70),  # the same shape, other blocks
    ([300], [1], 140),
    ([1000, 1019, 1024, 12], [0, 1, 0, 2], 7),  # past the model's maximal length, at different steps
    ([1022, 1023, 1024], [0, 0, 0], 7),
    ([200, 64, 90], None, 11, [1, 4, 2]),  # unpadded drafter batch
    ([200, 64, 90, 333], [0, 0, 0, 0], 11, [1, 3, 64, 333]),  # two requests are in prefill
)


class DraftModel(torch.nn.Module):
    """Writes down what the attention of a draft step would read."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.seen: list[Step] = []
        self.watch = True

    def forward(self, input_ids: Any, positions: Any, hidden_states: Any, inputs_embeds: Any = None) -> Any:
        """Record one step."""
        if self.watch:
            context = get_forward_context()
            slots = context.slot_mapping[ATTENTION]
            step: Step = {"positions": positions.clone(), "context slots": slots.clone()}
            step["addresses that a CUDA graph reads"] = (positions.data_ptr(), slots.data_ptr())
            step["layers"] = sorted(context.attn_metadata)
            for name in (ATTENTION, INDEX):
                step.update(fields(name.rsplit(".", 1)[1], context.attn_metadata[name]))
            self.seen.append(step)
        return hidden_states.clone(), hidden_states.clone()

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Always token 7."""
        return torch.nn.functional.one_hot(torch.full((hidden.shape[0],), 7, device=hidden.device), 512).float()


class Unpinned:
    """`torch`, for a module that asks for pinned memory, which a machine without a GPU has not."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *size: Any, pin_memory: bool = False, **keywords: Any) -> torch.Tensor:
        """Not pinned."""
        return torch.zeros(*size, **keywords)


def fields(prefix: str, value: Any) -> Step:
    """Every field of nested metadata, tensors copied; objects that are no dataclass by their type."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found: Step = {prefix: type(value).__qualname__}
        for field in dataclasses.fields(value):
            found.update(fields(f"{prefix}.{field.name}", getattr(value, field.name)))
        return found
    if isinstance(value, torch.Tensor):
        return {prefix: value.clone()}
    return {prefix: value}


def differing(want: Step, have: Step) -> list[str]:
    """Names of fields that are not equal in type, shape, dtype and value."""
    wrong = sorted(want.keys() ^ have.keys())
    for name in want.keys() & have.keys():
        ours, theirs = have[name], want[name]
        if isinstance(theirs, torch.Tensor):
            equal = isinstance(ours, torch.Tensor) and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        else:
            equal = type(ours) is type(theirs) and ours == theirs
        wrong += [] if equal else [name]
    return sorted(wrong)


class V1Draft:
    """A proposer over a tiny DeepSeek-V3.2 with MTP.

    Parameters
    ----------
    cache_dtype : "auto" (bf16) or "fp8_ds_mla"
    heads : 4 (fp8: mixed batches) or 64 (fp8: separate prefill and decode)
    tokens : speculative tokens
    device : where its tensors are
    attention : attention backend
    settings : further engine arguments
    """

    def __init__(
        self,
        cache_dtype: str,
        heads: int,
        tokens: int,
        device: str = "cpu",
        attention: Any = flashmla_sparse.FlashMLASparseBackend,
        **settings: Any,
    ) -> None:
        self.device = torch.device(device)
        if (
            cache_dtype != "auto" and device == "cpu"
        ):  # the compiled FlashMLA is absent: its scheduler object does without
            sys.modules.setdefault("vllm._flashmla_C", types.ModuleType("vllm._flashmla_C"))
            from vllm.third_party.flashmla import flash_mla_interface

            flashmla_sparse.get_mla_metadata = flash_mla_interface.get_mla_metadata
            flashmla_sparse.FlashMLASchedMeta = flash_mla_interface.FlashMLASchedMeta
            flashmla_sparse.torch = Unpinned()
        overrides = {
            "num_attention_heads": heads, "num_key_value_heads": heads,
            "max_position_embeddings": settings.get("max_model_len", 1024),
        }  # fmt: skip
        arguments: dict[str, Any] = {
            "model": str(TINY_DSV32), "skip_tokenizer_init": True, "max_model_len": 1024,
            "max_num_seqs": 64, "max_num_batched_tokens": 1024, "block_size": BLOCK_SIZE, "dtype": "bfloat16",
            "enforce_eager": True, "load_format": "dummy", "kv_cache_dtype": cache_dtype, "hf_overrides": overrides,
            "speculative_config": {"method": "mtp", "num_speculative_tokens": tokens},
        }  # fmt: skip
        self.config = EngineArgs(**{**arguments, **settings}).create_engine_config()
        self.config.compilation_config.static_forward_context[ATTENTION] = SimpleNamespace(
            prefill_backend=None, num_heads=heads
        )
        self.tokens = tokens
        with set_current_vllm_config(self.config):
            self.proposer = EagleProposer(self.config, self.device)
            self.proposer.model = self.model = DraftModel()
            self.proposer._draft_attn_layer_names = {ATTENTION, INDEX}
            groups = [
                AttentionGroup(backend, [name], MLAAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=size, dtype=dtype), 0)
                for backend, name, size, dtype in (
                    (attention, ATTENTION, 576, torch.bfloat16),
                    (indexer.DeepseekV32IndexerBackend, INDEX, 132, torch.uint8),
                )
            ]  # fmt: skip
            for group in groups:
                group.create_metadata_builders(self.config, self.device)
            self.proposer.draft_attn_groups = groups
            self.proposer.block_size = BLOCK_SIZE
        # As in the model runner: persistent, so that batches share addresses.
        seqs, width = self.config.scheduler_config.max_num_seqs, self.config.model_config.max_model_len // BLOCK_SIZE
        self.block_table = torch.zeros(seqs, width, dtype=torch.int32, device=self.device)
        self.seq_lens = torch.zeros(seqs, dtype=torch.int32, device=self.device)

    def batch(self, lengths: Sequence[int], first_block: int, queries: Sequence[int]) -> CommonAttentionMetadata:
        """What the model runner hands to the proposer: `queries[i]` tokens of request i, `lengths[i]` with them."""
        size, width = len(lengths), self.block_table.shape[1]
        starts = torch.tensor([sum(queries[:i]) for i in range(size + 1)], dtype=torch.int32)
        positions = torch.cat(
            [torch.arange(length - query, length) for length, query in zip(lengths, queries, strict=True)]
        )
        table = torch.arange(first_block, first_block + size * width, dtype=torch.int32).view(size, width)
        request = torch.arange(size).repeat_interleave(torch.tensor(queries))
        slots = table[request, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        self.block_table[:size].copy_(table)
        self.seq_lens[:size].copy_(torch.tensor(lengths, dtype=torch.int32))
        return CommonAttentionMetadata(
            query_start_loc=starts.to(self.device), query_start_loc_cpu=starts, seq_lens=self.seq_lens[:size], num_reqs=size,
            num_actual_tokens=int(starts[-1]), max_query_len=max(queries), max_seq_len=max(lengths),
            block_table_tensor=self.block_table[:size], slot_mapping=slots.to(self.device), positions=positions.to(self.device),
            is_prefilling=torch.zeros(size, dtype=torch.bool), seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
        )  # fmt: skip

    def proposal(
        self,
        lengths: Sequence[int],
        rejected: Sequence[int] | None,
        first_block: int,
        queries: Sequence[int] | None = None,
        tokens: int | None = None,
    ) -> Callable[[], torch.Tensor]:
        """The proposer's call for a batch whose target forward has run; to be made once.

        `rejected` None stands for an unpadded drafter batch.
        """
        size = len(lengths)
        batch = self.batch(lengths, first_block, [self.tokens + 1] * size if queries is None else queries)
        self.last_batch, total = batch, batch.num_actual_tokens
        for buffer in (self.proposer.positions, self.proposer._slot_mapping_buffer):
            buffer.zero_()  # rows that pad a CUDA graph keep what earlier batches left
        dropped = None if rejected is None else torch.tensor(rejected, dtype=torch.int32, device=self.device)
        arguments = (
            self.tokens if tokens is None else tokens, torch.zeros(total, dtype=torch.int32, device=self.device),
            batch.positions, torch.randn(total, HIDDEN, device=self.device).bfloat16(),
            torch.zeros(size, dtype=torch.int32, device=self.device),
            None if dropped is None else batch.query_start_loc[1:] - 1 - dropped, batch,
            SimpleNamespace(all_greedy=True, temperature=None),
        )  # fmt: skip

        def propose() -> torch.Tensor:
            with set_current_vllm_config(self.config):
                drafted: torch.Tensor = self.proposer.propose(*arguments, num_rejected_tokens_gpu=dropped)
            return drafted

        return propose

    def propose(self, lengths: Sequence[int], *arguments: Any, **keywords: Any) -> list[Step]:
        """Make a `proposal`; what each draft step after the first forward saw."""
        propose = self.proposal(lengths, *arguments, **keywords)
        self.model.seen.clear()
        drafted = propose()
        assert drafted.shape == (len(lengths), self.proposer.num_speculative_tokens)
        return self.model.seen[1:]


@contextmanager
def caches_cleared() -> Iterator[None]:
    """vLLM's own rebuild at every step, with what it remembers of earlier steps of the batch cleared: the reference."""
    original = EagleProposer.build_per_group_and_layer_attn_metadata
    owner = next(kind for kind in EagleProposer.__mro__ if "build_per_group_and_layer_attn_metadata" in vars(kind))

    def build(proposer: Any, common_attn_metadata: Any, draft_index: int = 0) -> Any:
        common_attn_metadata._token_to_req_indices_cache = None
        common_attn_metadata._num_computed_tokens_cache = None
        return original(proposer, common_attn_metadata, draft_index)

    owner.build_per_group_and_layer_attn_metadata = build
    try:
        yield
    finally:
        owner.build_per_group_and_layer_attn_metadata = original


def proposals(draft: V1Draft, batches: Any = BATCHES) -> list[Step]:
    """What every draft step of every batch saw; no more tokens are rejected than there are."""
    seen = []
    for lengths, rejected, *rest in batches:
        fewer = None if rejected is None else [min(count, draft.tokens) for count in rejected]
        seen += draft.propose(lengths, fewer, *rest)
    return seen


def reference(draft: V1Draft, batches: Any = BATCHES) -> list[Step]:
    """vLLM's own rebuild at every step."""
    with caches_cleared():
        return proposals(draft, batches)


def assert_same(want: list[Step], have: list[Step]) -> None:
    """Every field of every draft step."""
    for index, (theirs, ours) in enumerate(zip(want, have, strict=True)):
        assert not (wrong := differing(theirs, ours)), f"step {index}: {wrong}"


def fake_schedule(context_lens: torch.Tensor, block_size: int, num_sms: int, indices: Any = None) -> torch.Tensor:
    """Stands for DeepGEMM's schedule: a function of every context length, of the right shape."""
    pages = (context_lens.clamp(min=0).flatten() + block_size - 1) // block_size
    weighted = (pages * torch.arange(1, pages.numel() + 1)).sum().to(torch.int32)
    slot = torch.arange(num_sms + 1, dtype=torch.int32)
    return torch.stack([slot * weighted, (slot * 31 + weighted) % 97], 1).to(torch.int32)


def emulate_cuda(setattr_: Callable[..., None], family: int) -> None:
    """The indexer builder's branches for a CUDA device of this family (90 or 100), with a stand-in for DeepGEMM."""
    real = indexer.current_platform

    class CudaLike:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def is_cuda(self) -> bool:
            return True

        def is_device_capability_family(self, asked: int) -> bool:
            return asked == family

    setattr_(indexer, "current_platform", CudaLike())
    setattr_(indexer, "has_deep_gemm", lambda: True)
    setattr_(indexer, "get_paged_mqa_logits_metadata", fake_schedule)
    setattr_(indexer, "native_next_n_supported", lambda n: n in (1, 2, 4) if family == 90 else True)
    if family == 100:
        _accept_splatted_masks(setattr_)


def _accept_splatted_masks(setattr_: Callable[..., None]) -> None:
    """Triton's interpreter splats a scalar bool to bytes, and then refuses masks that a kernel makes of it."""
    builder = interpreter.InterpreterBuilder

    def accepting(original: Callable[..., Any], at: int) -> Callable[..., Any]:
        def access(self: Any, *arguments: Any) -> Any:
            arguments[at].data = arguments[at].data.astype(bool)
            return original(self, *arguments)

        return access

    setattr_(builder, "create_masked_load", accepting(builder.create_masked_load, 1))
    setattr_(builder, "create_masked_store", accepting(builder.create_masked_store, 2))
