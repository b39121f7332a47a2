"""Stand-ins for what a CPU lacks of vLLM: the compiled FlashMLA, pinned memory, a CUDA platform and DeepGEMM's schedule.

The first two are put in place for the rest of the process, because vLLM can't go on without; the others on demand.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from triton.runtime import interpreter
from vllm.v1.attention.backends.mla import flashmla_sparse, indexer


class _Unpinned:
    """`torch`, for a module that asks for pinned memory, which a machine without a GPU has not."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *size: Any, pin_memory: bool = False, **keywords: Any) -> torch.Tensor:
        """Not pinned."""
        return torch.zeros(*size, **keywords)


def without_compiled_flashmla() -> None:
    """Let FlashMLA-sparse's builder make its scheduler object for an fp8 cache, and its buffers in plain memory."""
    sys.modules.setdefault("vllm._flashmla_C", types.ModuleType("vllm._flashmla_C"))
    from vllm.third_party.flashmla import flash_mla_interface

    flashmla_sparse.get_mla_metadata = flash_mla_interface.get_mla_metadata
    flashmla_sparse.FlashMLASchedMeta = flash_mla_interface.FlashMLASchedMeta
    flashmla_sparse.torch = _Unpinned()


def schedule(context_lens: torch.Tensor, block_size: int, num_sms: int, indices: Any = None) -> torch.Tensor:
    """In place of DeepGEMM's: int32 [num_sms + 1, 2], a function of every context length."""
    pages = (context_lens.clamp(min=0).flatten() + block_size - 1) // block_size
    weighted = (pages * torch.arange(1, pages.numel() + 1)).sum().to(torch.int32)
    slot = torch.arange(num_sms + 1, dtype=torch.int32)
    return torch.stack([slot * weighted, (slot * 31 + weighted) % 97], 1).to(torch.int32)


@contextlib.contextmanager
def emulated_cuda(family: int) -> Iterator[None]:
    """Within it the indexer's builder takes its branches for a CUDA device of this family (90 or 100), with `schedule`."""
    real = indexer.current_platform

    class CudaLike:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def is_cuda(self) -> bool:
            return True

        def is_device_capability_family(self, asked: int) -> bool:
            return asked == family

    replaced: dict[str, Any] = {
        "current_platform": CudaLike(),
        "has_deep_gemm": lambda: True,
        "get_paged_mqa_logits_metadata": schedule,
        "native_next_n_supported": lambda n: n in (1, 2, 4) if family == 90 else True,
    }
    with mock.patch.multiple(indexer, **replaced), contextlib.ExitStack() as stack:
        if family == 100:
            stack.enter_context(_splatted_masks_accepted())
        yield


@contextlib.contextmanager
def _splatted_masks_accepted() -> Iterator[None]:
    """Triton's interpreter splats a scalar bool to bytes, and then refuses masks that a kernel makes of it."""
    builder = interpreter.InterpreterBuilder

    def accepting(original: Callable[..., Any], at: int) -> Callable[..., Any]:
        def access(self: Any, *arguments: Any) -> Any:
            arguments[at].data = arguments[at].data.astype(bool)
            return original(self, *arguments)

        return access

    with mock.patch.multiple(
        builder,
        create_masked_load=accepting(builder.create_masked_load, 1),
        create_masked_store=accepting(builder.create_masked_store, 2),
    ):
        yield
