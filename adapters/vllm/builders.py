"""Runs at start, at capture and where asked: the table of vLLM's metadata builders, one row per class.

Every row was read in vLLM's sources: `build` and what it calls, and what the attention implementation reads. Rows that are
served are replayed with frozen metadata in `tests/vllm`. A builder without a row is left to vLLM.

A draft is either the model's own MTP layer (sparse MLA and an indexer), or an Eagle model with dense MLA or grouped-query
attention. In all of them a draft step has one query token per request.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Mapping
from typing import Any

from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.probe import Need
from nsa_plugin.adapters.vllm import builders_left_alone
from nsa_plugin.adapters.vllm.builder_rows import (
    BuilderRow,
    Changes,
    Refusal,
    Replaced,
    above_one,
    refusal,
)
from nsa_plugin.adapters.vllm.releases import FUSED_DRAFT, FUSED_UPDATE, INDEXER_MODULE, MODULE
from nsa_plugin.adapters.vllm.schedules import FLASHMLA, NOT_KEPT, SCHEDULES, UNVERIFIED
from nsa_plugin.adapters.vllm.v1.kept import Keeper, keep_indexer, keep_sparse

MLA = "vllm.v1.attention.backends.mla"
MLA_COMMON = "vllm.model_executor.layers.attention.mla_attention"


def _has_hisparse(builder: Any) -> bool:
    settings = getattr(getattr(builder, "vllm_config", None), "attention_config", None)
    return bool(getattr(builder, "use_hisparse", False)) or getattr(settings, "hisparse_config", None) is not None


def _is_batch_invariant(builder: Any) -> bool:
    return bool(pkgutil.resolve_name("vllm.envs").VLLM_BATCH_INVARIANT)


def _uses_data_parallelism(builder: Any) -> bool:
    parallel = getattr(getattr(builder, "vllm_config", None), "parallel_config", None)
    return bool(getattr(parallel, "data_parallel_size", 1) > 1)


def _uses_pcp(builder: Any) -> bool:
    return bool(getattr(builder, "use_pcp", False))


def _is_non_causal(builder: Any) -> bool:
    return bool(getattr(builder, "non_causal_multi_token_decode", False))


PARALLELISM = (
    Refusal("decode context parallelism is not covered", above_one("dcp_world_size", "decode_context_parallel_size")),
    Refusal("prefill context parallelism is not covered", above_one("pcp_world_size", "prefill_context_parallel_size")),
)  # fmt: skip
"""Of a builder, or of vLLM's `ParallelConfig`."""
HISPARSE = Refusal("HiSparse is not covered", _has_hisparse)
PLANS_ALONE = Refusal(
    "data parallelism is not covered: a rank whose plan failed would leave its graph, and the others in their collectives",
    _uses_data_parallelism,
)
COMPRESSED = Refusal(
    "a compressed indexer cache has slots of its own, computed anew for every step", above_one("compress_ratio")
)
SCHEDULED = (
    Refusal("prefill context parallelism is not covered", _uses_pcp),
    Refusal("VLLM_BATCH_INVARIANT is not covered", _is_batch_invariant),
)
"""Of builders of dense MLA whose schedules are made in place."""
NON_CAUSAL = Refusal(
    "a non-causal draft keeps the rows that its first layer has flattened",
    _is_non_causal,
)


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


SPARSE = _names(
    "num_reqs max_query_len max_seq_len num_actual_tokens query_start_loc slot_mapping num_decodes num_decode_tokens num_prefills "
    "causal head_dim prefill decode block_table req_id_per_token seq_lens block_size topk_tokens decode_max_query_len "
    "prefill_max_seq_len cp_kv_cache_interleave_size"
)
"""Fields of sparse MLA metadata: views, constants, and the request map."""
FLASHMLA_KERNEL = _names("scheduler_metadata dummy_block_table cache_lens")
"""FlashMLA's scheduler object depends on shapes alone: vLLM passes constants for lengths."""


