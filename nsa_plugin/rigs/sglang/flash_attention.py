"""The real FlashAttention backend of sglang without a model runner, and batches of its draft extend, on CPU tensors.

`stand_ins` replaces compiled kernels that are not installed, which sglang's metadata code imports and does not call, and the
settings of a server. Every line of metadata code that then runs is sglang's.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

BACKEND = "sglang.srt.layers.attention.flashattention_backend"
KERNELS = "sgl_kernel"
TRANSLATOR = "sglang.srt.mem_cache.kv_index_translator"
PARALLEL = SimpleNamespace(attn_cp_size=1, attn_tp_size=1, attn_dcp_size=1, dcp_enabled=False, enable_prefill_cp=False,
                           attn_dp_enabled=False, dcp_size=1, dcp_rank=0)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Sizes of the backend and its caches.

    Attributes
    ----------
    width : columns of req_to_token; max_requests : its rows; max_batch_size : of CUDA-graph buffers; draft_tokens, page_size;
    sliding_window : whether the KV cache has a pool for sliding windows.
    """

    page_size: int = 1
    sliding_window: bool = False
    width: int = 320
    max_requests: int = 8
    max_batch_size: int = 4
    draft_tokens: int = 4

    @property
    def context(self) -> int:
        """Tokens that a sequence may have; the token table has some columns more."""
        return self.width - 8


class _Kernels(types.ModuleType):
    """A module of compiled kernels that nothing of metadata calls: every name is there."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.Mock()


class _Finder(MetaPathFinder, Loader):
    """Finds a stand-in for each module of the package of compiled kernels."""

    def find_spec(self, fullname: str, *rest: object) -> ModuleSpec | None:
        """The spec of a stand-in."""
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] == KERNELS else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        """The stand-in."""
        return _Kernels(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing: it has no code."""


@contextlib.contextmanager
def _no_kernels() -> Iterator[None]:
    finder, before = _Finder(), set(sys.modules)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == KERNELS:
                del sys.modules[name]


def _has_kernels() -> bool:
    """Whether the compiled kernels are there: on a GPU sglang's modules import more of them than stand-ins have."""
    try:
        importlib.import_module(KERNELS)
    except (ImportError, OSError, RuntimeError):  # not installed, or made for another torch or device
        return False
    return True


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """Let sglang's code be imported, with stand-ins for its compiled kernels where they are not there."""
    with contextlib.nullcontext() if _has_kernels() else _no_kernels():
        yield


@contextlib.contextmanager
def stand_ins(draft_tokens: int = 4) -> Iterator[Any]:
    """Run sglang's code on CPU tensors; yields the module of the backend. Needs TRITON_INTERPRET=1, as Triton is imported."""
    draft = SimpleNamespace(
        speculative_eagle_topk=1, speculative_num_draft_tokens=draft_tokens, speculative_algorithm="EAGLE"
    )
    settings = {
        "get_parallel": PARALLEL,
        "get_spec": draft,
        "get_model": SimpleNamespace(is_embedding=False),
        "get_schedule": SimpleNamespace(chunked_prefill_size=8192),
        "get_memory": SimpleNamespace(disable_radix_cache=False),
        "get_exec": SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=False)),
        "get_device_capability": (9, 0),
    }
    with importable(), contextlib.ExitStack() as stack:
        backend = importlib.import_module(BACKEND)
        for name, value in settings.items():
            stack.enter_context(mock.patch.object(backend, name, lambda value=value: value))
        stack.enter_context(mock.patch(f"{TRANSLATOR}.get_parallel", lambda: PARALLEL))
        stack.enter_context(mock.patch("sglang.srt.speculative.spec_utils.get_spec", lambda: draft))
        yield backend


