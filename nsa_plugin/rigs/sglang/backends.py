"""The real sglang DSA backends without a model runner, on a GPU or, with stand-ins for compiled kernels, on a CPU.

Backends are made as sglang's own `sglang.test.kits.dsa_metadata_kit` makes them: `object.__new__` and the attributes
that the metadata code reads. Every line of metadata code that then runs is sglang's. On a CPU, `stand_ins` replaces
what is compiled for a GPU: the DeepGEMM schedule, the top-k plan, FlashMLA's metadata and the two copy kernels become
plain functions of the same inputs; sglang's fused Triton kernels run as they are, in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from nsa_plugin.adapters.sglang import compare, own_path
from nsa_plugin.adapters.sglang.compare import differences as differences
from nsa_plugin.adapters.sglang.describe import describe, geometry
from nsa_plugin.adapters.sglang.pools import INDEX_MODULE, PLAN_MODULE
from nsa_plugin.adapters.sglang.releases import GENERATIONS, NSA, generation
from nsa_plugin.core.batch import ForwardMode

FUSION = "SGLANG_EXPERIMENTAL_DSA_KPOOL_METADATA_FUSION"


@dataclass(frozen=True)
class Config:
    """Sizes of the backends.

    Attributes
    ----------
    width : columns of req_to_token; max_requests : its rows; max_batch_size : of CUDA-graph buffers;
    draft_tokens, index_topk, page_size, index_kpool : as in the model; decode_impl : sglang's decode kernel choice;
    heads : of queries; fused : whether sglang fuses the metadata of pooled index keys, as it does by default.
    """

    width: int = 1024
    max_requests: int = 16
    max_batch_size: int = 8
    draft_tokens: int = 4
    index_topk: int = 256
    page_size: int = 64
    decode_impl: str = "fa3"
    index_kpool: int = 1
    heads: int = 64
    fused: bool = True

    @property
    def allocated(self) -> int:
        """Tokens per page of the allocator: those of a page of pooled index keys."""
        return self.page_size * self.index_kpool


def req_to_token(config: Config, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Slots as sglang's paged allocator hands them out: shuffled pages, contiguous within a page."""
    generator = torch.Generator().manual_seed(seed)
    pages_per_request = -(-config.width // config.allocated)
    pages = torch.randperm(config.max_requests * pages_per_request, generator=generator)
    slots = pages.view(config.max_requests, -1, 1) * config.allocated + torch.arange(config.allocated)
    return slots.reshape(config.max_requests, -1)[:, : config.width].to(torch.int32).contiguous().to(device)


def make_backend(config: Config, table: torch.Tensor) -> Any:
    """A `DeepseekSparseAttnBackend` with CUDA-graph buffers for target verify and draft extend."""
    backend = _bare_backend(config, table, 0, 1)
    backend.init_cuda_graph_state(config.max_batch_size, config.max_batch_size * config.draft_tokens)
    return backend


def make_multi_step(config: Config, table: torch.Tensor, num_steps: int, **of_draft_model: Any) -> Any:
    """A `DeepseekSparseAttnMultiStepBackend` with `num_steps - 1` draft backends and CUDA-graph buffers.

    `of_draft_model` are attributes of the draft model's configuration.
    """
    model_runner = SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace(**of_draft_model)))
    backends = [_bare_backend(config, table, step, num_steps) for step in range(num_steps - 1)]
    multi_step = pkgutil.resolve_name(generation().multi_step)
    with mock.patch(generation().backend, mock.Mock(side_effect=backends)):
        multi: Any = multi_step(model_runner, 1, num_steps)
    multi.init_cuda_graph_state(config.max_batch_size, config.max_batch_size)
    return multi


