"""At start, and when a plan is bound: every difference between releases of sglang, and the probe of what the adapter needs.

sglang has renamed its sparse-attention backends once, and the methods by which its CUDA-graph runners prepare them with it:
a `Generation` holds that as data. Other differences are functions, or needs of a part. Each says "since" the first or
"until" the last tested release that it goes with. Whoever takes a release out of `TESTED` deletes here what goes with it,
and in `pools.py` for pooled index keys; `tests/plugin/test_releases.py` names what is left.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch

from nsa_plugin.adapters.probe import Need, missing
from nsa_plugin.adapters.sglang import needs, pools
from nsa_plugin.core.metadata import same_buffer

if TYPE_CHECKING:
    from nsa_plugin.adapters.sglang.hooked import HookedBackend

TESTED = ("0.5.11", "0.5.12", "0.5.13", "0.5.14", "0.5.15.post1", "0.5.18", "0.5.20", "0.5.22", "0.5.23")
"""Releases that `make matrix` found faithful; others are used, with a warning, if the probe is clean."""

Part = Literal["all", "graph", "draft extend", "exact step lengths", "glue graph", "captured glue graph",
               "recorded draft extend", "dense FlashAttention", "dense FlashMLA"]  # fmt: skip
"""What something is needed for: everything, the strategy `graph`, one path, or a setting of ours or of sglang."""


@dataclass(frozen=True)
class Entry:
    """A method by which sglang's runners have the metadata of a batch prepared.

    Attributes
    ----------
    method : str
    hook : callable(hooked, original, owner, *arguments, **keywords)
        What stands in for it. `hooked` is the `HookedBackend` of the class, `owner` the object whose method is called.
    runs : str
        When that is.
    """

    method: str
    hook: Callable[..., None]
    runs: str


@dataclass(frozen=True)
class Generation:
    """What some releases call things. Paths in `needs` are templates over these names.

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
    own_path_fields : tuple of str
        Fields of a batch that it takes beyond those that all generations take.
    draft_entries, single_entries : tuple of Entry
        Of the multi-step backend, and of a backend by itself.
    own_needs : tuple of Need
        What only this generation has.
    """

    module: str
    backend: str
    multi_step: str
    metadata: str
    prefix: str
    own_path: str
    own_path_fields: tuple[str, ...]
    draft_entries: tuple[Entry, ...]
    single_entries: tuple[Entry, ...]
    own_needs: tuple[Need, ...]

    def of(self, name: str) -> str:
        """An attribute, field or method that goes by the prefix: `_index_topk` to `dsa_index_topk`."""
        return self.prefix + name

    def is_entry(self, method: str) -> bool:
        """Whether a method of a backend is hooked."""
        return any(entry.method == method for entry in self.single_entries)

    def needs(self, part: Part = "all") -> tuple[Need, ...]:
        """What a part needs; parts other than "all" beyond what all need."""
        words = {name: getattr(self, name) for name in ("backend", "multi_step", "metadata", "prefix")}
        templates = (*needs.REGISTRY, *self.own_needs, *needs.SHARED) if part == "all" else PARTS[part]
        return tuple(
            replace(need, path=need.path.format(**words), parameters=tuple(n.format(**words) for n in need.parameters))
            for need in templates
        )


GLUE_GRAPH = "sglang.srt.model_executor.runner.metadata_glue_graph.MetadataGlueGraph"
OUT, IN = "init_forward_metadata_out_graph", "init_forward_metadata_in_graph"
_CAPTURE, _REPLAY = "init_forward_metadata_capture_cuda_graph", "init_forward_metadata_replay_cuda_graph"
_BATCH = ("bs", "req_pool_indices", "seq_lens", "forward_mode", "spec_info")

PARTS: Mapping[Part, tuple[Need, ...]] = {
    "graph": (  # since 0.5.13
        Need(f"{{multi_step}}.{IN}", ("forward_batch",), "record the work in the draft's CUDA graph", hooked=True),
        Need(f"{{backend}}.{IN}", ("forward_batch",), "record the work in the backend's CUDA graph", hooked=True),
    ),
    "draft extend": (  # since 0.5.15.post1; before, its rows were ragged and counted on the host
        Need("{backend}._refresh_paged_mqa_schedule_metadata", ("metadata", "seqlens_32_2d"), "DeepGEMM schedule"),
        Need("{backend}._refresh_topk_v2_plan", ("metadata",), "top-k plan; comes with the static draft-extend width"),
    ),
    "exact step lengths": (
        Need("{multi_step}.__init__", ("model_runner",), "know whether draft steps share top-k indices", hooked=True,
             known=("topk", "speculative_num_steps", "seed_dsa_topk_from_draft_extend")),
    ),
    "glue graph": (  # since 0.5.20
        Need(f"{GLUE_GRAPH}.run", ("attn_backend", "fb_view", "key"), "prepare where sglang would record that", hooked=True),
    ),
    "captured glue graph": (  # since 0.5.23: sglang replays it without `run`
        Need(f"{GLUE_GRAPH}.is_captured", (), "prepare where sglang would replay what it has recorded", hooked=True,
             known=("key",)),
    ),
    "recorded draft extend": needs.RECORDED_DRAFT_EXTEND,  # since 0.5.22, as far as what is refused can be told
    "dense FlashAttention": needs.DENSE_FLASH_ATTENTION,  # since 0.5.22
    "dense FlashMLA": needs.DENSE_FLASHMLA,  # since 0.5.22
}  # fmt: skip


def argument(name: str, index: int, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """An argument of a hooked method, however it was passed; None if it was not."""
    return arguments[index] if index < len(arguments) else keywords.get(name)


def out_graph(
    hooked: HookedBackend, original: Callable[..., None], owner: Any, *arguments: Any, **keywords: Any
) -> None:
    batch = argument("forward_batch", 0, arguments, keywords)
    if argument("in_capture", 1, arguments, keywords):
        original(owner, *arguments, **keywords)
        hooked.captured(owner, batch)
    elif not hooked.replayed(owner, batch):
        original(owner, *arguments, **keywords)


def in_graph(
    hooked: HookedBackend, original: Callable[..., None], owner: Any, *arguments: Any, **keywords: Any
) -> None:
    original(owner, *arguments, **keywords)
    hooked.record(owner, argument("forward_batch", 0, arguments, keywords))


DSA_MODULE = "sglang.srt.layers.attention.dsa_backend"
_DSA_ENTRIES = (
    Entry(OUT, out_graph, "before each capture and each replay"),
    Entry(IN, in_graph, "inside each capture: what it launches becomes part of the CUDA graph"),
)
DSA = Generation(
    module=DSA_MODULE,
    backend=f"{DSA_MODULE}.DeepseekSparseAttnBackend",
    multi_step=f"{DSA_MODULE}.DeepseekSparseAttnMultiStepBackend",
    metadata=f"{DSA_MODULE}.DSAMetadata",
    prefix="dsa",
    own_path="_apply_cuda_graph_metadata",
    own_path_fields=(),
    draft_entries=_DSA_ENTRIES,
    single_entries=_DSA_ENTRIES,
    own_needs=(
        Need(f"{{multi_step}}.{OUT}", ("forward_batch", "in_capture"), "prepare a draft", hooked=True),
        Need(f"{{backend}}.{OUT}", ("forward_batch", "in_capture"), "prepare verify and extend", hooked=True),
        *PARTS["graph"],
        Need("{backend}._apply_cuda_graph_metadata", (*_BATCH, "seq_lens_cpu"), "sglang's own values, to fall back on"),
        Need("{backend}._build_paged_mqa_schedule_2d_ctx_lens",
             ("forward_mode", "cache_seqlens_int32", "seqlens_expanded", "batch_size"), "DeepGEMM schedule"),
        Need("{metadata}", ("paged_mqa_ctx_lens_2d",), "buffers that captured graphs read"),
    ),
)  # fmt: skip
"""Since 0.5.13: one method before captures and replays, another within captured graphs."""


def _nsa_entries(batch_to_capture: Callable[..., Any], batch_to_replay: Callable[..., Any]) -> tuple[Entry, ...]:
    """Hooks of the two methods of a class; each function makes a batch of a method's arguments."""

    def capture(hooked: Any, original: Callable[..., None], owner: Any, *arguments: Any, **keywords: Any) -> None:
        original(owner, *arguments, **keywords)
        hooked.captured(owner, batch_to_capture(*arguments, **keywords))

    def replay(hooked: Any, original: Callable[..., None], owner: Any, *arguments: Any, **keywords: Any) -> None:
        if not hooked.replayed(owner, batch_to_replay(*arguments, **keywords)):
            original(owner, *arguments, **keywords)

    return Entry(_CAPTURE, capture, "before each capture"), Entry(_REPLAY, replay, "before each replay")


