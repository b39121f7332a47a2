"""Draft attention backends whose metadata vLLM 0.33.0 rebuilds for each draft step, and why this adapter leaves them alone.

Read in vLLM's sources: what each builder's `build` derives, and which drafts of a DSA model can have it. A draft is
either the model's own MTP layer (sparse MLA and an indexer), or an Eagle model with dense MLA or grouped-query attention.
"""

from __future__ import annotations

_DENSE = "for Eagle drafts with dense MLA"
_GROUPED = "for Eagle drafts with grouped-query attention, and only where asked for by name"
_STATES = "recurrent state, which no draft of a DSA model has; a builder that copies state indices for every batch"
_CPU = "of CPUs, where vLLM captures no CUDA graphs, so that there is no draft to fuse"
_AMD = "of AMD GPUs, on which this adapter's kernels have not run"

LACKING_HOOK: tuple[tuple[str, str], ...] = (
    ("FLASHINFER_MLA_SPARSE_SM90",
     "it plans on the host, from upper bounds of each step's lengths, and clamps the plan of the captured batch on the device"),
    ("FLASHMLA",
     f"{_DENSE}: its tile schedule follows from each step's lengths, by FlashMLA's compiled kernels (for bf16 caches within the "
     "first layer's call, kept in the metadata), which no replay on a CPU can show right"),
    ("FLASH_ATTN_MLA",
     f"{_DENSE}: FlashAttention 3 schedules from each step's lengths, by a compiled kernel that no replay on a CPU can show right"),
    ("CUTLASS_MLA",
     f"{_DENSE}, never chosen by itself (FLASHINFER_MLA has the same GPUs and comes first): it takes KV blocks of 128 tokens, the "
     "DSA indexer 64, and vLLM does not put the two into one group of 64"),
    ("B12X", f"{_GROUPED}, on SM120: its metadata are views, but its plans, prepared per batch size, have no CPU to be shown right on"),
    ("HPC_ATTN", f"{_GROUPED}, on Hopper: a compiled kernel assigns decode tasks from each step's lengths"),
    ("TURBOQUANT",
     "for Eagle drafts with grouped-query attention over a turboquant_* cache, which no sparse MLA backend reads: its metadata keep "
     "lengths on the host"),
    ("ULTRAQUANT",
     "for Eagle drafts with grouped-query attention over an ultraquant_4bit cache, which no sparse MLA backend reads: it builds as "
     "TURBOQUANT does"),
    ("FLEX_ATTENTION",
     "for Eagle drafts with grouped-query attention where nothing faster fits: it builds a block mask and an inverse block table "
     "from each step's lengths"),
    ("LINEAR_ATTN", _STATES), ("BAILING_LINEAR_ATTN", _STATES), ("GDN_ATTN", _STATES), ("MAMBA1_ATTN", _STATES),
    ("MAMBA2_ATTN", _STATES), ("SHORT_CONV_ATTN", _STATES), ("PLE_SHORT_CONV_ATTN", _STATES),
    ("CPU_ATTN", _CPU), ("CPU_MLA", _CPU), ("AMX_MLA", _CPU),
    ("XPU_MLA_SPARSE", "of Intel GPUs: its builder says that it supports no CUDA graphs, and makes the request map on the host"),
    ("ROCM_ATTN", _AMD), ("ROCM_AITER_UNIFIED_ATTN", _AMD), ("ROCM_SEGMENTED_ATTN", _AMD), ("ROCM_AITER_MLA", _AMD),
    ("AITER_TRITON_MLA", _AMD), ("ROCM_AITER_MLA_SPARSE", _AMD),
)  # fmt: skip
"""Those with an update of this adapter's are in `in_place`, unless `InPlace.refused` names what is not covered."""

CHOSEN_ON = {
    "FLASHINFER_MLA_SPARSE_SM90": frozenset({"9"}),
    "FLASHMLA": frozenset({"9", "10"}),
    "FLASH_ATTN_MLA": frozenset({"9"}),
}
"""Of those, what vLLM may choose by itself for a DSA model's draft, to the major compute capabilities of the GPUs."""
