"""A draft with dense MLA: the real builders of FLASH_ATTN_MLA and FLASHMLA, with stand-ins for their compiled schedulers.

The stand-ins follow from the lengths alone. The real ones also take `max_seq_len` for a bound, which is the model's length
where metadata are captured, and a tighter one where they are rebuilt: their schedules differ, and are right both.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backends import fa_utils

from nsa_plugin.rigs.vllm.stand_ins import without_compiled_flashmla
from nsa_plugin.rigs.vllm.v2_draft import DENSE, Draft, DraftModel, Graphs, Sizes

MLA = "vllm.v1.attention.backends.mla"
TILES = 66
"""Rows of FlashMLA's tile schedule, fewer than the builder's buffer has."""
POISON = 3
DEFAULT = Sizes()
DUE = "the schedule is that of the lengths"
"""A rebuild gives rows of padding no length, an update in place lets them grow: only this compares a padded batch's."""


@dataclass(frozen=True)
class Layout:
    """A builder of dense MLA, and how its cache is kept.

    Attributes
    ----------
    module, backend : str
        vLLM's module of the builder, and its backend there.
    fp8 : bool
        Whether the cache is of fp8.
    """

    module: str
    backend: str
    fp8: bool = False


LAYOUTS = {
    "FLASH_ATTN_MLA": Layout(f"{MLA}.flashattn_mla", "FlashAttnMLABackend"),
    "FLASHMLA, bf16": Layout(f"{MLA}.flashmla", "FlashMLABackend"),
    "FLASHMLA, fp8": Layout(f"{MLA}.flashmla", "FlashMLABackend", fp8=True),
}


def splits(lengths: torch.Tensor) -> torch.Tensor:
    """In place of FlashAttention 3's: int32 [1 + 4 * requests rounded up to 4], a function of every length."""
    size = lengths.numel()
    rows = (size + 3) // 4 * 4
    made = torch.zeros(1 + 4 * rows, dtype=torch.int32)
    made[1 : 1 + size] = (lengths + 127) // 128
    made[1 + rows : 1 + rows + size] = torch.argsort(lengths, descending=True, stable=True)
    made[1 + 2 * rows : 1 + 2 * rows + size] = lengths
    return made


