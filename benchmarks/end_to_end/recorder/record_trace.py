"""Writes down what every replay prepared: a third party's plugin for nsa-plugin, by its observer hook.

With `RECORD_TRACE=FILE` in the environment each replay of the engine appends one JSON line to FILE (the process's
number is added to the name):

    {"path": "draft decode", "seq_lens": […], "req_pool_indices": […], "live": 2, "pages": {"5": [3, [17, 90]]}}

`live` requests are real, the rest pads to the captured size. `pages` has, for each real request whose pages are not
those of the line before, the index of the first that is new and the page numbers from there on. No tokens.
`nsa-plugin demo --trace FILE` and `nsa-plugin bench --trace FILE` read it. It reads the device at each replay: slow.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from nsa_plugin import BatchDescriptor, TokenTable, hookimpl

PAGE_SIZE = 64


@hookimpl
def nsa_plugin_observe_replays(
    engine: str, path: str, strategy: str, batch: BatchDescriptor
) -> Callable[[BatchDescriptor], None] | None:
    """Record the replays of this plan, if a file is named."""
    name = os.environ.get("RECORD_TRACE")
    if not name or not isinstance(batch.slots, TokenTable):
        return None
    file = Path(name).with_suffix(f".{os.getpid()}.jsonl")
    return lambda live: _record(file, path, live)


_known: dict[tuple[str, int], list[int]] = {}


def _record(file: Path, path: str, batch: BatchDescriptor) -> None:
    assert isinstance(batch.slots, TokenTable)
    lengths = batch.seq_lens[: batch.batch_size].tolist()
    requests = batch.slots.req_pool_indices[: batch.batch_size].tolist()
    live = len(requests)
    while live and requests[live - 1] == 0:
        live -= 1
    pages: dict[str, tuple[int, list[int]]] = {}
    for request, length in zip(requests[:live], lengths[:live], strict=True):
        end = length + batch.added_tokens
        now = (batch.slots.req_to_token[request, :end:PAGE_SIZE] // PAGE_SIZE).tolist()
        before = _known.get((path, request), [])
        same = next(
            (at for at, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), min(len(before), len(now))
        )
        if same < len(now):
            pages[str(request)] = (same, now[same:])
        _known[path, request] = now
    line = {"path": path, "seq_lens": lengths, "req_pool_indices": requests, "live": live, "pages": pages}
    with file.open("a") as out:
        out.write(json.dumps(line, separators=(",", ":")) + "\n")
