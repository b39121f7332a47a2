"""Traces of speculative rounds: generated, with the KV slots that a paged allocator would hand out, or recorded.

`benchmarks/end_to_end/recorder` records them from a running engine.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nsa_plugin.core.errors import reject

MAX_LENGTH, MAX_REQUEST, MAX_PAGE = 1 << 20, 1 << 16, 1 << 24
"""Beyond these a recorded line is taken for damaged."""
MAX_ENTRIES = 1 << 30
"""Beyond this a token table is taken for that of a damaged trace."""


@dataclass(frozen=True)
class Round:
    """One replay: real requests first, then padding to a captured batch size.

    Attributes
    ----------
    seq_lens : tuple of int
        Tokens in the KV cache of each request, 1 for padding.
    requests : tuple of int
        Pooled request (row of the token table) of each, 0 for padding.
    live : int
        How many are real.
    path : str
        What was prepared, in the adapters' words: "draft decode", "target verify" or "draft extend".
    pages : mapping of request to (index of its first page that is not as before, page numbers from there on)
        As recorded; empty in a generated trace, whose pages `SlotTable` hands out.
    """

    seq_lens: tuple[int, ...]
    requests: tuple[int, ...]
    live: int
    path: str = "draft decode"
    pages: Mapping[int, tuple[int, Sequence[int]]] = field(default_factory=dict)


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


def load(path: Path, kind: str = "draft decode") -> list[Round]:
    """Read the rounds of one path from a recorded trace: JSON lines with `seq_lens`, `req_pool_indices` and `live`.

    Raises
    ------
    InvalidValueError
        A line is not of that form; it is named. Or no line is of that path. Or its token table would be too large.
    """
    rounds = []
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError:
        reject(str(path), "a recorded trace, which is JSON lines", "a file that is no text")
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
            pages = {
                int(request): (int(at), tuple(map(int, new))) for request, (at, new) in entry.get("pages", {}).items()
            }
            found = Round(
                tuple(map(int, entry["seq_lens"])), tuple(map(int, entry["req_pool_indices"])), int(entry["live"]),
                entry.get("path", "draft decode"), pages,
            )  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            reject(where, "an object with seq_lens, req_pool_indices and live", f"{type(error).__name__}: {error}")
        if len(found.requests) != len(found.seq_lens) or not 0 <= found.live <= len(found.seq_lens):
            reject(
                where,
                "as many lengths as requests, and no more that are live",
                f"{len(found.seq_lens)} lengths, {len(found.requests)} requests, {found.live} live",
            )
        if not found.seq_lens:
            reject(where, "at least one length, of padding if nobody is there", "none")
        if not set(found.pages) <= set(found.requests):
            reject(
                where, "pages of requests of the round", f"pages of {sorted(set(found.pages) - set(found.requests))}"
            )
        starts = [at for at, _ in found.pages.values()]
        numbers = [page for _, new in found.pages.values() for page in new]
        for name, values, limit in (
            ("lengths", found.seq_lens, MAX_LENGTH), ("requests", found.requests, MAX_REQUEST),
            ("first pages", starts, MAX_LENGTH // Sizes.page_size), ("pages", numbers, MAX_PAGE),
        ):  # fmt: skip
            if not all(0 <= value <= limit for value in values):
                reject(where, f"{name} of 0 to {limit}", values)
        if found.path == kind:
            rounds.append(found)
    if not rounds:
        reject(str(path), f"rounds of {kind}", "none")
    sizes = sizes_of(rounds)
    if sizes.width * sizes.max_requests > MAX_ENTRIES:
        got = f"{sizes.max_requests} requests of {sizes.width} tokens"
        reject(str(path), f"a token table of at most {MAX_ENTRIES} entries", got)
    return rounds


def sizes_of(rounds: Sequence[Round], added_tokens: int = 0) -> Sizes:
    """Sizes that hold a recorded trace, with room for `added_tokens` after the longest request."""
    longest = max(length for entry in rounds for length in entry.seq_lens) + added_tokens
    return Sizes(
        width=-(-longest // Sizes.page_size) * Sizes.page_size,
        max_requests=max(request for entry in rounds for request in entry.requests) + 1,
        captured=tuple(sorted({len(entry.seq_lens) for entry in rounds})),
    )


def save(path: Path, rounds: Sequence[Round]) -> None:
    """Write a trace that `load` reads."""
    fields = {"path": "path", "seq_lens": "seq_lens", "req_pool_indices": "requests", "live": "live", "pages": "pages"}
    lines = [json.dumps({name: getattr(entry, ours) for name, ours in fields.items()}) for entry in rounds]
    path.write_text("".join(line + "\n" for line in lines))


class SlotTable:
    """The token table that an engine keeps while a trace runs: with the pages that were recorded, else handed out.

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
        self._recorded = False
        self._within = torch.arange(sizes.page_size, dtype=torch.int32)
        self.table = torch.zeros(sizes.max_requests, per_request * sizes.page_size, dtype=torch.int32, device=device)

    def advance(self, entry: Round) -> None:
        """Give the requests of a round the pages that they need; take back those of requests that are gone."""
        size = self._sizes.page_size
        if entry.pages:
            for request, (at, numbers) in entry.pages.items():
                slots = torch.tensor(numbers, dtype=torch.int32)[:, None] * size + self._within
                row = self.table[request, at * size :]
                row[: slots.numel()] = slots.flatten()[: row.numel()]
            self._recorded = True
        if self._recorded:
            return
        present = dict(zip(entry.requests[: entry.live], entry.seq_lens, strict=False))
        for request in [request for request in self._held if request not in present]:
            self._free.extend(self._held.pop(request))
        for request, length in present.items():
            held = self._held.setdefault(request, [])
            while len(held) * size < length:
                page = self._free.pop()
                self.table[request, len(held) * size : (len(held) + 1) * size] = page * size + self._within
                held.append(page)
