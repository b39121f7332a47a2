"""Runs at start: the rows of `builders` that this adapter leaves alone: builder, backends that have it, and why.

As of vLLM 0.33.0. Data for `builders.LEFT_ALONE`; nothing else reads it.
"""

from __future__ import annotations

BACKENDS = "vllm.v1.attention.backends"
MLA = f"{BACKENDS}.mla"
Rows = tuple[tuple[str, tuple[str, ...], str], ...]

_DENSE = "for Eagle drafts with dense MLA"
_GROUPED = "for Eagle drafts with grouped-query attention"
_BY_NAME = f"{_GROUPED}, and only where asked for by name"
_STATES = "recurrent state, which no draft of a DSA model has; a builder that copies state indices for every batch"
_CPU = "of CPUs, where vLLM captures no CUDA graphs, so that there is no draft to fuse"
_AMD = "of AMD GPUs, on which this adapter's kernels have not run"
_INTEL = "of Intel GPUs"
_OWN = "vLLM updates it in place itself in Model Runner V2; what Model Runner V1 rebuilds was not examined"

REBUILT: Rows = (
    (f"{MLA}.flashattn_mla.XPUFlashAttnMLAMetadataBuilder", ("FLASH_ATTN_MLA (XPU)",),
     f"{_INTEL}, on which this adapter's kernels have not run"),
    (f"{MLA}.cutlass_mla.CutlassMLAMetadataBuilder", ("CUTLASS_MLA",),
     f"{_DENSE}, never chosen by itself (FLASHINFER_MLA has the same GPUs and comes first): it takes KV blocks of 128 tokens, the "
     "DSA indexer 64, and vLLM does not put the two into one group of 64"),
    (f"{BACKENDS}.b12x.B12xPagedMetadataBuilder", ("B12X",),
     f"{_BY_NAME}, on SM120: its metadata are views, but its plans, prepared per batch size, have no CPU to be shown right on"),
    (f"{BACKENDS}.hpc_attn.HpcAttnMetadataBuilder", ("HPC_ATTN",),
     f"{_BY_NAME}, on Hopper: a compiled kernel assigns decode tasks from each step's lengths"),
    (f"{BACKENDS}.turboquant_attn.TurboQuantMetadataBuilder", ("TURBOQUANT", "ULTRAQUANT"),
     f"{_GROUPED} over a turboquant_* or ultraquant_4bit cache, which no sparse MLA backend reads: its metadata keep lengths on "
     "the host"),
    (f"{BACKENDS}.flex_attention.FlexAttentionMetadataBuilder", ("FLEX_ATTENTION",),
     f"{_GROUPED} where nothing faster fits: it builds a block mask and an inverse block table from each step's lengths"),
    (f"{BACKENDS}.composite.create_composite_attention_backend.<locals>.CompositeAttentionMetadataBuilder", (),
     "it hands each batch to one of two builders"),
    (f"{BACKENDS}.linear_attn.LinearAttentionMetadataBuilder", ("LINEAR_ATTN",), _STATES),
    (f"{BACKENDS}.linear_attn.BailingLinearAttentionMetadataBuilder", ("BAILING_LINEAR_ATTN",), _STATES),
    (f"{BACKENDS}.gdn_attn.GDNAttentionMetadataBuilder", ("GDN_ATTN",), _STATES),
    (f"{BACKENDS}.mamba1_attn.Mamba1AttentionMetadataBuilder", ("MAMBA1_ATTN",), _STATES),
    (f"{BACKENDS}.mamba2_attn.Mamba2AttentionMetadataBuilder", ("MAMBA2_ATTN",), _STATES),
    (f"{BACKENDS}.short_conv_attn.ShortConvAttentionMetadataBuilder", ("SHORT_CONV_ATTN",), _STATES),
    (f"{BACKENDS}.short_conv_attn.PleShortConvAttentionMetadataBuilder", ("PLE_SHORT_CONV_ATTN",), _STATES),
    (f"{BACKENDS}.cpu_attn.CPUAttentionMetadataBuilder", ("CPU_ATTN",), _CPU),
    ("vllm.model_executor.layers.attention.mla_attention.MLACommonMetadataBuilder", ("CPU_MLA",), _CPU),
    (f"{MLA}.amx_mla.AMXMLAMetadataBuilder", ("AMX_MLA",), _CPU),
    (f"{MLA}.xpu_mla_sparse.XPUMLASparseMetadataBuilder", ("XPU_MLA_SPARSE",),
     f"{_INTEL}: its builder says that it supports no CUDA graphs, and makes the request map on the host"),
    (f"{BACKENDS}.rocm_attn.RocmAttentionMetadataBuilder", ("ROCM_ATTN",), _AMD),
    (f"{BACKENDS}.rocm_aiter_unified_attn.RocmAiterUnifiedAttentionMetadataBuilder", ("ROCM_AITER_UNIFIED_ATTN",), _AMD),
    (f"{BACKENDS}.rocm_segmented_attn.RocmSegmentedAttentionMetadataBuilder", ("ROCM_SEGMENTED_ATTN",), _AMD),
    (f"{BACKENDS}.rocm_aiter_fa.AiterFlashAttentionMetadataBuilder", ("FLASH_ATTN (ROCm)",), _AMD),
    (f"{MLA}.rocm_aiter_mla.AiterMLAMetadataBuilder", ("ROCM_AITER_MLA", "AITER_TRITON_MLA"), _AMD),
    (f"{MLA}.rocm_aiter_mla_sparse.ROCMAiterMLASparseMetadataBuilder", ("ROCM_AITER_MLA_SPARSE",), _AMD),
)  # fmt: skip
"""Those whose metadata vLLM rebuilds for each step of either model runner's drafts."""