def _bare_backend(config: Config, table: torch.Tensor, step: int, num_steps: int) -> Any:
    from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter

    device = table.device
    sm = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    of = generation().of
    backend: Any = object.__new__(pkgutil.resolve_name(generation().backend))
    vars(backend).update(
        device=device, device_sm_major=sm, num_q_heads=config.heads, num_dcp_q_heads=64, flashmla_kv_num_q_heads=64,
        physical_page_size=config.page_size, real_page_size=config.page_size, max_context_len=config.width,
        dsa_index_kpool=config.index_kpool,
        speculative_num_draft_tokens=config.draft_tokens, speculative_num_steps=num_steps, speculative_step_id=step, topk=1,
        use_mha=False, use_fused_topk=True, hisparse_coordinator=None, enable_auto_select_prefill_impl=False,
        token_to_kv_pool=SimpleNamespace(index_page_size=64, dtype=torch.float8_e4m3fn),
        req_to_token=table,
        _is_in_breakable_cuda_graph=lambda: False, _is_in_tc_piecewise_cuda_graph=lambda: False,
        _get_device_sm=lambda: 10 * sm, _is_blackwell=lambda: sm == 10,
        _arange_buf=torch.arange(16384, dtype=torch.int32, device=device),
        _memory_saver_adapter=TorchMemorySaverAdapter.create(enable=False),
        **{
            of("_index_topk"): config.index_topk, of("_decode_impl"): config.decode_impl,
            of("_prefill_impl"): "flashmla_sparse", of("_kv_cache_store_fp8"): True,
        },
    )  # fmt: skip
    if (topk := _first_module((f"{ATTENTION}.dsa.dsa_topk_backend",))) is not None:
        backend.dsa_topk_backend = topk.DSATopKBackend.SGL_KERNEL
    if hasattr(backend, "_init_kpool_metadata_fusion"):
        with mock.patch.dict(os.environ, {FUSION: str(int(config.fused))}):
            backend._init_kpool_metadata_fusion()
    return backend


def make_batch(mode: str, seq_lens: torch.Tensor, req_pool_indices: torch.Tensor, num_tokens: int | None = None) -> Any:
    """A real `ForwardBatch` of `mode` ("DECODE", "TARGET_VERIFY", "DRAFT_EXTEND_V2", "IDLE")."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    size = seq_lens.numel()
    tokens = torch.zeros(num_tokens or size, dtype=torch.int64, device=seq_lens.device)
    lengths = seq_lens.cpu()
    return ForwardBatch(
        forward_mode=ForwardMode[mode], batch_size=size, input_ids=tokens, req_pool_indices=req_pool_indices,
        seq_lens=seq_lens, out_cache_loc=tokens, seq_lens_sum=int(lengths.sum()), seq_lens_cpu=lengths, spec_info=None,
        positions=(seq_lens - 1).clone(),
    )  # fmt: skip


def replay_view(batch: Any, padding: int = 0) -> SimpleNamespace:
    """The namespace that sglang's CUDA-graph runners pass at replay instead of a `ForwardBatch`."""
    return SimpleNamespace(**vars(batch), num_padding=padding)


def before_capture(owner: Any, batch: Any) -> None:
    """What sglang's runners call before they capture the graph of a multi-step, or of one, backend."""
    if hasattr(owner, "init_forward_metadata_out_graph"):
        owner.init_forward_metadata_out_graph(batch, in_capture=True)
    elif hasattr(owner, "attn_backends"):
        owner.init_forward_metadata_capture_cuda_graph(batch)
    else:
        owner.init_forward_metadata_capture_cuda_graph(*capture_arguments(batch).values())


def capture_arguments(batch: Any) -> dict[str, Any]:
    """What one backend of 0.5.11 or 0.5.12 gets before a capture, in order."""
    return {
        "bs": batch.batch_size, "num_tokens": batch.input_ids.numel(), "req_pool_indices": batch.req_pool_indices,
        "seq_lens": batch.seq_lens, "encoder_lens": None, "forward_mode": batch.forward_mode, "spec_info": batch.spec_info,
    }  # fmt: skip


def in_graph(owner: Any, batch: Any) -> None:
    """What they call within the graph that they capture; releases before 0.5.13 call nothing there."""
    if hasattr(owner, "init_forward_metadata_in_graph"):
        owner.init_forward_metadata_in_graph(batch)


def preparation(owner: Any, batch: Any) -> Callable[[], object]:
    """The call that they make before each replay with a live batch."""
    if hasattr(owner, "init_forward_metadata_out_graph"):
        view = replay_view(batch)
        return lambda: owner.init_forward_metadata_out_graph(view)
    if hasattr(owner, "attn_backends"):
        return lambda: owner.init_forward_metadata_replay_cuda_graph(batch, batch.batch_size)
    return lambda: owner.init_forward_metadata_replay_cuda_graph(
        batch.batch_size, batch.req_pool_indices, batch.seq_lens, batch.seq_lens_sum, None, batch.forward_mode,
        batch.spec_info, seq_lens_cpu=batch.seq_lens_cpu,
    )  # fmt: skip


