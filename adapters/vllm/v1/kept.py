"""Runs at every draft: what the draft metadata of Model Runner V1 keeps from step to step, builder by builder.

A draft step has one query token per request, whatever came before. For the builders in `KEPT`, all that then changes
from step to step are the sequence lengths, and the indexer's DeepGEMM schedule that follows from them; all that changes
from draft to draft are values in buffers that keep their addresses. So vLLM's own builder is asked once per batch size,
and its answer is kept, with every buffer that it writes for other batches too replaced by one that only draft steps use.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nsa_plugin.adapters.probe import Need, missing
from nsa_plugin.adapters.vllm.deep_gemm import scheduler
from nsa_plugin.adapters.vllm.in_place import FLASHINFER_SPARSE, FLASHMLA_SPARSE, INDEXER, InPlace, unknown_fields
from nsa_plugin.adapters.vllm.releases import INDEXER_MODULE, maps_blocks, ones_of, uncovered_builder


@dataclass(frozen=True)
class DecodeBatch:
    """A batch of one query token per request, as kept metadata refers to it.

    Attributes
    ----------
    size : int
        Requests.
    seq_lens : sequence of int32 tensor [size]
        Lengths at each draft step, each in a place of its own.
    block_table : int32 tensor [size, blocks]
    request_map, ones : int32 tensors [size]
        0, 1, 2, …: the request of each token; and the query length of each request.
    """

    size: int
    seq_lens: Sequence[torch.Tensor]
    block_table: torch.Tensor
    request_map: torch.Tensor
    ones: torch.Tensor


@dataclass(frozen=True)
class KeptSteps:
    """The metadata of every draft step of one attention group."""

    steps: Sequence[Any]
    refresh: Callable[[Any], None] | None

    def at(self, step: int, max_seq_len: int) -> Any:
        """The metadata of a draft step, right for the lengths that are there now."""
        metadata = self.steps[step]
        metadata.max_seq_len = max_seq_len
        if self.refresh is not None:
            self.refresh(metadata)
        return metadata


@dataclass(frozen=True)
class Keeper:
    """How one builder's metadata is kept.

    Attributes
    ----------
    needs : tuple of Need
        What it takes for granted.
    fields : mapping of str to frozenset of str
        Every field that the metadata may have, by dotted path: one that is not known here may change from step to step.
    refused : callable
        `refused(builder)`: empty, or why this one is left to vLLM.
    keep : callable
        `keep(builder, built, batch)`: the steps, from what vLLM built for the first one; None if they can't be kept.
    """

    needs: tuple[Need, ...]
    fields: Mapping[str, frozenset[str]]
    refused: Callable[[Any], str]
    keep: Callable[[Any, Any, DecodeBatch], KeptSteps | None]


def keeper_of(group: Any) -> tuple[Keeper | None, str]:
    """The keeper of an attention group, or None and why vLLM rebuilds its metadata at each draft step."""
    builder = group.get_metadata_builder()
    kind = type(builder)
    keeper = KEPT.get(f"{kind.__module__}.{kind.__qualname__}")
    if keeper is None:
        return None, f"{kind.__name__}: {REBUILT.get(kind.__name__, 'not examined')}"
    if problems := missing(keeper.needs):
        return None, f"{kind.__name__}: {'; '.join(problems)}"
    if maps_blocks(group):
        return None, f"{kind.__name__}: its block table is mapped to kernel blocks anew for every build"
    problem = keeper.refused(builder) or unknown_fields(keeper.fields)
    return (None, f"{kind.__name__}: {problem}") if problem else (keeper, "")


def _sparse_refused(builder: Any) -> str:
    settings = builder.vllm_config.attention_config
    hisparse = getattr(settings, "hisparse_config", None) is not None
    return uncovered_builder(builder) or ("HiSparse is not covered" if hisparse else "")


def _keep_sparse(builder: Any, built: Any, batch: DecodeBatch) -> KeptSteps | None:
    """Kept: counts, views of the proposer's buffers, the block table, constants, and FlashMLA's scheduler object.

    FlashMLA lets that object be reused while shapes, `cache_seqlens` and `topk_length` stay the same: vLLM passes a
    constant for the one and nothing for the other.
    """
    if built.num_prefills or built.num_decode_tokens != batch.size or built.prefill is not None:
        return None
    steps = []
    for seq_lens in batch.seq_lens:
        step = copy.copy(built)
        step.seq_lens = seq_lens
        step.req_id_per_token = batch.request_map
        decode = getattr(getattr(built, "fp8_extra_metadata", None), "decode", None)
        if decode is not None:  # FlashMLA with separate prefill and decode
            step.fp8_extra_metadata = copy.copy(built.fp8_extra_metadata)
            step.fp8_extra_metadata.decode = dataclasses.replace(decode, seq_lens=seq_lens)
        steps.append(step)
    return KeptSteps(steps, None)


def _indexer_refused(builder: Any) -> str:
    if builder.compress_ratio > 1:
        return "a compressed indexer cache has slots of its own, computed anew for every step"
    return uncovered_builder(builder)


def _keep_indexer(builder: Any, built: Any, batch: DecodeBatch) -> KeptSteps | None:
    """Kept: all but lengths and schedule. The block table is the batch's, of which flattening makes a copy."""
    decode = built.decode
    if built.prefill is not None or decode is None or built.num_decode_tokens != batch.size:
        return None
    if decode.global_seq_lens is not None or decode.block_table.shape != batch.block_table.shape:
        return None
    steps = []
    for seq_lens in batch.seq_lens:
        step = copy.copy(built)
        step.seq_lens = seq_lens
        step.decode = dataclasses.replace(
            decode,
            seq_lens=seq_lens.unsqueeze(-1),
            block_table=batch.block_table,
            **dict.fromkeys(ones_of(decode), batch.ones),
            indices=None if decode.indices is None else batch.request_map,
        )
        steps.append(step)
    return KeptSteps(steps, _schedule(builder))


