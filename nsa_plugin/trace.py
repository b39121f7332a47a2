"""Traces of speculative rounds: generated, or recorded from a running engine.

A generated trace gets KV slots as a paged allocator would hand them out. `benchmarks/end_to_end/recorder` records traces.
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
"""Largest values of a recorded line (tokens, request rows, page numbers); a line with larger ones is damaged."""
MAX_ENTRIES = 1 << 30
"""Largest token table of a recorded trace, in entries; a trace that needs a larger one is damaged."""


@dataclass(frozen=True)
class Round:
    """One replay: real requests first, then padding to a captured batch size.

    Attributes
    ----------
    seq_lens : tuple of int
        Tokens in the KV cache of each request, 1 for padding.
    requests : tuple of int
        Pooled request (row of the token table) of each request, 0 for padding.
    live : int
        Number of real requests.
    path : str
        Path that prepared the round: "draft decode", "target verify" or "draft extend".
    pages : mapping of request to (index of its first changed page, page numbers from there on)
        Recorded pages. Empty in a generated trace, whose pages `SlotTable` hands out.
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
    width : int
        Largest number of tokens of a request.
    max_requests : int
        Rows of the token table; row 0 is for padding.
    captured : tuple of int
        Batch sizes that have a CUDA graph.
    page_size : int
        Tokens per KV page.
    """

    width: int = 8192
    max_requests: int = 13
    captured: tuple[int, ...] = (1, 2, 4, 8, 12)
    page_size: int = 64


def generate(rounds: int, accept: int, sizes: Sizes, seed: int = 0) -> Iterator[Round]:
    """Generate rounds: requests join with a prompt, accept 1 to `accept` tokens per round, and leave.

    Some rounds have no real request.
    """
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


def load(file: Path, path: str = "draft decode") -> list[Round]:
    """Read the rounds of one path from a recorded trace.

    Parameters
    ----------
    file : Path
        JSON lines with `seq_lens`, `req_pool_indices` and `live`; `path` and `pages` are optional.
    path : str
        Rounds of other paths are left out.

    Raises
    ------
    InvalidValueError
        A line has another form (the error names it), no line has that path, or the trace needs too large a token table.
    """
    rounds = []
    try:
        lines = file.read_text().splitlines()
    except UnicodeDecodeError:
        reject(str(file), "a recorded trace, which is JSON lines", "a file that is no text")
    for number, line in enumerate(lines, 1):
        where = f"{file}, line {number}"
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
        if found.path == path:
            rounds.append(found)
    if not rounds:
        reject(str(file), f"rounds of {path}", "none")
    sizes = sizes_of(rounds)
    if sizes.width * sizes.max_requests > MAX_ENTRIES:
        got = f"{sizes.max_requests} requests of {sizes.width} tokens"
        reject(str(file), f"a token table of at most {MAX_ENTRIES} entries", got)
    return rounds


def sizes_of(rounds: Sequence[Round], added_tokens: int = 0) -> Sizes:
    """The smallest sizes that hold a recorded trace, with room for `added_tokens` after the longest request."""
    longest = max(length for entry in rounds for length in entry.seq_lens) + added_tokens
    return Sizes(
        width=-(-longest // Sizes.page_size) * Sizes.page_size,
        max_requests=max(request for entry in rounds for request in entry.requests) + 1,
        captured=tuple(sorted({len(entry.seq_lens) for entry in rounds})),
    )


def save(file: Path, rounds: Sequence[Round]) -> None:
    """Write rounds as a trace that `load` reads."""
    fields = {"path": "path", "seq_lens": "seq_lens", "req_pool_indices": "requests", "live": "live", "pages": "pages"}
    lines = [json.dumps({name: getattr(entry, ours) for name, ours in fields.items()}) for entry in rounds]
    file.write_text("".join(line + "\n" for line in lines))


class SlotTable:
    """The token table of an engine while a trace runs, with recorded pages or with pages of its own allocator.

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
        """Give the requests of a round the pages that they need; take back the pages of requests that left."""
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