def nsa_draft_batch(forward_batch: Any, *others: Any, **more: Any) -> Any:
    """The batch of a draft: what its two methods get first. At replay its `batch_size` is their `bs`."""
    return forward_batch


def nsa_batch_to_capture(
    bs: int, num_tokens: int, req_pool_indices: Any, seq_lens: Any, encoder_lens: Any, forward_mode: Any,
    spec_info: Any, *others: Any, **more: Any,
) -> SimpleNamespace:  # fmt: skip
    """A batch of the arguments of a backend's `init_forward_metadata_capture_cuda_graph`."""
    return SimpleNamespace(
        batch_size=bs, req_pool_indices=req_pool_indices, seq_lens=seq_lens, seq_lens_cpu=seq_lens.cpu(),
        encoder_lens=encoder_lens, forward_mode=forward_mode, spec_info=spec_info,
    )  # fmt: skip


def nsa_batch_to_replay(
    bs: int, req_pool_indices: Any, seq_lens: Any, seq_lens_sum: int, encoder_lens: Any, forward_mode: Any,
    spec_info: Any, seq_lens_cpu: Any, *others: Any, **more: Any,
) -> SimpleNamespace:  # fmt: skip
    """A batch of the arguments of a backend's `init_forward_metadata_replay_cuda_graph`."""
    return SimpleNamespace(
        batch_size=bs, req_pool_indices=req_pool_indices, seq_lens=seq_lens, seq_lens_cpu=seq_lens_cpu,
        seq_lens_sum=seq_lens_sum, encoder_lens=encoder_lens, forward_mode=forward_mode, spec_info=spec_info,
    )  # fmt: skip