def _schedule(builder: Any) -> Callable[[Any], None] | None:
    """Recomputes DeepGEMM's schedule where the builder has one."""
    schedule = scheduler(builder)
    if schedule is None:
        return None

    def refresh(metadata: Any) -> None:
        metadata.decode.schedule_metadata = schedule(metadata.decode)

    return refresh


def _sparse(row: InPlace, metadata: str) -> Keeper:
    needs = ("seq_lens", "req_id_per_token", "max_seq_len", "num_prefills", "num_decode_tokens", "prefill")
    why = "lengths and request map of a draft step"
    return Keeper((Need(f"{row.module}.{metadata}", needs, why),), row.fields, _sparse_refused, _keep_sparse)


KEPT: dict[str, Keeper] = {
    FLASHMLA_SPARSE.builder: _sparse(FLASHMLA_SPARSE, "FlashMLASparseMetadata"),
    **{row.builder: _sparse(row, "FlashInferMLASparseMetadata") for row in FLASHINFER_SPARSE},
    INDEXER.builder: Keeper(
        (Need(f"{INDEXER_MODULE}.DeepseekV32IndexerMetadata",
              ("seq_lens", "max_seq_len", "num_decode_tokens", "decode", "prefill"), "lengths of a draft step"),
         Need(f"{INDEXER_MODULE}.DeepSeekV32IndexerDecodeMetadata",
              ("block_table", "seq_lens", "decode_lens", "schedule_metadata", "indices", "global_seq_lens"),
              "lengths and schedule of a draft step"),
         Need(f"{INDEXER_MODULE}.get_paged_mqa_logits_metadata", ("context_lens", "block_size", "num_sms", "indices"),
              "DeepGEMM's schedule of a draft step")),
        INDEXER.fields, _indexer_refused, _keep_indexer),
}  # fmt: skip
"""Builders (their exact classes) whose metadata is kept."""

REBUILT: dict[str, str] = {
    "FlashAttnMLASparseMetadataBuilder": "not shown right: it needs compiled kernels to be imported",
    "FlashInferMLASparseSM90Builder": "it plans on the host from each step's lengths",
    "KpoolTailMetadataBuilder": "its slots come from positions that every step computes anew",
    "FlashAttentionMetadataBuilder": "its schedule depends on each step's lengths",
    "FlashInferMetadataBuilder": "it plans on the host from each step's lengths",
    "FlashMLAMetadataBuilder": "its tile schedule depends on each step's lengths",
}
"""Builders that vLLM asks again at every draft step, and why; those in neither table have not been examined."""