def _sparse(
    backend: str, module: str, builder: str, metadata: str, fields: Mapping[str, frozenset[str]], vllm_updates: bool = False
) -> BuilderRow:  # fmt: skip
    """The row of a builder of sparse MLA; `metadata` and the keys of `fields` are dataclasses of its module."""
    needs = (
        Need(f"{module}.{builder}.__init__", ("kv_cache_spec", "layer_names", "vllm_config", "device"),
             "decide per builder", hooked=True),
        Need(f"{module}.{metadata}", ("req_id_per_token", "query_start_loc", "num_decode_tokens"),
             "the request map, all that is the builder's own and depends on the batch"),
    )  # fmt: skip
    keeping = Need(
        f"{module}.{metadata}",
        ("seq_lens", "req_id_per_token", "max_seq_len", "num_prefills", "num_decode_tokens", "prefill"),
        "lengths and request map of a draft step",
    )
    paths = {f"{module}.{name}": known for name, known in fields.items()}
    return BuilderRow(
        (backend,), f"{module}.{builder}", "request map", paths, needs, (*PARALLELISM, HISPARSE),
        keeper=Keeper((keeping,), keep_sparse), vllm_updates=vllm_updates,
    )  # fmt: skip


FLASHMLA_SPARSE = _sparse(
    "FLASHMLA_SPARSE", MODULE, "FlashMLASparseMetadataBuilder", "FlashMLASparseMetadata",
    {"FlashMLASparseMetadata": SPARSE | {"fp8_extra_metadata", "fp8_use_mixed_batch"},
     "FlashMLASparseMetadata.FP8KernelMetadata": FLASHMLA_KERNEL,
     "FlashMLASparseMetadata.FP8SeparatePrefillDecode": _names(
         "num_prefills num_decodes num_prefill_tokens num_decode_tokens decode prefill"),
     "FlashMLASparseMetadata.FP8SeparatePrefillDecode.Decode": _names("seq_lens kernel_metadata decode_query_len")},
)  # fmt: skip
FLASHINFER_SPARSE = (
    _sparse("FLASHINFER_MLA_SPARSE_SM120", f"{MLA}.flashinfer_mla_sparse", "FlashInferMLASparseMetadataBuilder",
            "FlashInferMLASparseMetadata", {"FlashInferMLASparseMetadata": SPARSE}),
    _sparse("FLASHINFER_MLA_SPARSE", f"{MLA}.flashinfer_mla_sparse", "FlashInferMLASparseTRTLLMMetadataBuilder",
            "FlashInferMLASparseMetadata", {"FlashInferMLASparseMetadata": SPARSE}, vllm_updates=True),
)  # fmt: skip
"""Sparse MLA of Blackwell; vLLM's second has an update of its own from 0.32 on."""

