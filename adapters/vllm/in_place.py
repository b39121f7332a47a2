"""Runs at start and at capture: the builders that get an update in place for Model Runner V2's fused draft, a row each.

A row says what the decode metadata of one token per request is made of. A field that is not in it may change from step to
step, so that a builder whose metadata has more is left to vLLM. All rows were read in vLLM's sources (`build` and what it
calls, and what the implementation reads), and are replayed with frozen metadata in `tests/vllm`.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nsa_plugin.adapters.probe import Need, missing
from nsa_plugin.adapters.vllm import releases

Changes = Literal["request map", "lengths and schedule", "nothing"]
"""What the builder itself derives from lengths or from the batch, and so has to be recomputed at each step."""
MLA = "vllm.v1.attention.backends.mla"


@dataclass(frozen=True)
class InPlace:
    """How one builder's captured metadata stays right.

    Attributes
    ----------
    backend : str
        vLLM's name for it.
    builder : str
        Dotted path of the builder; exactly that class, since others may build more.
    changes : Changes
    fields : mapping of str to frozenset of str
        By dotted path, every field that is a view of the runner's buffers, a constant of the captured size, depends on
        shapes alone, or is recomputed as `changes` says.
    needs : tuple of Need
    """

    backend: str
    builder: str
    changes: Changes
    fields: Mapping[str, frozenset[str]]
    needs: tuple[Need, ...]

    @property
    def module(self) -> str:
        """Where the builder is."""
        return self.builder.rpartition(".")[0]

    def refused(self, builder: Any) -> str:
        """Empty, or why a builder of this class is left to vLLM."""
        if problems := missing(self.needs):
            return problems[0]
        if problem := releases.uncovered_builder(builder):
            return problem
        if self.changes == "request map" and _hisparse(builder):
            return "HiSparse is not covered"
        if getattr(builder, "compress_ratio", 1) > 1:
            return "a compressed indexer cache has slots of its own, computed anew for every step"
        if getattr(builder, "non_causal_multi_token_decode", False):
            return "a non-causal draft keeps the rows that its first layer has flattened"
        return unknown_fields(self.fields)


def unknown_fields(fields: Mapping[str, frozenset[str]]) -> str:
    """Empty, or which fields the dataclasses at dotted paths have beside those that are known."""
    for path, known in fields.items():
        found = dataclasses.fields(pkgutil.resolve_name(path))
        if unknown := sorted({field.name for field in found} - known):
            return f"{path.rpartition('.')[2]} has fields that are not known here: {', '.join(unknown)}"
    return ""


def _hisparse(builder: Any) -> bool:
    if hasattr(builder, "use_hisparse"):
        return bool(builder.use_hisparse)
    settings = getattr(getattr(builder, "vllm_config", None), "attention_config", None)
    return getattr(settings, "hisparse_config", None) is not None


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


SPARSE = _names(
    "num_reqs max_query_len max_seq_len num_actual_tokens query_start_loc slot_mapping num_decodes num_decode_tokens num_prefills "
    "causal head_dim prefill decode block_table req_id_per_token seq_lens block_size topk_tokens decode_max_query_len "
    "prefill_max_seq_len cp_kv_cache_interleave_size"
)
"""Fields of sparse MLA metadata: views, constants, and the request map."""
DENSE = _names(
    "num_reqs max_query_len max_seq_len num_actual_tokens query_start_loc slot_mapping num_decodes num_decode_tokens num_prefills "
    "causal head_dim prefill decode"
)
"""Fields of dense MLA metadata: views and constants."""
DENSE_DECODE = _names("block_table seq_lens dcp_tot_seq_lens")
FLASHMLA_KERNEL = _names("scheduler_metadata dummy_block_table cache_lens")
"""FlashMLA's scheduler object depends on shapes alone: vLLM passes constants for lengths."""


def _sparse(backend: str, module: str, builder: str, metadata: str, fields: Mapping[str, frozenset[str]]) -> InPlace:
    read = ("req_id_per_token", "query_start_loc", "num_decode_tokens")
    why = "the request map, all that is the builder's own and depends on the batch"
    needs = (
        Need(f"{module}.{builder}.__init__", ("kv_cache_spec", "layer_names", "vllm_config", "device"),
             "decide per builder", hooked=True),
        Need(f"{module}.{metadata}", read, why),
    )  # fmt: skip
    paths = {f"{module}.{name}": known for name, known in fields.items()}
    return InPlace(backend, f"{module}.{builder}", "request map", paths, needs)