NSA_MODULE = "sglang.srt.layers.attention.nsa_backend"
NSA = Generation(
    module=NSA_MODULE,
    backend=f"{NSA_MODULE}.NativeSparseAttnBackend",
    multi_step=f"{NSA_MODULE}.NativeSparseAttnMultiStepBackend",
    metadata=f"{NSA_MODULE}.NSAMetadata",
    prefix="nsa",
    own_path=_REPLAY,
    own_path_fields=("seq_lens_sum", "encoder_lens"),
    draft_entries=_nsa_entries(nsa_draft_batch, nsa_draft_batch),
    single_entries=_nsa_entries(nsa_batch_to_capture, nsa_batch_to_replay),
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
"""Until 0.5.12: one method before captures, another before replays, none within captured graphs."""

GENERATIONS = (DSA, NSA)
"""Newest first. A release may keep the older module as another name for the newer one."""


@cache
def generation() -> Generation:
    """The newest whose module the installed sglang has; the newest of all if it has none."""
    for known in GENERATIONS:
        try:
            if importlib.util.find_spec(known.module) is not None:
                return known
        except (ImportError, ValueError):  # a parent is not there, or is a stand-in
            continue
    return GENERATIONS[0]


def every_need(but: Collection[Part] = ()) -> tuple[Need, ...]:
    """What all parts need, but for those named, whether the installed sglang has it or not."""
    found, parts = generation(), [part for part in PARTS if part not in but]
    return tuple(dict.fromkeys((*found.needs(), *(need for part in parts for need in found.needs(part)))))


def probe() -> list[str]:
    """What the installed sglang lacks, one line each; empty if it fits. Imports sglang's sparse-attention backends."""
    try:
        backends()
    except Exception as error:
        return [
            f"{generation().module}: looked for the DSA backends, found {type(error).__name__}: {error}; "
            f"install sglang {TESTED[0]} or later, complete"
        ]
    return missing(generation().needs())


def lacking(part: Part) -> str:
    """Empty, or what the installed sglang lacks for a part."""
    return next(iter(missing(generation().needs(part))), "")


def backends() -> Any:
    """The module of the installed backends."""
    return importlib.import_module(generation().module)


def own_path_fields(batch: Any) -> dict[str, Any]:
    """What a backend's own path takes of a batch beyond what it takes in all releases; None for what the batch lacks."""
    return {name: getattr(batch, name, None) for name in generation().own_path_fields}


def derived_planes(metadata: Any) -> dict[str, torch.Tensor]:
    """The planes of a `DSAMetadata` that sglang's own functions derive from lengths, but for FlashMLA's.

    With pooled index keys these are other ones; nothing reads those of single keys there.
    """
    if pools.write_plan(metadata) is not None:
        return pools.pool_planes(metadata)
    names = (
        "paged_mqa_schedule_metadata",
        "topk_v2_plan",  # since 0.5.15.post1
        "paged_mqa_ctx_lens_2d",  # since 0.5.13
    )
    return {name: plane for name in names if (plane := getattr(metadata, name, None)) is not None}


def schedule_lengths(
    backend: Any, forward_mode: Any, batch_size: int
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """What makes the lengths for DeepGEMM's schedule of `cache_seqlens` and `seqlens_expanded`."""
    if hasattr(backend, "_build_paged_mqa_schedule_2d_ctx_lens"):
        return lambda lengths, expanded: backend._build_paged_mqa_schedule_2d_ctx_lens(
            forward_mode, lengths, expanded, batch_size
        )
    # until 0.5.12: they are made where they are used
    is_decode = forward_mode.is_decode_or_idle()
    to_2d = getattr(backends(), "_to_2d_context_lens", None)
    if to_2d is None:  # until 0.5.11: the schedule takes a vector
        return lambda lengths, expanded: lengths if is_decode else expanded
    return lambda lengths, expanded: to_2d(lengths if is_decode else expanded, batch_size)


def schedule_writer(backend: Any, metadata: Any) -> Callable[[torch.Tensor], None]:
    """What writes DeepGEMM's schedule for such lengths into `metadata`."""
    if hasattr(backend, "_refresh_paged_mqa_schedule_metadata"):
        return lambda lengths: backend._refresh_paged_mqa_schedule_metadata(metadata, lengths)
    # until 0.5.14: sglang calls DeepGEMM where it uses it; until 0.5.12 it imports that there too
    deep_gemm = getattr(backends(), "deep_gemm", None) or importlib.import_module("deep_gemm")

    def write(lengths: torch.Tensor) -> None:
        schedule = deep_gemm.get_paged_mqa_logits_metadata(lengths, 64, deep_gemm.get_num_sms())
        metadata.paged_mqa_schedule_metadata.copy_(schedule)

    return write


def topk_plan_is_written(lengths: torch.Tensor) -> bool:
    """Whether sglang's top-k planner writes anything for rows of these lengths; asks the device.

    Until 0.5.20 it always does. Later it leaves the buffer as it is for small batches.
    """
    if lengths.device.type == "cpu":
        return True
    try:
        from sglang.kernels.ops.attention.dsv4.topk import topk_v2_plan_is_written
    except ImportError:
        return True
    return bool(topk_v2_plan_is_written(lengths))


def reads_lengths_of(batch: Any, metadata: Any) -> bool:
    """Whether a `DSAMetadata` has no lengths but those of its batch. Until 0.5.14, where these are int32."""
    return same_buffer(metadata.cache_seqlens_int32, batch.seq_lens)


def drops_wide_table(backend: Any) -> bool:
    """Whether a backend leaves `page_table_1` out of its CUDA-graph buffers. Until 0.5.14 none does."""
    return bool(getattr(backend, "dsa_drop_wide_page_table", False))


def shares_topk(model_runner: Any) -> bool | None:
    """Whether the steps of a draft model use the top-k indices of one; None if that is not known.

    sglang's draft workers go by the same field of the model's configuration. Until 0.5.13 they share none.
    """
    try:
        config = model_runner.model_config.hf_config
    except AttributeError:
        return None
    return bool(getattr(config, "index_share_for_mtp_iteration", False))


def has_shared_topk(batch: Any) -> bool:
    """Whether a batch brings such indices along. Until 0.5.14 none does; later those of some draft workers."""
    return getattr(batch.spec_info, "dsa_topk_indices", None) is not None


def overlaps_plans() -> bool:
    """Whether sglang prepares batches on a stream of its own. A release that knows no such setting does not."""
    from sglang.srt.environ import envs

    setting = getattr(envs, "SGLANG_ENABLE_OVERLAP_PLAN_STREAM", None)
    return setting is not None and bool(setting.get())


def is_rocm() -> bool:
    """Whether the backends are those of ROCm. A release that does not say so has none."""
    return bool(getattr(backends(), "_is_hip", False))


def is_ragged(batch: Any) -> bool:
    """Whether the requests of a batch have different numbers of tokens to verify. Most kinds of drafts have no such thing."""
    return getattr(batch.spec_info, "ragged_verify_layout", None) is not None
