"""Everything that this adapter needs of sglang, in one table, and the probe that checks all of it.

sglang has renamed its sparse-attention backends once, and the methods by which CUDA-graph runners prepare them with it.
What differs between the two generations is data here, in `Names`; which one is installed is seen by what is there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from nsa_plugin.adapters.probe import Need, missing

TESTED = ("0.5.11", "0.5.12", "0.5.13", "0.5.14", "0.5.15.post1", "0.5.18", "0.5.20", "0.5.22", "0.5.23")
"""Releases that `make matrix` found faithful; others are used, with a warning, if the probe is clean."""

Part = Literal["all", "graph", "draft extend", "exact step lengths", "glue graph"]
"""What something is needed for: everything, the strategy `graph`, one path, or a setting of ours or of sglang."""


@dataclass(frozen=True)
class Names:
    """What a generation of releases calls things. Paths in `needs` are templates over these names.

    Attributes
    ----------
    module : str
        Of the backends.
    backend, multi_step, metadata : str
        Dotted paths of classes.
    prefix : str
        Of attributes, fields and methods, as "dsa" in `dsa_index_topk`.
    own_path : str
        Method of a backend that computes the metadata of a batch for itself alone.
    arguments : tuple of str
        Its parameters besides those that all generations have, as far as sglang's own runners fill them from a batch.
    hooks : mapping
        Methods of both classes to what stands in for them in `nsa_plugin.adapters.sglang.paths.Path`.
    own_needs : tuple of Need
        What only this generation has.
    """

    module: str
    backend: str
    multi_step: str
    metadata: str
    prefix: str
    own_path: str
    arguments: tuple[str, ...]
    hooks: Mapping[str, str]
    own_needs: tuple[Need, ...]

    def of(self, name: str) -> str:
        """An attribute, field or method that goes by the prefix: `_index_topk` to `dsa_index_topk`."""
        return self.prefix + name

    def needs(self, part: Part = "all") -> tuple[Need, ...]:
        """What a part needs; for the others beyond what all need."""
        words = {name: getattr(self, name) for name in ("backend", "multi_step", "metadata", "prefix")}
        templates = (*REGISTRY, *self.own_needs, *SHARED) if part == "all" else PARTS[part]
        return tuple(
            replace(need, path=need.path.format(**words), parameters=tuple(n.format(**words) for n in need.parameters))
            for need in templates
        )


GLUE_GRAPH = "sglang.srt.model_executor.runner.metadata_glue_graph.MetadataGlueGraph"
_HOOKS = "sglang.srt.plugins.hook_registry"
_MODES = "sglang.srt.model_executor.forward_batch_info.ForwardMode"
_OUT, _IN = "init_forward_metadata_out_graph", "init_forward_metadata_in_graph"
_CAPTURE, _REPLAY = "init_forward_metadata_capture_cuda_graph", "init_forward_metadata_replay_cuda_graph"
_BATCH = ("bs", "req_pool_indices", "seq_lens", "forward_mode", "spec_info")

REGISTRY: tuple[Need, ...] = (
    Need(f"{_HOOKS}.HookRegistry.register", ("target", "hook", "hook_type"), "install hooks"),
    Need(f"{_HOOKS}.HookRegistry.apply_hooks", (), "apply hooks"),
    Need(f"{_HOOKS}.HookRegistry._hooks", (), "take hooks back"),
    Need(f"{_HOOKS}.HookRegistry._patched", (), "take hooks back"),
    Need(f"{_HOOKS}._current_plugin_source", (), "know whether hooks are about to be applied"),
    Need(f"{_HOOKS}.HookType.AROUND", (), "install hooks"),
)
"""sglang's way to hook its functions: 0.5.11 and later."""

SHARED: tuple[Need, ...] = (
    Need("{multi_step}.init_cuda_graph_state", ("max_bs", "max_num_tokens"), "share page tables", hooked=True),
    Need("{backend}.init_cuda_graph_state", ("max_bs", "max_num_tokens"), "share page tables"),
    Need("{backend}._compute_flashmla_metadata", ("cache_seqlens", "seq_len_q"), "FlashMLA metadata"),
    Need("{backend}.set_{prefix}_prefill_impl", ("forward_batch",), "per-forward dispatch state"),
    Need("{metadata}",
         ("page_size", "cache_seqlens_int32", "cu_seqlens_k", "page_table_1", "real_page_table",
          "{prefix}_cache_seqlens_int32", "{prefix}_cu_seqlens_k", "{prefix}_seqlens_expanded", "flashmla_metadata",
          "paged_mqa_schedule_metadata"),
         "buffers that captured graphs read"),
    Need(f"{_MODES}.DECODE", (), "tell forward modes apart"),
    Need(f"{_MODES}.TARGET_VERIFY", (), "tell forward modes apart"),
    Need(f"{_MODES}.DRAFT_EXTEND_V2", (), "tell forward modes apart"),
)  # fmt: skip

