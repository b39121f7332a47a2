"""vLLM's sleep mode, and buffers that its runner makes anew: what captured graphs of ours may rely on."""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.device_allocator import AllocationData, sleep_mode_backend
from vllm.v1.worker.gpu_worker import Worker

from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.adapters.vllm.v2 import step as v2_step
from nsa_plugin.host import Host
from nsa_plugin.rigs.vllm.v2_draft import CAPTURED, CPU, Draft, block_tables
from nsa_plugin.rigs.vllm.v2_target import TargetRunner, hopper
from tests.vllm.drafts import FIRST_IS_REBUILT, LAYOUT, TOKENS, Step, proposals, unequal
from tests.vllm.targets import FLAT, refreshed, shipped
from tests.vllm.targets import unequal as unequal_target

Install = Callable[..., tuple[Host, VllmAdapter]]
pytestmark = pytest.mark.skipif(FIRST_IS_REBUILT, reason="what is emulated is the sleep mode of vLLM 0.32 and later")


class Memory:
    """vLLM's own sleep mode over tensors on a CPU: memory that is given back holds garbage until it is mapped again."""

    def __init__(self, patch: pytest.MonkeyPatch, tensors: dict[str, list[torch.Tensor]]) -> None:
        patch.setitem(sys.modules, "vllm.cumem_allocator", None)  # needs a driver
        cumem = importlib.import_module("vllm.device_allocator.cumem")
        patch.setattr(cumem, "libcudart", SimpleNamespace(cudaMemcpy=ctypes.memmove))
        patch.setattr(cumem, "unmap_and_release", self._give_back)
        self.mapped: list[tuple[int, ...]] = []
        patch.setattr(cumem, "create_and_map", self.mapped.append)
        self.given_back: list[tuple[int, ...]] = []
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)
        allocator = cumem.CuMemAllocator()
        for tag, held in tensors.items():
            for tensor in held:
                size, address = tensor.untyped_storage().nbytes(), tensor.untyped_storage().data_ptr()
                allocator.pointer_to_data[address] = AllocationData((0, size, address, 0), tag)
        patch.setattr("vllm.device_allocator.get_mem_allocator_instance", lambda: allocator)
        self.backend = sleep_mode_backend.CuMemBackend()

    def _give_back(self, handle: tuple[int, ...]) -> None:
        _, size, address, _ = handle
        ctypes.memset(address, 0x5A, size)
        self.given_back.append(handle)


