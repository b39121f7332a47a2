"""Runs at start, at capture and where asked: the table of vLLM's metadata builders, one row per class.

Every row was read in vLLM's sources: `build` and what it calls, and what the attention implementation reads. Rows that are
served are replayed with frozen metadata in `tests/vllm`. A builder without a row is left to vLLM.

A draft is either the model's own MTP layer (sparse MLA and an indexer), or an Eagle model with dense MLA or grouped-query
attention. In all of them a draft step has one query token per request.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nsa_plugin.adapters.base import UNPROVED, Host
from nsa_plugin.adapters.probe import Need, missing
from nsa_plugin.adapters.vllm import builders_left_alone
from nsa_plugin.adapters.vllm.releases import FUSED_DRAFT, INDEXER_MODULE, MODULE
from nsa_plugin.adapters.vllm.v1.kept import Keeper, keep_indexer, keep_sparse

Changes = Literal["request map", "request map and plan", "lengths and schedule", "tail slots", "nothing", "other"]
"""What a builder derives from the lengths or from the batch, and so has to be recomputed at each draft step. All else in
its metadata is a view of the runner's buffers, a constant of the captured size, or depends on shapes alone. "other" is not
understood: vLLM's own code does it."""
Replaced = Literal["update", "rebuild"]
"""What of vLLM's own would run at a draft step without this adapter: a builder's update in place, or its `build`."""
MLA = "vllm.v1.attention.backends.mla"
MLA_COMMON = "vllm.model_executor.layers.attention.mla_attention"


@dataclass(frozen=True)
class Refusal:
    """A setting in which a builder is left to vLLM.

    Attributes
    ----------
    why : str
        For the log.
    holds : callable
        `holds(builder)`: whether the builder has that setting.
    """

    why: str
    holds: Callable[[Any], bool]


def refusal(refusals: tuple[Refusal, ...], holder: Any) -> str:
    """The first of `refusals` that holds for a builder, or for a configuration; empty if none does."""
    return next((each.why for each in refusals if each.holds(holder)), "")


def _above_one(*names: str) -> Callable[[Any], bool]:
    return lambda holder: any(getattr(holder, name, 1) > 1 for name in names)


def _has_hisparse(builder: Any) -> bool:
    settings = getattr(getattr(builder, "vllm_config", None), "attention_config", None)
    return bool(getattr(builder, "use_hisparse", False)) or getattr(settings, "hisparse_config", None) is not None


def _is_non_causal(builder: Any) -> bool:
    return bool(getattr(builder, "non_causal_multi_token_decode", False))


PARALLELISM = (
    Refusal("decode context parallelism is not covered", _above_one("dcp_world_size", "decode_context_parallel_size")),
    Refusal("prefill context parallelism is not covered", _above_one("pcp_world_size", "prefill_context_parallel_size")),
)  # fmt: skip
"""Of a builder, or of vLLM's `ParallelConfig`."""
HISPARSE = Refusal("HiSparse is not covered", _has_hisparse)
COMPRESSED = Refusal(
    "a compressed indexer cache has slots of its own, computed anew for every step", _above_one("compress_ratio")
)
POOLED_KEYS = Refusal(f"pooled index keys: {UNPROVED}", _above_one("compress_ratio"))
ALL_UNPROVED = Refusal(UNPROVED, lambda builder: True)
NON_CAUSAL = Refusal(
    "a non-causal draft keeps the rows that its first layer has flattened",
    _is_non_causal,
)