UPDATED: Rows = (
    (f"{BACKENDS}.flash_attn.FlashAttentionMetadataBuilder", ("FLASH_ATTN", "FLASH_ATTN_DIFFKV"),
     "its schedule depends on each step's lengths"),
    (f"{BACKENDS}.flashinfer.FlashInferMetadataBuilder", ("FLASHINFER",), "it plans on the host from each step's lengths"),
    (f"{BACKENDS}.triton_attn.TritonAttentionMetadataBuilder", ("TRITON_ATTN",), _OWN),
    (f"{BACKENDS}.triton_attn_diffkv.TritonAttentionDiffKVMetadataBuilder", ("TRITON_ATTN_DIFFKV",), _OWN),
    (f"{MLA}.triton_mla.TritonMLAMetadataBuilder", ("TRITON_MLA",), _OWN),
    (f"{MLA}.flashattn_mla_sparse.FlashAttnMLASparseMetadataBuilder", ("FLASH_ATTN_MLA_SPARSE",),
     "not shown right: it needs compiled kernels to be imported"),
    (f"{MLA}.flashattn_mla_sparse.FlashAttnMLASparseFA4MetadataBuilder", ("FLASH_ATTN_MLA_SPARSE_FA4",), _OWN),
    (f"{MLA}.sparse_indexer.DeepseekV41SparseIndexerMetadataBuilder", ("DEEPSEEK_V41_SPARSE_INDEXER",), _OWN),
    (f"{MLA}.sparse_swa.DeepseekSparseSWAMetadataBuilder", ("DEEPSEEK_SPARSE_SWA",), _OWN),
    (f"{MLA}.rocm_paged_mxfp4_indexer.RocmMxfp4IndexerMetadataBuilder", ("DEEPSEEK_V4_ROCM_MXFP4_INDEXER",), _AMD),
    (f"{MLA}.rocm_paged_mxfp4_indexer.DeepseekV41RocmMxfp4IndexerMetadataBuilder",
     ("DEEPSEEK_V41_ROCM_MXFP4_INDEXER",), _AMD),
    (f"{BACKENDS}.rocm_octave_attn.RocmOctaveMetadataBuilder", ("ROCM_OCTAVE",), _AMD),
)  # fmt: skip
"""Those that vLLM itself updates in place in Model Runner V2's fused draft, and rebuilds in Model Runner V1's."""
