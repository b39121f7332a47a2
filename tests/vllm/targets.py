"""Targets of Model Runner V2 as the tests compare them: vLLM's own rebuild, a refreshed graph, and what spoils it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nsa_plugin.adapters.vllm.v2.target.replays import Replays
from nsa_plugin.core import api
from nsa_plugin.core.batch import BatchDescriptor
from nsa_plugin.core.group_rows import GroupMetadata
from nsa_plugin.hookspec import hookimpl
from nsa_plugin.rigs.vllm.v2_target import Seen, Shape, TargetRunner

POISON = 1 << 20
NATIVE, FLAT = Shape("bf16", 3, draft_heads=8), Shape("fp8 separate", 2)


def replays(runner: TargetRunner) -> Replays:
    found: Replays = vars(runner.manager)["_nsa_plugin_target_replays"]
    return found


def shipped(runner: TargetRunner, seed: int, requests: int, pad_to: int = 0) -> tuple[Seen, ...]:
    """What vLLM's own build makes the target and the first pass read, from buffers poisoned in two ways."""
    seen: list[Seen] = []
    with runner.inference():
        for poison in (POISON, 2 * POISON):
            batch = runner.batch(seed, requests, pad_to)
            runner.poison(poison)
            runner.prepare(batch)
            seen += runner.replay(batch)
    return tuple(seen)


def refreshed(runner: TargetRunner, seed: int, requests: int, pad_to: int = 0) -> tuple[Any, Seen, Seen]:
    """The metadata that a refreshed graph did without, and what was read."""
    with runner.inference():
        batch = runner.batch(seed, requests, pad_to)
        runner.poison(POISON)
        metadata = runner.prepare(batch)
        return metadata, *runner.replay(batch)


def unequal(want: tuple[Seen, ...], target: Seen, first_pass: Seen) -> list[str]:
    """What differs where a build defines it, whatever was there before."""
    wrong = []
    for expected, again, got in ((want[0], want[2], target), (want[1], want[3], first_pass)):
        assert expected.keys() == got.keys()
        for name, value in expected.items():
            there = value == again[name]
            if not torch.equal(value[there], got[name][there]):
                wrong.append(name)
    return wrong


class Mutated:
    """Provides the refresh of `api`, and spoils what it has written."""

    def __init__(self, spoil: Callable[[GroupMetadata, BatchDescriptor], None]) -> None:
        self._spoil = spoil

    @hookimpl
    def nsa_plugin_bind_precompute(self, batch: Any, out: Any, enabled: Any) -> Any:
        if not isinstance(out, GroupMetadata):
            return None
        right = api.bind_precompute(batch, out, enabled=enabled)

        def run(live: BatchDescriptor) -> None:
            right(live)
            if enabled is None or enabled:
                self._spoil(out, live)

        return run


def each(name: str, change: Callable[[torch.Tensor, BatchDescriptor], object], last: bool = False) -> Any:
    def spoil(out: GroupMetadata, live: BatchDescriptor) -> None:
        planes = [plane for group in out.groups for key, (plane, _) in
                  {**group.vectors(live), **group.tables(live)}.items() if key.startswith(name)]  # fmt: skip
        for plane in planes[-1:] if last else planes:
            change(plane, live)

    return spoil