INDEXER_DECODE = f"{INDEXER_MODULE}.DeepSeekV32IndexerDecodeMetadata"
SCHEDULE = Need(
    f"{INDEXER_MODULE}.get_paged_mqa_logits_metadata", ("context_lens", "block_size", "num_sms", "indices"),
    "DeepGEMM's schedule, which stays a call of its own",
)  # fmt: skip
INDEXER = BuilderRow(
    ("DEEPSEEK_V32_INDEXER", "DEEPSEEK_V4_INDEXER", "DEEPSEEK_V41_INDEXER"),
    f"{INDEXER_MODULE}.DeepseekV32IndexerMetadataBuilder",
    "lengths and schedule",
    {f"{INDEXER_MODULE}.DeepseekV32IndexerMetadata": _names(
        "seq_lens max_seq_len slot_mapping num_decodes num_decode_tokens num_prefills num_prefill_tokens decode prefill "
        "positions block_table"),
     INDEXER_DECODE: _names(
        "block_table seq_lens decode_lens requires_padding schedule_metadata global_seq_lens per_req_decode_lens "
        "decode_is_uniform write_max_decode_len indices")},
    (Need(f"{INDEXER_MODULE}.DeepseekV32IndexerMetadataBuilder._prepare_decode_tensors",
          ("seq_lens", "block_table", "decode_lens"), "the lengths and rows of decode tokens, as the update takes them to be"),
     Need(f"{INDEXER_MODULE}.DeepseekV32IndexerMetadata",
          ("seq_lens", "num_decodes", "num_decode_tokens", "num_prefills", "decode"), "the lengths that a draft moves on"),
     Need(INDEXER_DECODE, ("block_table", "seq_lens", "decode_lens", "schedule_metadata", "indices"),
          "what of the indexer follows from them"),
     SCHEDULE),
    (*PARALLELISM, COMPRESSED),
    keeper=Keeper(
        (Need(f"{INDEXER_MODULE}.DeepseekV32IndexerMetadata",
              ("seq_lens", "max_seq_len", "num_decode_tokens", "decode", "prefill"), "lengths of a draft step"),
         Need(INDEXER_DECODE,
              ("block_table", "seq_lens", "decode_lens", "schedule_metadata", "indices", "global_seq_lens"),
              "lengths and schedule of a draft step"),
         SCHEDULE),
        keep_indexer),
    vllm_updates=True,
)  # fmt: skip
"""It has an update of its own from vLLM 0.32 on. In the fused draft a compressed cache is covered, too."""

_SM90 = f"{MLA}.flashinfer_mla_sparse_sm90"
FLASHINFER_SPARSE_SM90 = BuilderRow(
    ("FLASHINFER_MLA_SPARSE_SM90",), f"{_SM90}.FlashInferMLASparseSM90Builder", "request map and plan",
    {f"{_SM90}.FlashInferMLASparseSM90Metadata": SPARSE | {"state"}},
    (Need(f"{_SM90}.FlashInferMLASparseSM90Metadata", ("req_id_per_token", "query_start_loc", "seq_lens", "num_decode_tokens"),
          "the batch that the plan is clamped to"),
     Need(f"{_SM90}._SM90State._clamp_kv_end", ("cam", "req_id_per_token"), "clamp the plan to a step's lengths"),
     Need(f"{_SM90}._SM90State.plan", ("num_tokens", "kv_lens", "cam", "req_id_per_token"),
          "plan for the lengths of all steps before the draft"),
     FUSED_DRAFT),
    (*PARALLELISM, HISPARSE, PLANS_ALONE), proved=False, gpus=frozenset({"9"}),
)  # fmt: skip
"""It plans on the host. One plan, made before each draft, serves all steps: each clamps it on the device to its lengths."""
TAIL_SLOTS = Need(
    f"{INDEXER_MODULE}.compute_kpool_tail_slot_mapping",
    ("slot_mapping", "block_table", "query_start_loc", "positions", "num_actual_tokens", "num_reqs", "kpool", "out"),
    "the slots of tokens in pools that are not complete",
)
KPOOL_TAIL = BuilderRow(
    ("KPOOL_TAIL",), f"{INDEXER_MODULE}.KpoolTailMetadataBuilder", "tail slots",
    {f"{INDEXER_MODULE}.DeepseekV32IndexerMetadata": INDEXER.fields[f"{INDEXER_MODULE}.DeepseekV32IndexerMetadata"]},
    (TAIL_SLOTS,), PARALLELISM,
    stale="vLLM's own update keeps the blocks of its last build. A graph then writes the tail of pooled index keys into the "
          "null block that was captured, or into blocks of requests of an earlier batch that no graph replayed",
    gpus=frozenset({"9", "10"}), vllm_updates=True,
)  # fmt: skip
POOLED = (FLASHINFER_SPARSE_SM90, KPOOL_TAIL)
"""What the draft of a model with pooled index keys has on Hopper besides an indexer, from vLLM 0.32 on."""

DENSE = _names(
    "num_reqs max_query_len max_seq_len num_actual_tokens query_start_loc slot_mapping num_decodes num_decode_tokens num_prefills "
    "causal head_dim prefill decode"
)
"""Fields of dense MLA metadata: views and constants."""
DENSE_DECODE = _names("block_table seq_lens dcp_tot_seq_lens")


