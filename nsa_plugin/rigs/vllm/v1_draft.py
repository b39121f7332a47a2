"""Model Runner V1's draft without a worker: real EagleProposer, attention groups, metadata builders and Triton kernels.

The draft model is a stand-in that writes down every field of the metadata that each draft step hands it. It runs on a GPU,
or on a CPU with `stand_ins`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.mla import flashmla_sparse, indexer
from vllm.v1.kv_cache_interface import MLAAttentionSpec
from vllm.v1.spec_decode.eagle import EagleProposer
from vllm.v1.worker.utils import AttentionGroup

from nsa_plugin.adapters.vllm.ledger import v1_patches
from nsa_plugin.core.errors import UnavailableError
from nsa_plugin.host import Host
from nsa_plugin.rigs.vllm.drafts import ATTENTION, BATCHES, BLOCK_SIZE, INDEXER, tiny_config
from nsa_plugin.rigs.vllm.stand_ins import without_compiled_flashmla
from nsa_plugin.settings import Settings

PADDING = "_determine_batch_execution_and_padding"
"""The proposer's method that says how many rows a draft step has."""
HIDDEN = 128
"""Hidden size of the tiny model."""
ADDRESSES = "addresses that a CUDA graph reads"
"""The field of a `Step` that differs from one proposer to the next."""
Step = dict[str, Any]
"""What a draft step was handed: field to value."""
MORE_BATCHES: tuple[tuple[Any, ...], ...] = (
    ([1022, 1023, 1024], [0, 0, 0], 7),
    ([200, 64, 90], None, 11, [1, 4, 2]),  # an unpadded drafter batch
    ([200, 64, 90, 333], [0, 0, 0, 0], 11, [1, 3, 64, 333]),  # two requests are in prefill
)
"""More batches of Model Runner V1. The last item, if there are four, is the query tokens of each request."""
ALL_BATCHES: tuple[tuple[Any, ...], ...] = (*BATCHES, *MORE_BATCHES)
"""Arguments of `V1Draft.propose`."""


class DraftModel(torch.nn.Module):
    """Writes down what the attention of a draft step would read.

    Attributes
    ----------
    seen : list of Step
        Copies of what each step was handed.
    handed : list of mapping of name to tensor
        What a CUDA graph of each step would read, itself.
    watch : bool
        False: write down nothing, to be timed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.seen: list[Step] = []
        self.handed: list[dict[str, torch.Tensor]] = []
        self.watch = True

    def forward(self, input_ids: Any, positions: Any, hidden_states: Any, inputs_embeds: Any = None) -> Any:
        """Record one step."""
        if self.watch:
            context = get_forward_context()
            slots = context.slot_mapping[ATTENTION]
            step: Step = {"positions": positions.clone(), "context slots": slots.clone()}
            step[ADDRESSES] = (positions.data_ptr(), slots.data_ptr())
            step["layers"] = sorted(context.attn_metadata)
            for name in (ATTENTION, INDEXER):
                step.update(fields(name.rsplit(".", 1)[1], context.attn_metadata[name]))
            self.seen.append(step)
            self.handed.append({"positions": positions, "slots": slots})
        return hidden_states.clone(), hidden_states.clone()

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Always token 7."""
        return torch.nn.functional.one_hot(torch.full((hidden.shape[0],), 7, device=hidden.device), 512).float()


def fields(prefix: str, value: Any) -> Step:
    """Every field of nested metadata by its dotted path, tensors copied; of a dataclass also its type."""
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
    cache_dtype, heads : as in `LAYOUTS`
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
        if cache_dtype != "auto" and device == "cpu":
            without_compiled_flashmla()
        sizes = {"max_num_seqs": 64, "max_num_batched_tokens": 1024}
        self.config = tiny_config(cache_dtype, heads, tokens, **{**sizes, **settings})
        self.config.compilation_config.static_forward_context[ATTENTION] = SimpleNamespace(
            prefill_backend=None, num_heads=heads
        )
        self.tokens = tokens
        with set_current_vllm_config(self.config):
            self.proposer = EagleProposer(self.config, self.device)
            self.proposer.model = self.model = DraftModel()
            self.proposer._draft_attn_layer_names = {ATTENTION, INDEXER}
            groups = [
                AttentionGroup(backend, [name], MLAAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=size, dtype=dtype), 0)
                for backend, name, size, dtype in (
                    (attention, ATTENTION, 576, torch.bfloat16),
                    (indexer.DeepseekV32IndexerBackend, INDEXER, 132, torch.uint8),
                )
            ]  # fmt: skip
            for group in groups:
                group.create_metadata_builders(self.config, self.device)
            self.proposer.draft_attn_groups = groups
            self.proposer.block_size = BLOCK_SIZE
        # as in the model runner: persistent, so that batches share addresses
        seqs, width = self.config.scheduler_config.max_num_seqs, self.config.model_config.max_model_len // BLOCK_SIZE
        self.block_table = torch.zeros(seqs, width, dtype=torch.int32, device=self.device)
        self.seq_lens = torch.zeros(seqs, dtype=torch.int32, device=self.device)

    def pad_to(self, sizes: Sequence[int]) -> None:
        """Pad the rows of each draft step as CUDA graphs of these sizes ask for; larger batches have no graph.

        Raises
        ------
        UnavailableError
            The proposer asks another method for its padding.
        """
        if not hasattr(self.proposer, PADDING):
            raise UnavailableError(
                f"looked for {type(self.proposer).__name__}.{PADDING}, found none: no padding to set"
            )

        def padded(tokens: int, use_cudagraphs: bool = True) -> tuple[CUDAGraphMode, int, None]:
            return CUDAGraphMode.NONE, min((size for size in sizes if size >= tokens), default=tokens), None

        setattr(self.proposer, PADDING, padded)

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

        Parameters
        ----------
        lengths : of each request, with the tokens that the target has just run
        rejected : of these, per request; None stands for an unpadded drafter batch
        first_block : of the first request; each has its blocks behind those of the one before
        queries : tokens of each request that the target has just run; by default a draft and one more
        tokens : to draft, by default as many as configured
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
        self.model.handed.clear()
        drafted = propose()
        expected = (len(lengths), self.proposer.num_speculative_tokens)
        if drafted.shape != expected:
            raise RuntimeError(f"expected draft tokens of shape {expected}, got {tuple(drafted.shape)}")
        return self.model.seen[1:]


@contextmanager
def patched(**settings: Any) -> Iterator[Host]:
    """Within it this package's patch of the proposer is installed, for a host with these `Settings`."""
    host, patch = Host(Settings(**settings)), v1_patches()
    patch.install(host)
    try:
        yield host
    finally:
        patch.undo()


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


def proposals(draft: V1Draft, batches: Any = ALL_BATCHES) -> list[Step]:
    """What every draft step of every batch was handed; no more tokens are rejected than there are."""
    seen = []
    for lengths, rejected, *rest in batches:
        fewer = None if rejected is None else [min(count, draft.tokens) for count in rejected]
        seen += draft.propose(lengths, fewer, *rest)
    return seen


def reference(draft: V1Draft, batches: Any = ALL_BATCHES) -> list[Step]:
    """vLLM's own rebuild at every step."""
    with caches_cleared():
        return proposals(draft, batches)