def slots(sizes: Sizes, seed: int = 0) -> torch.Tensor:
    """Token table int32 [requests, width] of shuffled pages; request 0 is the padding's, all zeros."""
    generator = torch.Generator().manual_seed(seed)
    per_request = -(-sizes.width // sizes.page_size)
    pages = torch.randperm((sizes.max_requests - 1) * per_request, generator=generator) + 1
    tokens = pages.view(-1, per_request, 1) * sizes.page_size + torch.arange(sizes.page_size)
    table = torch.zeros(sizes.max_requests, sizes.width, dtype=torch.int32)
    table[1:] = tokens.flatten(1)[:, : sizes.width]
    return table


def model_runner(sizes: Sizes, table: torch.Tensor, draft_worker: bool = True) -> Any:
    """What a backend takes of sglang's model runner."""
    from sglang.srt.configs.model_config import AttentionArch
    from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    pool: Any = SimpleNamespace()
    if sizes.sliding_window:
        pool = object.__new__(SWAKVPool)
        pages = torch.arange(int(table.max()) // sizes.page_size + 1, device=table.device)
        pages[1:] = pages[1:].flip(0)  # page 0 is the padding's in both pools
        moved = pages[:, None] * sizes.page_size + torch.arange(sizes.page_size, device=table.device)
        pool.swa_layer_nums, pool.full_to_swa_index_mapping = (
            2,
            torch.nn.functional.pad(moved.flatten(), (0, 1), value=-1),
        )
    translator = KVIndexTranslator(
        req_to_token=table, token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
        token_to_kv_pool=pool, page_size=sizes.page_size, device=str(table.device), is_draft_worker=draft_worker,
    )  # fmt: skip
    model = SimpleNamespace(
        is_encoder_decoder=False, context_len=sizes.context, attention_arch=AttentionArch.MLA,
        is_local_attention_model=False, head_dim=128, hf_text_config=SimpleNamespace(num_attention_heads=32),
        get_num_kv_heads=lambda ranks: 8,
    )  # fmt: skip
    return SimpleNamespace(
        sliding_window_size=128 if sizes.sliding_window else None, model_config=model, device=str(table.device),
        req_to_token_pool=SimpleNamespace(req_to_token=table, size=sizes.max_requests - 1), token_to_kv_pool=pool,
        kv_cache_dtype=torch.bfloat16, kv_cache_dtype_str="auto", page_size=sizes.page_size,
        kv_index_translator=translator, is_draft_worker=draft_worker, attention_chunk_size=None,
    )  # fmt: skip


class DraftExtend:
    """A draft-extend backend with CUDA-graph buffers, and the static buffers of its runner. Made within `stand_ins`.

    Attributes
    ----------
    backend : FlashAttentionBackend
    table : int32 tensor [max_requests, width]
    """

    def __init__(self, sizes: Sizes, kind: Any = None) -> None:
        self.sizes, self.table = sizes, slots(sizes)
        runner = model_runner(sizes, self.table)
        self.translator = runner.kv_index_translator
        self.backend = (kind or importlib.import_module(BACKEND).FlashAttentionBackend)(runner)
        self.allocate()
        tokens = sizes.max_batch_size * sizes.draft_tokens
        self._lens = torch.ones(sizes.max_batch_size, dtype=torch.int64)
        self._requests = torch.zeros(sizes.max_batch_size, dtype=torch.int64)
        self._extend = torch.full((sizes.max_batch_size,), sizes.draft_tokens, dtype=torch.int32)
        self._slots = torch.zeros(tokens, dtype=torch.int64)

    def allocate(self) -> None:
        """Make CUDA-graph buffers, as a runner does before its captures."""
        size = self.sizes.max_batch_size
        self.backend.init_cuda_graph_state(size, size * self.sizes.draft_tokens)

    def static(self, size: int) -> Any:
        """The batch that the runner captures: views of its static buffers."""
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

        tokens = size * self.sizes.draft_tokens
        batch = ForwardBatch(
            forward_mode=ForwardMode.DRAFT_EXTEND_V2, batch_size=size, input_ids=torch.zeros(tokens, dtype=torch.int64),
            req_pool_indices=self._requests[:size], seq_lens=self._lens[:size], out_cache_loc=self._slots[:tokens],
            seq_lens_sum=size, seq_lens_cpu=None, spec_info=self._spec(), extend_seq_lens=self._extend[:size],
            positions=torch.zeros(tokens, dtype=torch.int64),
        )  # fmt: skip
        self.translator.bind_runner_slots(batch)
        return batch

    def live(self, size: int, seq_lens: Sequence[int], requests: Sequence[int], extend: Sequence[int]) -> Any:
        """What the runner passes before a replay of a batch that is padded to `size`; fills its static buffers.

        `seq_lens` count the tokens of the draft's window.
        """
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        raw, width = len(seq_lens), self.sizes.draft_tokens
        self._lens.fill_(1), self._requests.zero_(), self._slots.zero_(), self._extend.fill_(width)
        self._lens[:raw], self._requests[:raw] = torch.tensor(seq_lens), torch.tensor(requests)
        self._extend[:raw] = torch.tensor(extend, dtype=torch.int32)
        for index, (row, end) in enumerate(zip(requests, seq_lens, strict=True)):
            self._slots[index * width :][:width] = self.table[row, end - width : end]
        spec = self._spec()
        spec.extend_seq_lens_cpu, spec.extend_seq_lens_tensor = self._extend[:size].tolist(), self._extend[:size]
        live = self._slots[: raw * width]
        plan = self.translator.plan(
            req_pool_indices=self._requests[:size], seq_lens=self._lens[:size], seq_lens_cpu=None, write_virtual=live
        )
        return SimpleNamespace(
            batch_size=size, forward_mode=ForwardMode.DRAFT_EXTEND_V2, req_pool_indices=self._requests, seq_lens=self._lens,
            seq_lens_cpu=None, seq_lens_sum=None, encoder_lens=None, out_cache_loc=live, out_cache_loc_virtual=None,
            kv_loc_plan=plan, kv_loc_cols=None, spec_info=spec,
        )  # fmt: skip

    def _spec(self) -> Any:
        from sglang.srt.speculative.eagle_info import EagleDraftExtendInput

        return EagleDraftExtendInput(
            hidden_states=None,
            num_correct_drafts=None,
            num_accept_tokens=None,
            num_tokens_per_req=self.sizes.draft_tokens,
        )