PARTS: Mapping[Part, tuple[Need, ...]] = {
    "graph": (
        Need(f"{{multi_step}}.{_IN}", ("forward_batch",), "record the work in the draft's CUDA graph", hooked=True),
        Need(f"{{backend}}.{_IN}", ("forward_batch",), "record the work in the backend's CUDA graph", hooked=True),
    ),
    "draft extend": (
        Need("{backend}._refresh_paged_mqa_schedule_metadata", ("metadata", "seqlens_32_2d"), "DeepGEMM schedule"),
        Need("{backend}._refresh_topk_v2_plan", ("metadata",), "top-k plan; comes with the static draft-extend width"),
    ),
    "exact step lengths": (
        Need("{multi_step}.__init__", ("model_runner",), "know whether draft steps share top-k indices", hooked=True,
             known=("topk", "speculative_num_steps", "seed_dsa_topk_from_draft_extend")),
    ),
    "glue graph": (
        Need(f"{GLUE_GRAPH}.run", ("attn_backend", "fb_view", "key"), "prepare where sglang would record that", hooked=True),
    ),
}  # fmt: skip
"""`graph`: 0.5.13 and later. Draft extend: 0.5.15 and later; before, its rows were ragged and counted on the host. The glue
graph: 0.5.20 and later."""

DSA_MODULE = "sglang.srt.layers.attention.dsa_backend"
DSA = Names(
    module=DSA_MODULE,
    backend=f"{DSA_MODULE}.DeepseekSparseAttnBackend",
    multi_step=f"{DSA_MODULE}.DeepseekSparseAttnMultiStepBackend",
    metadata=f"{DSA_MODULE}.DSAMetadata",
    prefix="dsa",
    own_path="_apply_cuda_graph_metadata",
    arguments=(),
    hooks={_OUT: "out_graph", _IN: "in_graph"},
    own_needs=(
        Need(f"{{multi_step}}.{_OUT}", ("forward_batch", "in_capture"), "prepare a draft", hooked=True),
        Need(f"{{backend}}.{_OUT}", ("forward_batch", "in_capture"), "prepare verify and extend", hooked=True),
        *PARTS["graph"],
        Need("{backend}._apply_cuda_graph_metadata", (*_BATCH, "seq_lens_cpu"), "sglang's own values, to fall back on"),
        Need("{backend}._build_paged_mqa_schedule_2d_ctx_lens",
             ("forward_mode", "cache_seqlens_int32", "seqlens_expanded", "batch_size"), "DeepGEMM schedule"),
        Need("{metadata}", ("paged_mqa_ctx_lens_2d",), "buffers that captured graphs read"),
    ),
)  # fmt: skip
"""0.5.13 and later: one method before captures and replays, another within captured graphs."""

NSA_MODULE = "sglang.srt.layers.attention.nsa_backend"
NSA = Names(
    module=NSA_MODULE,
    backend=f"{NSA_MODULE}.NativeSparseAttnBackend",
    multi_step=f"{NSA_MODULE}.NativeSparseAttnMultiStepBackend",
    metadata=f"{NSA_MODULE}.NSAMetadata",
    prefix="nsa",
    own_path=_REPLAY,
    arguments=("seq_lens_sum", "encoder_lens"),
    hooks={_CAPTURE: "capture", _REPLAY: "replay"},
    own_needs=(
        Need(f"{{multi_step}}.{_CAPTURE}", ("forward_batch",), "prepare a draft's capture", hooked=True),
        Need(f"{{multi_step}}.{_REPLAY}", ("forward_batch", "bs"), "prepare a draft", hooked=True),
        Need(f"{{backend}}.{_CAPTURE}", (*_BATCH, "num_tokens", "encoder_lens"), "prepare verify's capture",
             hooked=True),
        Need(f"{{backend}}.{_REPLAY}", (*_BATCH, "seq_lens_cpu", "seq_lens_sum", "encoder_lens"),
             "prepare verify; sglang's own values, to fall back on", hooked=True,
             known=("out_cache_loc", "actual_forward_mode")),
    ),
)  # fmt: skip
"""0.5.11 and 0.5.12: one method before captures, another before replays, none within captured graphs."""

GENERATIONS = (DSA, NSA)
"""Newest first. A release may keep the older module as another name for the newer one."""


@cache
def names() -> Names:
    """Those of the installed sglang: of the newest generation whose module it has; the newest if it has none."""
    for generation in GENERATIONS:
        try:
            if importlib.util.find_spec(generation.module) is not None:
                return generation
        except (ImportError, ValueError):  # a parent is not there, or is a stand-in
            continue
    return GENERATIONS[0]


def every_need() -> tuple[Need, ...]:
    """What all parts need, whether the installed sglang has it or not."""
    found = names()
    return tuple(dict.fromkeys((*found.needs(), *(need for part in PARTS for need in found.needs(part)))))


def probe() -> list[str]:
    """What the installed sglang lacks, one line each; empty if it fits. Imports sglang's sparse-attention backends."""
    module = names().module
    try:
        importlib.import_module(module)
    except Exception as error:
        return [
            f"{module}: looked for the DSA backends, found {type(error).__name__}: {error}; "
            "install sglang 0.5.11 or later, complete"
        ]
    return missing(names().needs())


def lacking(part: Part) -> str:
    """Empty, or what the installed sglang lacks for a part."""
    return next(iter(missing(names().needs(part))), "")
