"""The real dense backends of sglang without a model runner, in any forward mode, and batches for them, on CPU tensors or a GPU.

`stand_ins` replaces compiled kernels and the settings of a server. Every line of metadata code that then runs is sglang's.
FlashMLA's compiled schedule is the real one where it can be had.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import torch

from nsa_plugin.rigs.sglang import flash_attention
from nsa_plugin.rigs.sglang.flash_attention import Sizes, model_runner, slots

FLASHMLA = "sglang.srt.layers.attention.flashmla_backend"
INTERFACE = "sglang.kernels.ops.attention.flash_mla_interface"
INTERFACES = (INTERFACE, "sgl_kernel.flash_mla")
"""Where sglang has FlashMLA's functions from. Until 0.5.22: the second."""
Name = Literal["fa3", "flashmla"]
"""As sglang's `--attention-backend` names it."""
CPU = torch.device("cpu")


def flash_mla(lengths: torch.Tensor, heads: int, kv_heads: int, **others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand-in for FlashMLA's `get_mla_metadata`: int32 [132, 8] and the running sum of blocks [requests + 1].

    It depends on lengths and heads, and can be recorded in a CUDA graph.
    """
    schedule = lengths.new_zeros(132, 8)
    schedule[:, 0], schedule[:, 1] = lengths.sum(), heads
    return schedule, torch.nn.functional.pad(torch.cumsum((lengths + 63) // 64, 0, dtype=torch.int32), (1, 0))


class _OnTheCpu:
    """The module torch, as code sees it that makes its tensors on "cuda"."""

    cuda = SimpleNamespace(get_device_properties=lambda device: SimpleNamespace(multi_processor_count=132))

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in ("full", "empty", "ones", "zeros"):
            return found
        return lambda *arguments, **keywords: found(*arguments, **{**keywords, "device": "cpu"})


def has_compiled_schedule() -> bool:
    """Whether FlashMLA's compiled `get_mla_metadata` can be had: sglang's wheel of FlashMLA on a GPU."""
    if not torch.cuda.is_available():
        return False
    try:
        importlib.import_module("flash_mla")
        importlib.import_module(INTERFACE)
    except (ImportError, OSError):  # not installed, or made for another sglang, torch or driver
        return False
    return True


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """Let sglang's code of both backends be imported, with stand-ins for what is not there of its compiled kernels."""
    interface: Any = types.ModuleType(INTERFACE)
    interface.get_mla_metadata, interface.flash_mla_with_kvcache = flash_mla, mock.Mock()
    with flash_attention.importable(), contextlib.ExitStack() as stack:
        if FLASHMLA not in sys.modules and not has_compiled_schedule():
            stack.callback(_put_back, {name: sys.modules.get(name) for name in (*INTERFACES, FLASHMLA)})
            sys.modules.update(dict.fromkeys(INTERFACES, interface))
        yield


@contextlib.contextmanager
def stand_ins(draft_tokens: int = 4) -> Iterator[None]:
    """Run sglang's code of both backends on CPU tensors. Needs TRITON_INTERPRET=1, as Triton is imported."""
    with importable(), flash_attention.stand_ins(draft_tokens), contextlib.ExitStack() as stack:
        module = importlib.import_module(FLASHMLA)
        if not has_compiled_schedule():
            stack.enter_context(mock.patch.object(module, "get_mla_metadata", flash_mla))
        if not torch.cuda.is_available():
            stack.enter_context(mock.patch.object(module, "torch", _OnTheCpu()))
        yield


def _put_back(modules: Mapping[str, types.ModuleType | None]) -> None:
    for name, module in modules.items():
        if module is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = module


def pages(metadata: Any) -> torch.Tensor:
    """The page table of a metadata of either backend."""
    table: torch.Tensor = metadata.page_table if "page_table" in vars(metadata) else metadata.block_kv_indices
    return table


@dataclass(frozen=True)
class Buffers:
    """What a runner holds of its largest batch.

    Attributes
    ----------
    lens : int64 tensor [requests]
    requests : int64 tensor [requests]
        Rows of the token table.
    slots : int64 tensor [requests * width]
        To be written.
    extend : int32 tensor [requests]
        Tokens of each request in a draft extend.
    """

    lens: torch.Tensor
    requests: torch.Tensor
    slots: torch.Tensor
    extend: torch.Tensor

    @classmethod
    def allocate(cls, requests: int, width: int, device: torch.device) -> Buffers:
        """Buffers of an empty batch, `width` tokens for each request."""
        lens = torch.ones(requests, dtype=torch.int64, device=device)
        slots = torch.zeros(requests * width, dtype=torch.int64, device=device)
        extend = torch.full((requests,), width, dtype=torch.int32, device=device)
        return cls(lens, torch.zeros_like(lens), slots, extend)

    def clear(self) -> None:
        """Every request at the fill length 1, row 0."""
        self.lens.fill_(1), self.requests.zero_(), self.slots.zero_()

    def load(self, other: Buffers) -> None:
        """Copy the batch of others."""
        for name in vars(self):
            getattr(self, name).copy_(getattr(other, name))


class Dense:
    """A backend, or all backends of a draft, with CUDA-graph buffers, and the static buffers of its runner.

    Made within `stand_ins`.

    Parameters
    ----------
    name : "fa3" or "flashmla"
    mode : str
        Name of sglang's forward mode; "DECODE" is a draft.
    sizes : Sizes
        FlashMLA's pages have 64 tokens.
    steps : int
        Speculative steps: a draft has one backend fewer.
    device : torch.device
    table : int32 tensor [max_requests, width], optional
        On that device; shuffled pages by default.

    Attributes
    ----------
    owner : object whose methods sglang's runners call
    backends : list of single backends
    table : int32 tensor [max_requests, width]
    buffers : Buffers
        The static ones of the runner.
    """

    def __init__(
        self, name: Name, mode: str, sizes: Sizes, steps: int = 4, device: torch.device = CPU,
        table: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        self.name, self.mode, self.sizes, self.steps = name, mode, sizes, steps
        self.table = slots(sizes).to(device) if table is None else table
        runner = model_runner(sizes, self.table, draft_worker=mode != "TARGET_VERIFY")
        self._translator = runner.kv_index_translator
        make = {"fa3": self._flash_attention, "flashmla": self._flashmla}[name]
        self.owner: Any = make(runner)
        self.backends: list[Any] = self.owner.attn_backends if mode == "DECODE" else [self.owner]
        self._width = steps if mode == "DECODE" else sizes.draft_tokens
        self.allocate()
        self.buffers = self.more_buffers()

    def _flash_attention(self, runner: Any) -> Any:
        module = importlib.import_module(flash_attention.BACKEND)
        if self.mode == "DECODE":
            return module.FlashAttentionMultiStepBackend(runner, 1, self.steps)
        return module.FlashAttentionBackend(runner)

    def _flashmla(self, runner: Any) -> Any:
        module = importlib.import_module(FLASHMLA)

        def bare() -> Any:
            backend: Any = object.__new__(module.FlashMLABackend)
            vars(backend).update(
                max_context_len=self.sizes.context, req_to_token=self.table, num_draft_tokens=self.sizes.draft_tokens,
                num_q_heads=128, is_fp8_kvcache=False, page_size=64, device=str(self.table.device), is_draft_runner=True,
                skip_prefill=True, kv_index_translator=runner.kv_index_translator, cuda_graph_mla_metadata_view=None,
                cuda_graph_num_splits_view=None, cuda_graph_draft_extend_seq_lens_k=None, forward_metadata=None,
                dcp_world_size=1,
            )  # fmt: skip
            return backend

        if self.mode != "DECODE":
            return bare()
        draft: Any = object.__new__(module.FlashMLAMultiStepDraftBackend)
        vars(draft).update(
            topk=1, speculative_num_steps=self.steps, attn_backends=[bare() for _ in range(self.steps - 1)]
        )
        return draft

    def allocate(self) -> None:
        """Make CUDA-graph buffers, as a runner does before its captures."""
        size = self.sizes.max_batch_size
        self.owner.init_cuda_graph_state(size, size * (1 if self.mode == "DECODE" else self._width))

    def more_buffers(self) -> Buffers:
        """Buffers like the runner's, for a batch besides."""
        return Buffers.allocate(self.sizes.max_batch_size, self._width, self.table.device)

    def seen(self, index: int) -> int:
        """Tokens that the kernels of the backend of that index see beyond the batch's lengths."""
        if self.mode == "DECODE":
            return 0 if self.name == "flashmla" else index + 1
        return self._width if self.mode == "TARGET_VERIFY" else 0

    def values(self, metadata: Any, index: int, size: int, lens: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """What captured kernels read of a metadata of the backend of that index.

        It is for a batch of `lens` [size], by default the one that `live` has made in the runner's buffers.
        """
        fields = (
            "cache_seqlens_int32",
            "cu_seqlens_k",
            "cu_seqlens_q",
            "flashmla_metadata",
            "num_splits",
            "seq_lens_k",
            "swa_out_cache_loc",
        )
        found = {name: value.clone() for name in fields if (value := vars(metadata).get(name)) is not None}
        lengths = (self.buffers.lens[:size] if lens is None else lens) + self.seen(index)
        columns = torch.arange(self.sizes.width // self.sizes.page_size, device=lengths.device)
        live = columns * self.sizes.page_size < lengths[:, None]
        for name, table in (("table", pages(metadata)), ("swa_page_table", vars(metadata).get("swa_page_table"))):
            if table is not None:
                whole = found[name] = table.new_full((size, len(columns)), -1)
                width = min(table.shape[1], len(columns))
                whole[:, :width] = table[:, :width].masked_fill(~live[:, :width], -1)
        return found

    def static(self, size: int) -> Any:
        """The batch that the runner captures: views of its static buffers, every request at the fill length 1, row 0."""
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

        self.buffers.clear()
        tokens = size * (1 if self.mode == "DECODE" else self._width)
        batch = ForwardBatch(
            forward_mode=ForwardMode[self.mode], batch_size=size, input_ids=torch.zeros(tokens, dtype=torch.int64, device=self.table.device),
            req_pool_indices=self.buffers.requests[:size], seq_lens=self.buffers.lens[:size],
            out_cache_loc=self.buffers.slots[: size * self._width], seq_lens_sum=size, seq_lens_cpu=None,
            extend_seq_lens=self.buffers.extend[:size] if self._extends else None,
            spec_info=self._spec(self.buffers, size), positions=torch.zeros(tokens, dtype=torch.int64, device=self.table.device),
        )  # fmt: skip
        self._translator.bind_runner_slots(batch)
        return batch

    def live(self, size: int, seq_lens: Sequence[int], requests: Sequence[int], buffers: Buffers | None = None) -> Any:
        """What the runner passes before a replay of a batch that is padded to `size`; fills `buffers`, by default its own.

        Slots to write are those of a draft's padded batch, but of the requests that exist in other modes.
        """
        into, raw = self.buffers if buffers is None else buffers, len(seq_lens)
        into.clear()
        into.lens[:raw], into.requests[:raw] = torch.tensor(seq_lens), torch.tensor(requests)
        for index, (row, end) in enumerate(zip(requests, seq_lens, strict=True)):
            written = self.table[row, end : end + self._width]
            into.slots[index * self._width :][: len(written)] = written
        return self.batch(size, raw, into)

    def batch(self, size: int, raw: int, buffers: Buffers) -> Any:
        """What the runner passes of `buffers`, which hold `raw` requests, before a replay."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        requests, lens, written = buffers.requests[:size], buffers.lens[:size], buffers.slots[: raw * self._width]
        plan = self._translator.plan(req_pool_indices=requests, seq_lens=lens, seq_lens_cpu=None, write_virtual=written)
        live = buffers.slots[: size * self._width] if self.mode == "DECODE" else written
        return SimpleNamespace(
            batch_size=size, forward_mode=ForwardMode[self.mode], req_pool_indices=requests, seq_lens=lens,
            seq_lens_cpu=None, seq_lens_sum=None, encoder_lens=None, out_cache_loc=live, out_cache_loc_virtual=None,
            kv_loc_plan=plan, kv_loc_cols=None, spec_info=self._spec(buffers, size), positions=None,
        )  # fmt: skip

    @property
    def _extends(self) -> bool:
        """Whether the backend reads how many tokens each request extends by; FlashMLA's graphs do not."""
        return self.name == "fa3" and self.mode == "DRAFT_EXTEND_V2"

    def _spec(self, buffers: Buffers, size: int) -> Any:
        from sglang.srt.speculative import eagle_info

        if self.mode == "DECODE":
            return eagle_info.EagleDraftInput(topk_p=None, topk_index=None, hidden_states=None)
        if not self._extends:
            return SimpleNamespace(draft_token_num=self._width, num_tokens_per_req=self._width)
        spec = eagle_info.EagleDraftExtendInput(
            hidden_states=None, num_correct_drafts=None, num_accept_tokens=None, num_tokens_per_req=self._width
        )
        spec.extend_seq_lens_cpu, spec.extend_seq_lens_tensor = [self._width] * size, buffers.extend[:size]
        return spec