def _dense(backend: str, module: str, builder: str, decode: str = "", more: str = "") -> InPlace:
    common = "vllm.model_executor.layers.attention.mla_attention"
    path = f"{module}.{decode}" if decode else f"{common}.MLACommonDecodeMetadata"
    read = ("block_table", "seq_lens")
    needs = (
        Need(f"{module}.{builder}.build", ("common_attn_metadata",), "the metadata that stays (read)"),
        Need(path, read, "views of the runner's buffers"),
    )
    fields = {f"{common}.MLACommonMetadata": DENSE, path: DENSE_DECODE | _names(more)}
    return InPlace(backend, f"{module}.{builder}", "nothing", fields, needs)


FLASHMLA_SPARSE = _sparse(
    "FLASHMLA_SPARSE", releases.MODULE, "FlashMLASparseMetadataBuilder", "FlashMLASparseMetadata",
    {"FlashMLASparseMetadata": SPARSE | {"fp8_extra_metadata", "fp8_use_mixed_batch"},
     "FlashMLASparseMetadata.FP8KernelMetadata": FLASHMLA_KERNEL,
     "FlashMLASparseMetadata.FP8SeparatePrefillDecode": _names(
         "num_prefills num_decodes num_prefill_tokens num_decode_tokens decode prefill"),
     "FlashMLASparseMetadata.FP8SeparatePrefillDecode.Decode": _names("seq_lens kernel_metadata decode_query_len")},
)  # fmt: skip
INDEXER = InPlace(
    "DEEPSEEK_V32_INDEXER", releases.INDEXER, "lengths and schedule",
    {f"{releases.INDEXER_MODULE}.DeepseekV32IndexerMetadata": _names(
        "seq_lens max_seq_len slot_mapping num_decodes num_decode_tokens num_prefills num_prefill_tokens decode prefill "
        "positions block_table"),
     f"{releases.INDEXER_MODULE}.DeepSeekV32IndexerDecodeMetadata": releases.INDEXER_FIELDS},
    releases.INDEXER_NEEDS,
)  # fmt: skip
ESSENTIAL = (FLASHMLA_SPARSE, INDEXER)
"""What the draft of a DSA model has on Hopper; the indexer has an update of its own from vLLM 0.32 on."""

_FLASHINFER_SPARSE = f"{MLA}.flashinfer_mla_sparse"
_METADATA = "FlashInferMLASparseMetadata"
FLASHINFER_SPARSE = (
    _sparse("FLASHINFER_MLA_SPARSE_SM120", _FLASHINFER_SPARSE, "FlashInferMLASparseMetadataBuilder", _METADATA,
            {_METADATA: SPARSE}),
    _sparse("FLASHINFER_MLA_SPARSE", _FLASHINFER_SPARSE, "FlashInferMLASparseTRTLLMMetadataBuilder", _METADATA,
            {_METADATA: SPARSE}),
)  # fmt: skip
"""Sparse MLA of Blackwell; vLLM's second has an update of its own from 0.32 on."""
MORE = (
    *FLASHINFER_SPARSE,
    _dense("FLASHINFER_MLA", f"{MLA}.flashinfer_mla", "FlashInferMLAMetadataBuilder", "FlashInferMLADecodeMetadata",
           "flattened_block_table flattened_seq_lens flattened_row_req query_len query_start_loc max_query_len"),
    _dense("TOKENSPEED_MLA", f"{MLA}.tokenspeed_mla", "TokenspeedMLAMetadataBuilder"),
)  # fmt: skip
"""Further ones, each for itself. The dense ones are of Eagle drafts; for TRITON_MLA, whose metadata are the same, vLLM itself
has an update that does nothing."""
ROWS = {row.builder: row for row in (*ESSENTIAL, *MORE)}


def kind_of_group(builder: Any, metadata: Any, num_reqs: int) -> releases.Kind:
    """What of a group's rebuilt metadata changes from step to step, judged by its builder's row.

    `metadata` is what the group's builder made for `num_reqs` requests of one token each.
    """
    row = ROWS.get(f"{type(builder).__module__}.{type(builder).__qualname__}")
    if row is None or row.refused(builder) or getattr(metadata, "num_decode_tokens", None) != num_reqs:
        return "other"
    if row is INDEXER:
        return "indexer" if releases.is_plain_indexer(builder, metadata, num_reqs) else "other"
    if metadata.num_prefills:
        return "other"
    return "request map" if row.changes == "request map" else "nothing"
