"""Runs when vLLM imports its model runner: the hooks around the capture, the preparation and the replay of the target.

- `CudaGraphManager.capture`: the refresh goes before the forward of each uniform decode graph, and so into the graph.
- `DefaultModelState.prepare_attn`: where a refreshed graph may follow, the metadata are built when somebody asks for them.
- `ModelCudaGraphManager.run_fullgraph`: the gate, which knows the exact graph.

Ranks may differ in what they refresh: no collective depends on it, and a refreshed graph reads what a rebuild writes.
"""

from __future__ import annotations

import functools
import pkgutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from nsa_plugin.adapters.attached import Attached
from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.probe import Need
from nsa_plugin.adapters.vllm.reports import report
from nsa_plugin.adapters.vllm.v2.step import Uncovered
from nsa_plugin.adapters.vllm.v2.target import refusals
from nsa_plugin.adapters.vllm.v2.target.planes import Frozen
from nsa_plugin.adapters.vllm.v2.target.refresh import STRATEGY, Refresh
from nsa_plugin.adapters.vllm.v2.target.replays import LateBatch, Replays

PATH, FIRST_PASS = "target verify", "draft extend"
"""The tokens that the target verifies, and the draft's first pass, which reads the same buffers."""
READS = "it reads what the target's graph has refreshed, and has no work of its own"
MANAGERS = "vllm.v1.worker.gpu.cudagraph_utils"
OWNERS = {
    "capture": f"{MANAGERS}.CudaGraphManager",
    "prepare_attn": "vllm.v1.worker.gpu.model_states.default.DefaultModelState",
    "run_fullgraph": f"{MANAGERS}.ModelCudaGraphManager",
}
"""By the method that is replaced, its class."""
NEEDS: Mapping[str, tuple[Need, ...]] = {
    "capture": (
        Need(f"{OWNERS['capture']}.capture", ("create_forward_fn",), "put the refresh before the target's forward",
             hooked=True, known=("progress_bar_desc",)),
        Need(f"{MANAGERS}.BatchExecutionDescriptor", ("cg_mode", "num_tokens", "num_reqs", "uniform_token_count"),
             "know the graph of a batch"),
    ),
    "prepare_attn": (
        Need(f"{OWNERS['prepare_attn']}.prepare_attn",
             ("input_batch", "cudagraph_mode", "block_tables", "slot_mappings", "attn_groups", "kv_cache_config", "for_capture"),
             "leave out a build that a refreshed graph does without", hooked=True,
             known=("ubatch_idx", "model_specific_attn_metadata")),
    ),
    "run_fullgraph": (
        Need(f"{OWNERS['run_fullgraph']}.run_fullgraph", ("desc",), "build before a graph that is not refreshed", hooked=True),
    ),
}  # fmt: skip
"""By hooked method; it takes all of them."""


def needs() -> tuple[Need, ...]:
    """All of them."""
    return tuple(need for own in NEEDS.values() for need in own)


@dataclass(frozen=True)
class Noted:
    """What `prepare_attn` was given, and has made, while a batch is captured."""

    state: Any
    batch: Any
    frozen: Frozen