@dataclass(frozen=True)
class BuilderRow:
    """What is known of one class of metadata builders.

    Attributes
    ----------
    backends : tuple of str
        vLLM's names for the attention backends that have it, the best known first. A platform in parentheses is where
        vLLM gives another backend's name to this one.
    builder : str
        Dotted path of the class; exactly that class, since a subclass may build more.
    changes : Changes
        What this adapter writes at each step of Model Runner V2's drafts: in place where vLLM fuses the draft, into the
        first step's metadata where it does not.
    fields : mapping of str to frozenset of str
        By dotted path of a dataclass, all of its fields that are known. A field that is not named may change from step to
        step, so that metadata with more fields are left to vLLM.
    needs : tuple of Need
        What `changes` takes for granted.
    refusals : tuple of Refusal
        Settings that are not covered, by neither `changes` nor `keeper`.
    unproved : tuple of Refusal
        Settings that are covered in the fused draft, which no GPU has run yet: see `Host.takes_unproved`.
    stale : str
        What vLLM's own update in place leaves stale; empty if nothing is known. Where this adapter does not write it, it
        does not make a draft fused either: vLLM's rebuild is right.
    keeper : Keeper or None
        How Model Runner V1's draft keeps the metadata from step to step. None: vLLM rebuilds it at each step.
    left_alone : str
        Why this adapter does nothing for it, where `changes` is "other".
    gpus : frozenset of str, or None
        Where vLLM chooses it by itself for a DSA model's draft, as in `PathPlan`; None is everywhere.
    vllm_updates : bool
        Whether the newest tested vLLM itself updates it in place. `changes` then is for earlier releases, and for drafts
        that are not fused.
    """

    backends: tuple[str, ...]
    builder: str
    changes: Changes = "other"
    fields: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)
    needs: tuple[Need, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    unproved: tuple[Refusal, ...] = ()
    stale: str = ""
    keeper: Keeper | None = None
    left_alone: str = ""
    gpus: frozenset[str] | None = None
    vllm_updates: bool = False

    @property
    def backend(self) -> str:
        """The best known of its backends."""
        return self.backends[0]

    @property
    def module(self) -> str:
        """Where the builder is."""
        return self.builder.rpartition(".")[0]

    def uncovered(self, builder: Any) -> str:
        """Empty, or which setting of a builder, or which field of its metadata, is not covered."""
        return refusal(self.refusals, builder) or _unknown_fields(self.fields)

    def refused(self, builder: Any) -> str:
        """Empty, or why Model Runner V2's drafts leave a builder of this class to vLLM."""
        return next(iter(missing(self.needs)), "") or self.uncovered(builder)

    def left_by(self, host: Host, builder: Any) -> str:
        """Empty, or why a host does not serve a builder in a setting that no GPU has run yet."""
        return "" if host.takes_unproved else refusal(self.unproved, builder)


def _unknown_fields(fields: Mapping[str, frozenset[str]]) -> str:
    for path, known in fields.items():
        found = dataclasses.fields(pkgutil.resolve_name(path))
        if unknown := sorted({part.name for part in found} - known):
            return f"{path.rpartition('.')[2]} has fields that are not known here: {', '.join(unknown)}"
    return ""


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
    unproved=(POOLED_KEYS,),
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
    (*PARALLELISM, HISPARSE), (ALL_UNPROVED,), gpus=frozenset({"9"}),
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
    (TAIL_SLOTS,), PARALLELISM, (ALL_UNPROVED,),
    "vLLM's own update keeps the blocks of its last build. A graph then writes the tail of pooled index keys into the null "
    "block that was captured, or into blocks of requests of an earlier batch that no graph replayed",
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


def _dense(backend: str, module: str, builder: str, decode: str = "", more: str = "") -> BuilderRow:
    """The row of a builder of dense MLA; `decode`: its own dataclass for decodes, with `more` fields."""
    path = f"{module}.{decode}" if decode else f"{MLA_COMMON}.MLACommonDecodeMetadata"
    needs = (
        Need(f"{module}.{builder}.build", ("common_attn_metadata",), "the metadata that stays (read)"),
        Need(path, ("block_table", "seq_lens"), "views of the runner's buffers"),
    )
    fields = {f"{MLA_COMMON}.MLACommonMetadata": DENSE, path: DENSE_DECODE | _names(more)}
    return BuilderRow((backend,), f"{module}.{builder}", "nothing", fields, needs, (*PARALLELISM, NON_CAUSAL))


ESSENTIAL = (FLASHMLA_SPARSE, INDEXER)
"""What the draft of a DSA model has on Hopper: Model Runner V2's draft is patched for both, or not at all."""
MORE = (
    *FLASHINFER_SPARSE,
    _dense("FLASHINFER_MLA", f"{MLA}.flashinfer_mla", "FlashInferMLAMetadataBuilder", "FlashInferMLADecodeMetadata",
           "flattened_block_table flattened_seq_lens flattened_row_req query_len query_start_loc max_query_len"),
    _dense("TOKENSPEED_MLA", f"{MLA}.tokenspeed_mla", "TokenspeedMLAMetadataBuilder"),
)  # fmt: skip
"""Further ones that are served, each for itself."""

LEFT_ALONE = (
    *(
        BuilderRow(backends, builder, left_alone=why, gpus=builders_left_alone.CHOSEN_ON.get(builder, frozenset()))
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
    for row in (FLASHMLA_SPARSE, *POOLED, INDEXER):
        ours = getattr(update, "understood", None) == (row.changes, update)
        if ours or (row.vllm_updates and _is_vllms(update, builder, row)):
            left = refusal(PARALLELISM, builder) or row.left_by(host, builder)
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
    return "other" if row.refused(builder) or refusal(row.unproved, builder) else row.changes


def _is_plain_indexer(builder: Any, metadata: Any, num_reqs: int) -> bool:
    """Whether an indexer's metadata are those of decodes alone, one token each, with no field that is not known."""
    decode = metadata.decode
    return bool(
        metadata.num_decodes == num_reqs
        and decode is not None
        and {part.name for part in dataclasses.fields(decode)} <= INDEXER.fields[INDEXER_DECODE]
        and decode.seq_lens.numel() == num_reqs
    )
