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
from nsa_plugin.rigs.vllm.v2_draft import DENSE, Draft, DraftModel, Sizes

MLA = "vllm.v1.attention.backends.mla"
TILES = 66
"""Rows of FlashMLA's tile schedule, fewer than the builder's buffer has."""


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
            "query starts": attention.query_start_loc[None],
            "positions": positions,
            "context slots": context.slot_mapping[DENSE.draft[0]],
        }
        for name, value in self._schedule(decode).items():
            step[name] = value[None]  # whole in every row
        self.seen.append({name: value.clone() for name, value in step.items()})
        return hidden_states.clone(), hidden_states.clone()

    def _schedule(self, decode: Any) -> dict[str, torch.Tensor]:
        """What there is, and what follows from the lengths that the step reads."""
        found = decode.scheduler_metadata
        if isinstance(found, torch.Tensor):
            return {"schedule": found, "schedule of these lengths": splits(decode.seq_lens)}
        if found.tile_scheduler_metadata is None:
            found.have_initialized = True
            found.tile_scheduler_metadata, found.num_splits = tiles(decode.seq_lens)
        tile, ends = tiles(decode.seq_lens)
        return {
            "schedule": torch.cat([found.tile_scheduler_metadata.flatten(), found.num_splits]),
            "schedule of these lengths": torch.cat([tile.flatten(), ends]),
        }


class DenseDraft(Draft):
    """A speculator over a tiny DeepSeek-V3 with MTP, within `emulated_schedulers`."""

    def __init__(self, layout: Layout, tokens: int, sizes: Sizes = Sizes(), **settings: Any) -> None:
        module = importlib.import_module(layout.module)
        builder = getattr(module, layout.backend).get_builder_cls()
        make = functools.partial(_made_for_graphs, builder.__init__, layout.fp8)
        with mock.patch.object(builder, "__init__", lambda *arguments, **named: make(*arguments, **named)):
            super().__init__(
                "auto", 4, tokens, sizes, DenseModel, attention=getattr(module, layout.backend), kind=DENSE, **settings
            )


def _made_for_graphs(init: Any, fp8: bool, builder: Any, spec: Any, names: Any, config: Any, device: Any) -> None:
    """A builder as vLLM makes it where it captures whole graphs, which a CPU does not, nor does it take an fp8 cache."""
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
    init(builder, spec, names, config, device)
    builder.is_fp8_kvcache = fp8
