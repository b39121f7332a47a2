"""Traces of draft rounds: generated or recorded, with the KV slots that a paged allocator would hand out."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nsa_plugin.core.errors import reject


@dataclass(frozen=True)
class Round:
    """One draft round: real requests first, then padding to a captured batch size.

    Attributes
    ----------
    seq_lens : tuple of int
        Tokens in the KV cache of each request, 1 for padding.
    requests : tuple of int
        Pooled request (row of the token table) of each, 0 for padding.
    live : int
        How many are real.
    """

    seq_lens: tuple[int, ...]
    requests: tuple[int, ...]
    live: int


@dataclass(frozen=True)
class Sizes:
    """Sizes of a trace.

    Attributes
    ----------
    width : tokens that a request may have; max_requests : rows of the token table (row 0 is for padding);
    captured : batch sizes that CUDA graphs exist for; page_size : tokens per KV page.
    """

    width: int = 8192
    max_requests: int = 13
    captured: tuple[int, ...] = (1, 2, 4, 8, 12)
    page_size: int = 64


def generate(rounds: int, accept: int, sizes: Sizes, seed: int = 0) -> Iterator[Round]:
    """Requests that join with a prompt, accept 1 to `accept` tokens a round, and leave; sometimes nobody is there."""
    rng = random.Random(seed)
    free = list(range(1, sizes.max_requests))
    running: dict[int, list[int]] = {}  # request: [length, length at which it leaves]
    limit = sizes.width - accept
    for _ in range(rounds):
        while free and len(running) < max(sizes.captured) and rng.random() < 0.25:
            request = free.pop(rng.randrange(len(free)))
            prompt = rng.choice([1, sizes.page_size, rng.randrange(1, limit // 2), rng.randrange(1, limit)])
            running[request] = [prompt, min(prompt + rng.randrange(1, 400), limit)]
        order = sorted(running, key=lambda request: rng.random())
        batch = next(size for size in sizes.captured if size >= max(len(order), 1))
        padding = batch - len(order)
        yield Round(
            tuple(running[request][0] for request in order) + (1,) * padding, tuple(order) + (0,) * padding, len(order)
        )
        for request in order:
            running[request][0] += rng.randint(1, accept)
            if running[request][0] >= running[request][1]:
                del running[request]
                free.append(request)


def load(path: Path, sizes: Sizes) -> list[Round]:
    """Read a recorded trace: JSON lines with `seq_lens`, `req_pool_indices` and `live`.

    Raises
    ------
    InvalidValueError
        A line is not of that form or does not fit `sizes`; it is named.
    """
    rounds = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
            found = Round(tuple(entry["seq_lens"]), tuple(entry["req_pool_indices"]), int(entry["live"]))
        except (ValueError, KeyError, TypeError) as error:
            reject(where, "an object with seq_lens, req_pool_indices and live", f"{type(error).__name__}: {error}")
        if len(found.seq_lens) not in sizes.captured or len(found.requests) != len(found.seq_lens):
            reject(
                where,
                f"as many lengths as requests, one of {sizes.captured}",
                f"{len(found.seq_lens)} and {len(found.requests)}",
            )
        if not all(0 <= length <= sizes.width for length in found.seq_lens):
            reject(where, f"lengths of 0 to {sizes.width}", found.seq_lens)
        if not all(0 <= request < sizes.max_requests for request in found.requests):
            reject(where, f"requests 0 to {sizes.max_requests - 1}", found.requests)
        rounds.append(found)
    return rounds


def save(path: Path, rounds: Sequence[Round]) -> None:
    """Write a trace that `load` reads."""
    lines = [
        json.dumps({"seq_lens": entry.seq_lens, "req_pool_indices": entry.requests, "live": entry.live})
        for entry in rounds
    ]
    path.write_text("".join(line + "\n" for line in lines))


class SlotTable:
    """The token table that an engine's paged allocator would keep while a trace runs.

    Attributes
    ----------
    table : int32 tensor [max_requests, width]
        KV slot of each token of each pooled request. Slots of requests that left stay behind, as in an engine.
    """

    def __init__(self, sizes: Sizes, device: torch.device, seed: int = 0) -> None:
        self._sizes = sizes
        per_request = -(-sizes.width // sizes.page_size)
        self._free = list(range(sizes.max_requests * per_request))
        random.Random(seed).shuffle(self._free)
        self._held: dict[int, list[int]] = {}
        self._within = torch.arange(sizes.page_size, dtype=torch.int32)
        self.table = torch.zeros(sizes.max_requests, per_request * sizes.page_size, dtype=torch.int32, device=device)

    def advance(self, entry: Round) -> None:
        """Give the requests of a round the pages that they need; take back those of requests that are gone."""
        size = self._sizes.page_size
        present = dict(zip(entry.requests[: entry.live], entry.seq_lens, strict=False))
        for request in [request for request in self._held if request not in present]:
            self._free.extend(self._held.pop(request))
        for request, length in present.items():
            held = self._held.setdefault(request, [])
            while len(held) * size < length:
                page = self._free.pop()
                self.table[request, len(held) * size : (len(held) + 1) * size] = page * size + self._within
                held.append(page)