def _dense(
    backend: str, module: str, builder: str, decode: str = "", more: str = "", changes: Changes = "nothing",
    further: tuple[Need, ...] = (), **settings: Any,
) -> BuilderRow:  # fmt: skip
    """The row of a builder of dense MLA; `decode`: its own dataclass for decodes, with `more` fields."""
    path = f"{module}.{decode}" if decode else f"{MLA_COMMON}.MLACommonDecodeMetadata"
    needs = (
        Need(f"{module}.{builder}.build", ("common_attn_metadata",), "the metadata that stays (read)"),
        Need(path, ("block_table", "seq_lens"), "views of the runner's buffers"),
        *further,
    )
    refusals = (*PARALLELISM, NON_CAUSAL, *(SCHEDULED if changes in SCHEDULES else ()))
    fields = {f"{MLA_COMMON}.MLACommonMetadata": DENSE, path: DENSE_DECODE | _names(more)}
    return BuilderRow((backend,), f"{module}.{builder}", changes, fields, needs, refusals, **settings)


_SCHEDULED = {"unverified": UNVERIFIED, "not_kept": NOT_KEPT}
FLASH_ATTN_MLA = _dense(
    "FLASH_ATTN_MLA", f"{MLA}.flashattn_mla", "FlashAttnMLAMetadataBuilder", "FlashAttnMLADecodeMetadata",
    "query_start_loc max_query_len max_seq_len scheduler_metadata max_num_splits", "FlashAttention schedule",
    (FUSED_UPDATE,
     Need(f"{MLA}.flashattn_mla.FlashAttnMLAMetadataBuilder._schedule_decode",
          ("num_reqs", "cu_query_lens", "max_query_len", "seqlens", "max_seq_len", "causal", "max_num_splits"),
          "FlashAttention's schedule, which stays a call of its own")),
    **_SCHEDULED, gpus=frozenset({"9"}),
)  # fmt: skip
FLASHMLA_DENSE = _dense(
    "FLASHMLA", FLASHMLA, "FlashMLAMetadataBuilder", "FlashMLADecodeMetadata", "scheduler_metadata", "FlashMLA schedule",
    (FUSED_UPDATE,
     Need(f"{FLASHMLA}.FlashMLASchedMeta", (), "what the first layer of a step fills, for a bf16 cache"),
     Need(f"{FLASHMLA}.get_mla_metadata_dense_fp8", ("cache_seqlens", "num_q_tokens_per_head_k", "num_heads_k"),
          "FlashMLA's schedule for an fp8 cache, which stays a call of its own")),
    **_SCHEDULED, gpus=frozenset({"9", "10"}),
)  # fmt: skip
"""Dense MLA of Hopper: DeepSeek V3, R1 and their like with MTP. From vLLM 0.32 on."""


SCHEDULED_DENSE = (FLASH_ATTN_MLA, FLASHMLA_DENSE)
ESSENTIAL = (FLASHMLA_SPARSE, INDEXER)
"""What the draft of a DSA model has on Hopper: Model Runner V2's draft is patched for both, or not at all."""
MORE = (
    *FLASHINFER_SPARSE,
    _dense("FLASHINFER_MLA", f"{MLA}.flashinfer_mla", "FlashInferMLAMetadataBuilder", "FlashInferMLADecodeMetadata",
           "flattened_block_table flattened_seq_lens flattened_row_req query_len query_start_loc max_query_len"),
    _dense("TOKENSPEED_MLA", f"{MLA}.tokenspeed_mla", "TokenspeedMLAMetadataBuilder"),
    *SCHEDULED_DENSE,
)  # fmt: skip
"""Further ones that are served, each for itself."""

