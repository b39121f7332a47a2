"""Draft attention backends whose metadata vLLM rebuilds for each draft step, and why this adapter leaves them alone."""

from __future__ import annotations

_SCHEDULED = "its decode metadata holds a schedule of its own kernels, which has not been shown right in place"
_STATES = "state-space metadata, not examined"
_OTHER_DEVICE = "not for the NVIDIA GPUs that this adapter is tested for, not examined"
_UNEXAMINED = "not examined: no draft with it has been replayed"
LACKING_HOOK: tuple[tuple[str, str], ...] = (
    ("FLASHMLA", _SCHEDULED), ("FLASH_ATTN_MLA", _SCHEDULED), ("FLASHINFER_MLA", _UNEXAMINED), ("CUTLASS_MLA", _UNEXAMINED),
    ("TOKENSPEED_MLA", _UNEXAMINED), ("B12X", _UNEXAMINED), ("HPC_ATTN", _UNEXAMINED), ("TURBOQUANT", _UNEXAMINED),
    ("FLEX_ATTENTION", _UNEXAMINED), ("LINEAR_ATTN", _STATES), ("BAILING_LINEAR_ATTN", _STATES), ("GDN_ATTN", _STATES),
    ("MAMBA1_ATTN", _STATES), ("MAMBA2_ATTN", _STATES), ("SHORT_CONV_ATTN", _STATES), ("PLE_SHORT_CONV_ATTN", _STATES),
    ("CPU_ATTN", _OTHER_DEVICE), ("AMX_MLA", _OTHER_DEVICE), ("XPU_MLA_SPARSE", _OTHER_DEVICE),
    ("ROCM_ATTN", _OTHER_DEVICE), ("ROCM_AITER_UNIFIED_ATTN", _OTHER_DEVICE), ("ROCM_SEGMENTED_ATTN", _OTHER_DEVICE),
    ("ROCM_AITER_MLA", _OTHER_DEVICE), ("ROCM_AITER_MLA_SPARSE", _OTHER_DEVICE),
)  # fmt: skip
"""Backends of 0.33.0 without an update in place to which this adapter gives none, and why: vLLM rebuilds their metadata for
each draft step. `FLASHMLA_SPARSE` gets one, unless `adapter.unsupported` names what is not covered."""