def num_sms() -> int:
    """Multiprocessors that the stand-in schedule is made for."""
    return 132


def schedule(lengths: torch.Tensor, block_size: int, sms: int) -> torch.Tensor:
    """Stand-in for DeepGEMM's schedule: int32 [sms + 1, 2], where each SM starts in 256-token segments."""
    segments = (lengths.to(torch.int64).flatten() + 255) // 256
    ends = torch.cumsum(segments, 0)
    starts = int(segments.sum()) * torch.arange(sms + 1) // sms
    request = torch.searchsorted(ends, starts, right=True).clamp(max=max(segments.numel() - 1, 0))
    before = torch.cat([torch.zeros(1, dtype=torch.int64), ends])[request]
    return torch.stack([request, starts - before], dim=1).to(torch.int32)


def topk_plan(seq_lens: torch.Tensor, static_threshold: int = -1, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Stand-in for sglang's top-k v2 plan: int32 [rows + 1, 2], the rows of more than 256 tokens."""
    plan = seq_lens.new_zeros(seq_lens.shape[0] + 1, 2) if out is None else out.zero_()
    rows = (seq_lens > 256).nonzero().flatten()
    plan[0, 0], plan[0, 1] = 256, rows.numel()
    plan[1 : 1 + rows.numel(), 0] = rows.to(plan.dtype)
    plan[1 : 1 + rows.numel(), 1] = seq_lens[rows]
    return plan


def flash_mla(
    cache_seqlens: torch.Tensor, *args: Any, topk: int | None = None, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand-in for FlashMLA's `get_mla_metadata`: int32 [132, 8] and the cumulative number of blocks [rows + 1].

    As in the compiled one, a row has `topk` keys, whatever its length, if that is given. One word of eight is not written.
    """
    keys = cache_seqlens if topk is None else torch.full_like(cache_seqlens, topk)
    blocks = torch.cumsum((keys + 63) // 64, 0, dtype=torch.int32)
    metadata = torch.empty(num_sms(), 8, dtype=torch.int32)
    metadata[:, :7] = 0
    metadata[:, 0] = int(keys.sum())
    return metadata, torch.nn.functional.pad(blocks, (1, 0))


def _copy_fields(
    source: tuple[Any, ...], target: tuple[Any, ...], mode: int, bs: int, max_len: int, width: int, rows: int
) -> None:
    """What sglang's fused copy kernels do: (lengths, cu, table, clipped, expanded, clipped cu, real table, splits, scheduler)."""
    sizes = (bs, bs + 1, None, rows, rows if mode else 0, rows + 1, None, rows + 1, None)
    for field, (origin, copy, size) in enumerate(zip(source, target, sizes, strict=True)):
        if origin is None or copy is None or size == 0:
            continue
        if field == 2:
            columns = width if mode else max_len
            copy[: origin.shape[0], :columns].copy_(origin[:, :columns])
        elif size is None:
            copy[tuple(slice(length) for length in origin.shape)].copy_(origin)
        else:
            copy[:size].copy_(origin[:size])


def _fused_copy(*arguments: Any) -> None:
    _copy_fields(arguments[0:9], arguments[9:18], *arguments[18:23])


def _fused_copy_to_three(*arguments: Any) -> None:
    bs, max_len, rows = arguments[32:35]
    for first in (8, 16, 24):
        source, target = [list(arguments[at : at + 8]) for at in (0, first)]
        for fields in (source, target):
            fields.insert(4, None)
        _copy_fields(tuple(source), tuple(target), 0, bs, max_len, -1, rows)


ATTENTION = "sglang.srt.layers.attention"
COPY_KERNELS = (
    "sglang.kernels.ops.attention.dsa.fused_metadata_copy",
    "sglang.kernels.ops.attention.fused_metadata_copy",
    "sglang.jit_kernel.fused_metadata_copy",
)
BACKENDS = tuple(generation.module for generation in GENERATIONS)
DEEP_GEMM = {"get_paged_mqa_logits_metadata": schedule, "get_num_sms": num_sms}
FLASH_MLA = ("sglang.kernels.ops.attention.flash_mla_interface", "sgl_kernel.flash_mla")
STAND_INS: tuple[tuple[tuple[str, ...], str, Any], ...] = (
    (("sglang.kernels.ops.attention.dsv4.topk", "sglang.jit_kernel.dsv4.topk"), "plan_topk_v2", topk_plan),
    (COPY_KERNELS, "fused_metadata_copy_cuda", _fused_copy),
    (COPY_KERNELS, "fused_metadata_copy_multi_cuda", _fused_copy_to_three),
    (BACKENDS, "is_cuda", lambda: True),
    (BACKENDS[:1], "deep_gemm", types.SimpleNamespace(**DEEP_GEMM)),
    ((f"{ATTENTION}.dsa.dsa_metadata_manager",), "is_cuda", lambda: True),
    ((f"{ATTENTION}.dsa.dsa_backend_mtp_precompute",), "_is_cuda", True),
    ((PLAN_MODULE,), "is_cuda", lambda: True),
    ((PLAN_MODULE,), "_get_deep_gemm", lambda: types.SimpleNamespace(**DEEP_GEMM)),
    ((INDEX_MODULE,), "_is_cuda", True),
)  # fmt: skip
"""Modules in which something is looked for, newest release first; its name there; what stands in for it."""


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """On a CPU: run sglang's CUDA metadata paths on CPU tensors, compiled kernels replaced. On a GPU: nothing.

    Needs TRITON_INTERPRET=1 in the environment before Triton is imported. May be nested.
    """
    if torch.cuda.is_available() or "is_cuda" in vars(torch.Tensor):
        yield
        return
    dsa_backend = importlib.import_module(generation().module)
    replaced = [
        (owner, name, value)
        for paths, name, value in STAND_INS
        for owner in (_first_module(paths),)
        if owner is not None and (hasattr(owner, name) or name == "deep_gemm")
    ]
    if hasattr(dsa_backend, "resolve_num_sms"):  # 0.5.21: DeepGEMM is found by a function
        replaced += [
            (dsa_backend, "resolve_paged_mqa_logits_metadata_fn", lambda: schedule),
            (dsa_backend, "resolve_num_sms", num_sms),
        ]
    functions: dict[str, dict[str, Any]] = {module: {"get_mla_metadata": flash_mla} for module in FLASH_MLA}
    if generation() is NSA:  # imports it where it uses it
        functions["deep_gemm"] = DEEP_GEMM
    interfaces = {module: types.ModuleType(module) for module in functions}
    for module, members in functions.items():
        vars(interfaces[module]).update(members)
    absent = object()
    saved = [(owner, name, vars(owner).get(name, absent)) for owner, name, _ in replaced]
    saved_modules = {name: sys.modules.get(name) for name in interfaces}
    for owner, name, value in replaced:
        setattr(owner, name, value)
    sys.modules.update(interfaces)
    torch.Tensor.is_cuda = property(lambda self: True)  # type: ignore[assignment]
    try:
        yield
    finally:
        del torch.Tensor.is_cuda  # the base class still has it
        for owner, name, value in saved:
            if value is absent:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        for module, before in saved_modules.items():
            if before is None:
                del sys.modules[module]
            else:
                sys.modules[module] = before


def _first_module(paths: Sequence[str]) -> Any:
    for path in paths:
        with contextlib.suppress(ImportError):
            return importlib.import_module(path)
    return None


def defined_values(metadata: Any, backend: Any, batch: Any, mode: ForwardMode) -> dict[str, torch.Tensor]:
    """Copies of the defined values of a `DSAMetadata` of `batch`, by name."""
    sizes = geometry(backend, metadata)
    values = compare.defined_values(metadata, metadata, describe(batch, backend=backend, mode=mode), sizes)
    return {name: value.clone() for name, value in values.items()}


def engine_metadata(backend: Any, batch: Any, mode: str) -> Any:
    """What sglang's own per-backend code computes for `batch`: the definition of faithful.

    `backend` is one that nothing else uses. Its first call makes the buffers, from the batch itself.
    """
    from sglang.srt.model_executor.forward_batch_info import ForwardMode as NativeMode

    batch = SimpleNamespace(**vars(batch) | {"forward_mode": NativeMode[mode]})
    if batch.batch_size not in backend.decode_cuda_graph_metadata:
        if generation().is_entry(generation().own_path):
            own_path.unhooked(backend, "init_forward_metadata_capture_cuda_graph")(**capture_arguments(batch))
        else:
            own_path.native_replay((backend,), batch, batch.forward_mode)
    own_path.native_replay((backend,), batch, batch.forward_mode)
    return backend.decode_cuda_graph_metadata[batch.batch_size]