class Target:
    """The targets of a process."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._hooked: dict[str, Callable[[], bool]] = {}
        self._report, self._first_pass = report(host, PATH), report(host, FIRST_PASS)
        self._replays: Attached[Replays] = Attached("target_replays")
        self._managers: Attached[weakref.ref[Any]] = Attached("target_manager")
        self._noting, self._failed, self._captured_off = False, False, False
        self._noted: Noted | None = None

    def hooks(self, host: Host, owner: type, live: Callable[[], bool]) -> Mapping[str, Callable[..., Any]]:
        """The replacement of a method of `owner`, one of `OWNERS`, by name. It acts where all of them are there, and `live`."""
        name = next(name for name, path in OWNERS.items() if pkgutil.resolve_name(path) is owner)
        original = getattr(owner, name)
        self._hooked[name] = live
        return MappingProxyType({name: functools.wraps(original)(getattr(self, f"_{name}")(original))})

    def _live(self) -> bool:
        return self._hooked.keys() == OWNERS.keys() and all(live() for live in self._hooked.values())

    def undo(self) -> None:
        """Leave captured graphs to vLLM's own builds. To be called before the hooks go."""
        for replays in self._replays.values():
            replays.switch_off()

    def lines(self, on: bool) -> list[str]:
        """What goes on as before although the host was switched."""
        return [f"{PATH} was captured while switched off: it takes a restart"] if on and self._captured_off else []

    def _capture(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def capture(manager: Any, create_forward_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not self._live() or not isinstance(manager, pkgutil.resolve_name(OWNERS["run_fullgraph"])):
                return original(manager, create_forward_fn, *args, **kwargs)
            replays = self._replays.set(manager, Replays(self._report))

            def create(desc: Any, *more: Any, **named: Any) -> Callable[..., Any]:
                self._noted, self._noting = None, True
                try:
                    forward: Callable[..., Any] = create_forward_fn(desc, *more, **named)
                finally:
                    self._noting = False
                refresh = self._refresh(manager, replays, desc)
                return forward if refresh is None else self._refreshed(replays, desc, refresh, forward)

            return original(manager, create, *args, **kwargs)

        return capture

    def _refresh(self, manager: Any, replays: Replays, desc: Any) -> Refresh | None:
        """What refreshes the batch that was noted; None where vLLM goes on as ever."""
        replays.refreshes.pop(desc, None)
        noted, self._noted = self._noted, None
        if noted is not None:  # refreshed or not: an earlier manager's graphs are not asked any more
            self._managers.set(noted.state, weakref.ref(manager))
        if noted is None or self._failed or desc.cg_mode.name != "FULL" or not desc.uniform_token_count:
            return None
        if not self._host.on:
            self._captured_off = True
            return None
        try:
            if problem := refusals.unverified(self._host) or refusals.uncovered(manager.vllm_config, noted.state):
                raise Uncovered(problem)
            refresh = Refresh(self._host, self._report, noted.batch, noted.frozen)
        except Uncovered as reason:
            for path in (self._report, self._first_pass):
                path.left_alone(str(reason))
            return None
        except Exception as error:
            self._fail(replays, error)
            return None
        self._captured_off = False
        replays.groups = noted.frozen.groups
        replays.refreshes[desc] = refresh
        return refresh

    def _refreshed(
        self, replays: Replays, desc: Any, refresh: Refresh, forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        """`forward`, after the refresh: run when vLLM warms up, recorded when it captures."""

        def refreshed_forward(*args: Any, **kwargs: Any) -> Any:
            if not refresh.failed:
                try:
                    refresh.run()
                except Exception as error:
                    refresh.failed = True
                    self._fail(replays, error)
                else:
                    replays.record(desc, refresh)
                    for path in (self._report, self._first_pass):
                        path.using(STRATEGY)
            return forward(*args, **kwargs)

        return refreshed_forward

    def _fail(self, replays: Replays, error: Exception) -> None:
        self._failed = True
        self._report.fell_back("capture" if replays.under_way is None else "replay", STRATEGY, error)
        replays.fail()

    def _prepare_attn(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def prepare_attn(
            state: Any, input_batch: Any, cudagraph_mode: Any, block_tables: Any, slot_mappings: Any, attn_groups: Any,
            *args: Any, **kwargs: Any,
        ) -> Any:  # fmt: skip
            def build() -> Any:
                return original(
                    state, input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, *args, **kwargs
                )

            if not self._live() or not _plain(args, kwargs):
                return build()
            if self._noting:
                metadata = build()
                requests, tokens = input_batch.num_reqs_after_padding, input_batch.num_tokens_after_padding
                frozen = Frozen(attn_groups, metadata, block_tables, requests, tokens, input_batch.seq_lens)
                self._noted = Noted(state, input_batch, frozen)
                return metadata
            manager = self._managers.get(state)
            replays = None if manager is None else self._replays.get(manager())
            if replays is None or cudagraph_mode.name != "FULL":
                return build()
            if not self._host.on or not replays.may_serve(input_batch, attn_groups):
                return replays.natively(input_batch, build)
            replays.late = LateBatch(build, input_batch, block_tables)
            return replays.late

        return prepare_attn

    def _run_fullgraph(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def run_fullgraph(manager: Any, desc: Any, *args: Any, **kwargs: Any) -> Any:
            replays = self._replays.get(manager)
            if replays is None:
                return original(manager, desc, *args, **kwargs)
            return replays.replay(desc, lambda: original(manager, desc, *args, **kwargs))

        return run_fullgraph


def _plain(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a build has nothing special: no microbatch, no metadata of the model's own, nothing that is not known."""
    known = ("kv_cache_config", "for_capture")
    special = [*args[len(known) :], *(value for name, value in kwargs.items() if name not in known)]
    return all(value is None or value is False or (isinstance(value, int) and value == 0) for value in special)
