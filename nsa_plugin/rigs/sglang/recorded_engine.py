"""The draft extend of the real sglang's FlashAttention as the conformance kit sees it: sglang's own graph computes its metadata.

On a CPU a captured graph is emulated, as in `engine`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from nsa_plugin.adapters.sglang.recorded import ROWS, RecordedGraph
from nsa_plugin.rigs.sglang import dense_engine, flash_attention
from nsa_plugin.rigs.sglang.flash_attention import Sizes
from nsa_plugin.testing.engine import Fault

(ROW,) = ROWS


class DraftExtend(flash_attention.DraftExtend):
    """Used as `dense.Dense` is."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.owner, self.backends = self.backend, [self.backend]
        self._tokens = 0

    def live(self, *batch: Any) -> Any:
        """As in the base class."""
        made = super().live(*batch)
        self._tokens = len(made.out_cache_loc)
        return made

    def values(self, metadata: Any, index: int, size: int) -> dict[str, torch.Tensor]:
        """What captured kernels read: vectors, live pages, and slots of the requests that exist."""
        found = {name: getattr(metadata, name).clone() for name in ROW.vectors}
        for name in ROW.tables:
            if (table := getattr(metadata, name)) is not None:
                starts = torch.arange(table.shape[1], device=table.device) * self.sizes.page_size
                found[name] = table.masked_fill(starts >= metadata.cache_seqlens_int32[:, None], -1)
        for name in ROW.slots:
            if (slots := getattr(metadata, name)) is not None:
                found[name] = slots[: self._tokens].clone()
        return found


@dataclass(frozen=True)
class RecordedCase(dense_engine.DenseCase):
    """A draft extend with a page size and captured sizes."""

    @property
    def column(self) -> str:
        """What the release matrix has it under: that of the other passes of the backend."""
        return "dense FlashAttention"

    @property
    def batches(self) -> list[tuple[int, tuple[list[int], ...]]]:
        """With the tokens by which each request is extended. Every request has as many as a window of the draft at least."""
        width = Sizes.draft_tokens
        return [
            (size, ([max(length, width) for length in lengths], rows, [1 + length % width for length in lengths]))
            for size, (lengths, rows) in super().batches
        ]

    def rig(self) -> DraftExtend:
        """A backend that nothing else uses."""
        return DraftExtend(Sizes(self.page_size, self.sliding_window))


def case(page_size: int, windows: bool = False, sizes: tuple[int, ...] = (4,)) -> RecordedCase:
    """A case."""
    covers = {"draft extend", "padded rows", "idle batch", "int64 lengths"}
    covers |= {"several captured sizes"} if len(sizes) > 1 else set()
    return RecordedCase(
        f"{ROW.path}, page size {page_size}, sizes {sizes}" + (", sliding windows" if windows else ""), ROW.path,
        sum(len(dense_engine.BATCHES[size]) for size in sizes), frozenset(covers), mode=ROW.mode, page_size=page_size,
        sizes=sizes, sliding_window=windows, part=ROW.part,
    )  # fmt: skip


CASES = (
    case(64),
    case(64, sizes=(4, 2, 1)),
    *(case(page_size) for page_size in (1, 16, 128)),
    *(case(page_size, windows=True) for page_size in (1, 64)),
)


class RecordedEngine(dense_engine.DenseEngine):
    """FlashAttention's draft extend in the installed sglang, from 0.5.22 on."""

    strategies = ("graph",)
    never: Mapping[str, str] = {
        **dense_engine.DenseEngine.never,
        **dict.fromkeys(("decode", "one step", "several steps", "target verify"), "the case of another fixture"),
        "describe": "sglang's graph reads the batch",
    }
    tried = CASES

    def __init__(self, cases: Sequence[RecordedCase] = CASES, plugins: Sequence[object] = ()) -> None:
        super().__init__(cases, plugins)

    @contextlib.contextmanager
    def plant(self, working: int) -> Iterator[Fault]:
        """In the question whether sglang's graph does the work: nothing of ours computes."""
        fault, reads = Fault(working), RecordedGraph.reads

        def failing(graph: RecordedGraph, batch: Any) -> bool:
            fault.call()
            return reads(graph, batch)

        with mock.patch.object(RecordedGraph, "reads", failing):
            yield fault
