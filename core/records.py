"""How the metadata and copy kernels are told of one consumer's buffers: a record of int64 words.

Word 0 is the step's length offset. A vector takes two words (address, stride in elements), a matrix three (address, row
stride, column stride). Address 0 means that the consumer lacks the plane. Derived planes come last, with two words each:
address, and number of 4-byte words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch

from nsa_plugin.core.metadata import MAPPED_SLOTS, MAPPED_TABLE, TABLES, TOKENS, VECTORS, StepMetadata, plane
from nsa_plugin.core.pools import POOL_PLANES, POOL_TABLE

MATRICES = (*TABLES, MAPPED_TABLE, POOL_TABLE, "pools.write_loc")
PLANES = (*VECTORS, *TABLES, *TOKENS, *POOL_PLANES, POOL_TABLE, MAPPED_TABLE, MAPPED_SLOTS)
"""Planes of a record, in the order of their words. A kernel names a plane by its first word, see `WORD`."""
_SIZES = tuple(3 if name in MATRICES else 2 for name in PLANES)
_STARTS = tuple(accumulate((1, *_SIZES)))
WORD = dict(zip(PLANES, _STARTS[:-1], strict=True))
"""First word of each plane in a record."""
FIRST_DERIVED = _STARTS[-1]
"""First word of the derived planes."""


def records(steps: Sequence[StepMetadata], offsets: Sequence[int], derived: Sequence[str]) -> torch.Tensor:
    """The records of `steps`, one a row, on the device of their buffers; `derived` names the derived planes they list."""
    rows = [[offset, *_words(step, derived)] for offset, step in zip(offsets, steps, strict=True)]
    return torch.tensor(rows, dtype=torch.int64).to(steps[0].cache_seqlens.device)


def _words(step: StepMetadata, derived: Sequence[str]) -> Iterator[int]:
    for name, size in zip(PLANES, _SIZES, strict=True):
        value = plane(step, name)
        yield from (0,) * size if value is None else (value.data_ptr(), *value.stride())
    for name in derived:
        value = step.derived[name]
        yield from (value.data_ptr(), value.numel() * value.element_size() // 4)