def tiles(lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of FlashMLA's: int32 [`TILES`, 8] and int32 [requests + 1], functions of every length."""
    ends = torch.cumsum((lengths + 63) // 64, 0, dtype=torch.int32)
    made = torch.zeros(TILES, 8, dtype=torch.int32)
    made[:, 0] = ends[-1]
    made[:, 1] = (lengths * torch.arange(1, lengths.numel() + 1)).sum()
    return made, torch.nn.functional.pad(ends, (1, 0))


def modules() -> tuple[ModuleType, ModuleType, ModuleType]:
    """vLLM's modules of FLASH_ATTN_MLA and FLASHMLA, and FlashMLA's own, whose compiled parts may be absent."""
    without_compiled_flashmla()
    for name in ("flash_attn_varlen_func", "get_scheduler_metadata"):
        if not hasattr(fa_utils, name):
            setattr(fa_utils, name, None)
    names = (f"{MLA}.flashattn_mla", f"{MLA}.flashmla", "vllm.third_party.flashmla.flash_mla_interface")
    flash_attn, flashmla, interface = map(importlib.import_module, names)
    return flash_attn, flashmla, interface


def builders() -> list[type]:
    """The classes of both."""
    flash_attn, flashmla, _ = modules()
    return [flash_attn.FlashAttnMLAMetadataBuilder, flashmla.FlashMLAMetadataBuilder]


@contextlib.contextmanager
def emulated_schedulers() -> Iterator[None]:
    """Within it the builders make schedules, as on Hopper, with `splits` and `tiles`."""
    flash_attn, flashmla, interface = modules()
    with (
        mock.patch.multiple(
            flash_attn,
            get_scheduler_metadata=lambda *, cache_seqlens, **_: splits(cache_seqlens),
            get_flash_attn_version=lambda *_, **__: 3,
        ),
        mock.patch.multiple(
            flashmla,
            num_compute_units=lambda *_: 2 * TILES,
            FlashMLASchedMeta=interface.FlashMLASchedMeta,
            get_mla_metadata=interface.get_mla_metadata,
            get_mla_metadata_dense_fp8=lambda cache_seqlens, num_q_tokens_per_head_k, num_heads_k: tiles(cache_seqlens),
        ),
    ):
        yield


class DenseModel(DraftModel):
    """Writes down what dense attention would read, and fills FlashMLA's object as the first layer of a step does."""

    def forward(self, input_ids: Any, positions: Any, hidden_states: Any, inputs_embeds: Any = None) -> Any:
        """Record one step."""
        context = get_forward_context()
        attention = context.attn_metadata[DENSE.draft[0]]
        decode = attention.decode
        step = {
            "lengths": decode.seq_lens,
            "slots": attention.slot_mapping,
            "blocks": decode.block_table[:, : self.columns],
            "query ends": attention.query_start_loc[1:],
            "positions": positions,
            "context slots": context.slot_mapping[DENSE.draft[0]],
        }
        found = decode.scheduler_metadata
        if isinstance(found, torch.Tensor):
            schedule, due = found, splits(decode.seq_lens)
        else:
            if not found.have_initialized and found.tile_scheduler_metadata is None:
                found.have_initialized = True
                found.tile_scheduler_metadata, found.num_splits = tiles(decode.seq_lens)
            schedule = torch.cat([found.tile_scheduler_metadata.flatten(), found.num_splits])
            due = torch.cat([part.flatten() for part in tiles(decode.seq_lens)])
        step["schedule"] = schedule[None]  # whole in every row
        step[DUE] = torch.tensor([torch.equal(schedule, due)])
        self.seen.append({name: value.clone() for name, value in step.items()})
        return hidden_states.clone(), hidden_states.clone()


class DenseGraphs(Graphs):
    """What a graph of one step has recorded of FlashMLA's first call makes the schedule at every replay."""

    def body(self) -> None:
        """The same, from an object that nobody has filled."""
        if not self._draft.fused:
            for own in self._metadata.values():
                if getattr(own.decode.scheduler_metadata, "have_initialized", False):
                    own.decode.scheduler_metadata = type(own.decode.scheduler_metadata)()
        super().body()


class DenseDraft(Draft):
    """A speculator over a tiny DeepSeek-V3 with MTP, within `emulated_schedulers`."""

    def __init__(self, layout: Layout, tokens: int, sizes: Sizes = DEFAULT) -> None:
        module = importlib.import_module(layout.module)
        builder = getattr(module, layout.backend).get_builder_cls()
        make = functools.partial(_made_for_graphs, builder.__init__, layout.fp8)
        with mock.patch.object(builder, "__init__", lambda *arguments, **named: make(*arguments, **named)):
            super().__init__("auto", 4, tokens, sizes, DenseModel, DenseGraphs, getattr(module, layout.backend), DENSE)

    def poison(self) -> None:
        """Fill what builders and runner own, and what nobody may read unwritten."""
        self.tables.slot_mappings.fill_(POISON)
        for builder in self.builders:
            for name in ("scheduler_metadata", "cg_buf_tile_scheduler_metadata", "cg_buf_num_splits"):
                if getattr(builder, name, None) is not None:
                    getattr(builder, name).fill_(POISON)


def _made_for_graphs(init: Any, fp8: bool, builder: Any, spec: Any, names: Any, config: Any, device: Any) -> None:
    """A builder as vLLM makes it where it captures whole graphs, which a CPU does not, nor does it take an fp8 cache."""
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
    init(builder, spec, names, config, device)
    builder.is_fp8_kvcache = fp8
