"""Runs only where drafts are verified: the rows that hold the metadata of every step, and which field of what each is."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nsa_plugin.adapters.vllm.releases import table_block_size


class Arena:
    """The rows of all captured sizes of a speculator: one buffer per name, which they share, since drafts take turns."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, torch.Tensor] = {}
        self.size = 0
        """Bytes allocated so far."""

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """A buffer of at least that shape; one that is too small stays with who has it."""
        found = self._buffers.get(name)
        if found is None or any(have < want for have, want in zip(found.shape, shape, strict=True)):
            with torch.inference_mode(False):  # written in and outside of it
                found = self._buffers[name] = torch.zeros(shape, dtype=dtype, device=self._device)
            self.size += found.numel() * found.element_size()
        return found

    def numbers(self, most: int) -> torch.Tensor:
        """0, 1, 2 … [most]."""
        found = self._buffers.get("numbers")
        if found is None:
            with torch.inference_mode(False):
                found = self._buffers["numbers"] = torch.arange(most, dtype=torch.int32, device=self._device)
        return found


@dataclass(frozen=True)
class Field:
    """One tensor of a group's metadata.

    Attributes
    ----------
    kind : str
        Class of the metadata.
    path : str
        Attributes that lead to it, "field.field".
    rows : sequence of tensor
        Where it is before the draft begins, for each step; the same one if it does not change.
    target : tensor
        Where the draft reads it, of the same shape.
    """

    kind: str
    path: str
    rows: list[torch.Tensor]
    target: torch.Tensor

    @property
    def leaf(self) -> str:
        """The last attribute."""
        return self.path.rpartition(".")[2]

    @property
    def once(self) -> bool:
        """Whether it stays the same in all steps."""
        return len(self.rows) > 1 and self.rows[1] is self.rows[0]

    def read(self, metadata: Any) -> torch.Tensor:
        """Take it from other metadata of the group, for as many rows or more."""
        value: torch.Tensor = operator.attrgetter(self.path)(metadata)
        return value[: self.target.shape[0]].reshape(self.target.shape)


@dataclass(frozen=True)
class StagedGroup:
    """An attention group whose metadata is understood."""

    group: Any
    fields: list[Field]
    schedule: Callable[[Any], torch.Tensor] | None = None

    def own(self, metadata: Mapping[str, Any]) -> Any:
        """Its metadata."""
        return metadata[self.group.layer_names[0]]

    @property
    def block_size(self) -> int:
        """Tokens per entry of its block table."""
        return table_block_size(self.group)


@dataclass(frozen=True)
class Expected:
    """vLLM's own values of a step: slots [KV-cache groups, capacity], lengths [rows], and the fields of each group."""

    slots: torch.Tensor
    lengths: torch.Tensor
    fields: list[list[torch.Tensor]]

    def kept(self) -> Expected:
        """Copies."""
        return Expected(
            self.slots.clone(), self.lengths.clone(), [[value.clone() for value in own] for own in self.fields]
        )