class Recorded:
    """`v2_step.Step`, of which the first is run for ever, as by a CUDA graph: with the addresses that it was bound to."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.step: v2_step.Step | None = None
        self._bind = v2_step.Step
        patch.setattr(v2_step, "Step", self)

    def __call__(self, *arguments: Any) -> v2_step.Step:
        _, _, num_reqs, _ = arguments
        if num_reqs > CAPTURED:
            return self._bind(*arguments)
        if self.step is None:
            self.step = self._bind(*arguments)
        self.step._first = True
        return self.step


def tensors_of(*holders: Any) -> list[torch.Tensor]:
    """Every tensor that objects, or lists in them, hold."""
    values = [value for holder in holders for value in vars(holder).values()]
    values += [
        vars(item).get("gpu") for value in values if isinstance(value, list) for item in value if hasattr(item, "gpu")
    ]
    return [value for value in values if isinstance(value, torch.Tensor) and value.numel()]


@pytest.mark.parametrize("level", [1, 2])
def test_sleeping_and_waking(
    install: Install, monkeypatch: pytest.MonkeyPatch, expected: list[Step], level: int
) -> None:
    """What the runner made with its KV cache is at the same addresses, with the same contents: graphs go on."""
    host, _ = install()
    recorded = Recorded(monkeypatch)
    draft = Draft(*LAYOUT, TOKENS)
    cache = torch.ones(64)
    assert unequal(expected, proposals(draft)) == []
    memory = Memory(monkeypatch, {"runtime": tensors_of(draft.tables, *draft.builders), "kv_cache": [cache]})
    before = draft.tables.slot_mappings.clone()
    memory.backend.suspend(level)
    assert not torch.equal(draft.tables.slot_mappings, before)
    memory.backend.resume()
    assert memory.mapped == memory.given_back, "vLLM maps other addresses"
    assert torch.equal(draft.tables.slot_mappings, before) and not (cache == 1).any()
    assert unequal(expected, proposals(draft)) == [] and recorded.step is not None
    assert not host.fallbacks


@pytest.mark.parametrize("level", [1, 2])
def test_a_refreshed_target_sleeps_and_wakes(install: Install, monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    """The buffers that the target's graph reads and writes are at the same addresses: it goes on, without a build."""
    with hopper():
        theirs = TargetRunner(FLAT)
        want = [shipped(theirs, seed, 3) for seed in range(2)]
        host, _ = install("graph")
        ours = TargetRunner(FLAT)
        assert unequal_target(want[0], *refreshed(ours, 0, 3)[1:]) == []
        held = {tensor.data_ptr(): tensor for tensor in tensors_of(ours.tables, *ours.builders)}
        memory = Memory(monkeypatch, {"runtime": list(held.values())})
        before = ours.builders[0].req_id_per_token_buffer.clone()
        memory.backend.suspend(level)
        assert not torch.equal(ours.builders[0].req_id_per_token_buffer, before)
        memory.backend.resume()
        assert memory.mapped == memory.given_back
        metadata, *seen = refreshed(ours, 1, 3)
        assert not metadata.built and unequal_target(want[1], *seen) == [] and not host.fallbacks


def test_what_a_runner_makes_with_its_cache_keeps_its_contents_while_asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's worker makes block tables and metadata builders in the pool "runtime", which sleep mode offloads."""
    pools: list[str] = []
    seen: list[list[str]] = []

    @contextmanager
    def pool(tag: str) -> Iterator[None]:
        pools.append(tag)
        yield
        pools.remove(tag)

    worker = SimpleNamespace(
        cache_config=SimpleNamespace(), vllm_config=SimpleNamespace(kv_transfer_config=None),
        _maybe_get_memory_pool_context=pool,
        model_runner=SimpleNamespace(initialize_kv_cache=lambda *_, **__: seen.append(list(pools))),
    )  # fmt: skip
    config = SimpleNamespace(
        num_blocks=1,
        kv_cache_layout=None,
        hash_block_size=64,
        cache_hit_alignment_tokens=64,
        needs_kv_cache_zeroing=False,
    )
    Worker.initialize_from_config(worker, config)
    assert seen == [["runtime"]]


def test_buffers_that_the_runner_makes_anew_take_a_new_capture(
    install: Install, monkeypatch: pytest.MonkeyPatch, expected: list[Step]
) -> None:
    """As when vLLM has measured its graphs with a small cache: it captures anew, and nothing of ours is older than that."""
    host, _ = install()
    draft = Draft(*LAYOUT, TOKENS)
    with monkeypatch.context() as patch:
        Recorded(patch)
        proposals(draft)
        made_anew(draft)
        assert "slots" in unequal(expected, proposals(draft)), "a graph that is older than the buffers writes elsewhere"
    made_anew(draft)
    assert unequal(expected, proposals(draft)) == [] and not host.fallbacks


def made_anew(draft: Draft) -> None:
    """As vLLM's runner does in `initialize_kv_cache`, and then captures."""
    sizes = draft.sizes
    draft.tables = block_tables(64, sizes.requests, sizes.tokens, sizes.model_len // 64, CPU)
    with set_current_vllm_config(draft.config):
        draft.speculator.set_attn(None, draft.cache, draft.tables, draft.buffers, draft.groups)
        draft.speculator.decode_cudagraph_manager = draft.graphs = type(draft.graphs)(draft)