LEFT_ALONE = (
    *(
        BuilderRow(backends, builder, left_alone=why, gpus=frozenset())
        for builder, backends, why in builders_left_alone.REBUILT
    ),
    *(BuilderRow(backends, builder, left_alone=why, vllm_updates=True)
      for builder, backends, why in builders_left_alone.UPDATED),
)  # fmt: skip
"""Neither updated in place nor kept by this adapter."""
REBUILT = tuple(row for row in LEFT_ALONE if not row.vllm_updates)
"""Those whose metadata vLLM itself rebuilds for each step of Model Runner V2's drafts, which it then does not fuse."""
NOT_EXAMINED = "not examined"
ROWS = {row.builder: row for row in (*ESSENTIAL, *MORE, *POOLED, *LEFT_ALONE)}


FUSED_ALONE = frozenset({*SCHEDULES, "request map and plan", "tail slots"})
"""Changes that are written in the fused draft alone. A rebuild may put a new schedule or plan elsewhere, and `tail slots`
go with pooled index keys, whose indexer has slots of its own."""


def row_of(builder: Any) -> BuilderRow:
    """The row of a builder's exact class; one that leaves it alone, if the table has none."""
    path = f"{type(builder).__module__}.{type(builder).__qualname__}"
    return ROWS.get(path, BuilderRow((), path, left_alone=NOT_EXAMINED))


def changes_of(builder: Any, metadata: Any, num_reqs: int, instead_of: Replaced, host: Host) -> Changes:
    """What changes from step to step in the metadata of an attention group.

    The answer depends on what would run without this adapter, so the question has two forms:

    - "update": a fused draft, in which every builder updates its metadata in place. The method that would run counts. A
      subclass that inherits it is understood; a builder with a method of its own is not, nor is one whose method another
      plugin has wrapped. An update that does nothing is called as it is.
    - "rebuild": a draft that is not fused, in which `build` would run. The builder's row counts, and so its exact class,
      since a subclass may build more.

    Parameters
    ----------
    builder : AttentionMetadataBuilder
    metadata : object
        What the builder made for `num_reqs` requests of one token each.
    num_reqs : int
    instead_of : "update" or "rebuild"
    host : Host
        Says whether what no GPU has run is understood, too.
    """
    if getattr(metadata, "num_decode_tokens", None) != num_reqs:
        return "other"
    changes = _by_update(builder, host) if instead_of == "update" else _by_row(builder)
    if changes == "other" or metadata.num_prefills:
        return "other"
    if changes == "lengths and schedule" and not _is_plain_indexer(builder, metadata, num_reqs):
        return "other"
    return changes


def _by_update(builder: Any, host: Host) -> Changes:
    update = getattr(type(builder), "update_draft_decode_metadata", None)
    for row in (FLASHMLA_SPARSE, *POOLED, INDEXER, *SCHEDULED_DENSE):
        ours = getattr(update, "understood", None) == (row.changes, update)
        if ours or (row.vllm_updates and _is_vllms(update, builder, row)):
            left = refusal(PARALLELISM, builder) or row.left_by(host)
            return "other" if left else row.changes
    return "other"


def _is_vllms(update: Any, builder: Any, row: BuilderRow) -> bool:
    """Whether a builder's update in place is that of the row's class, be it the builder's own class or one that it derives from."""
    return any(
        f"{kind.__module__}.{kind.__qualname__}" == row.builder
        and vars(kind).get("update_draft_decode_metadata") is update
        for kind in type(builder).__mro__
    )


def _by_row(builder: Any) -> Changes:
    row = row_of(builder)
    return "other" if row.changes in FUSED_ALONE or row.refused(builder) else row.changes


def _is_plain_indexer(builder: Any, metadata: Any, num_reqs: int) -> bool:
    """Whether an indexer's metadata are those of decodes alone, one token each, with no field that is not known."""
    decode = metadata.decode
    return bool(
        metadata.num_decodes == num_reqs
        and decode is not None
        and {part.name for part in dataclasses.fields(decode)} <= INDEXER.fields[INDEXER_DECODE]
        and decode.seq_lens.numel() == num_reqs
    )
