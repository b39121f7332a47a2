"""Faults, one by one, on the real sglang: its values are right, the log names cause and remedy once, a counter moves.

What fails inside our precompute, at capture or at replay and in each strategy, a recording that fails, other plugins'
hooks, `load_plugins` twice and unknown settings are in `test_install` and `test_conformance`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from triton.compiler.errors import CompilationError

from nsa_plugin import BatchDescriptor, hookimpl
from nsa_plugin.adapters.sglang import preparation, releases, reports
from nsa_plugin.adapters.sglang.adapter import SglangAdapter
from nsa_plugin.core.kernels import metadata
from nsa_plugin.host import Host
from nsa_plugin.rigs.sglang import backends as kit
from tests.sglang.batches import CONFIG, TABLE, TritonPrecompute, batch, capture_batch, replays, wrong
from tests.sglang.conftest import Install
from tests.sglang.test_install import methods
from tests.sglang.test_verification import made


class Fault:
    """Something to go wrong: what to register, and what to patch."""

    def __init__(
        self, plugin: object | None, patch: Callable[[pytest.MonkeyPatch], None], error: str, tried: int, message: str
    ) -> None:
        self.plugin, self.patch, self.error, self.tried, self.message = plugin, patch, error, tried, message


def no_patch(patch: pytest.MonkeyPatch) -> None:
    pass


def does_not_compile(patch: pytest.MonkeyPatch) -> None:
    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            def launch(*arguments: Any, **constants: Any) -> None:
                raise CompilationError("tl.nothing()", None, "no such function")

            return launch

    patch.setattr(metadata, "metadata_kernel", Kernel())


def capture_refused(patch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    patch.setattr(preparation.Preparation, "rehearse", refuse)


class WrongShapes:
    """Describes another batch than it was given."""

    @hookimpl
    def nsa_plugin_describe(self, batch: Any) -> Callable[[Any], BatchDescriptor]:
        from nsa_plugin.adapters.sglang.describe import describe

        backend = kit.make_backend(CONFIG, TABLE)

        def short(live: Any) -> BatchDescriptor:
            found = describe(live, backend=backend, mode=reports.MODES["DECODE"], num_steps=3)
            return dataclasses.replace(found, seq_lens=found.seq_lens[:2])

        return short


class NotCallable:
    """Provides a precompute that is none."""

    @hookimpl
    def nsa_plugin_bind_precompute(self, enabled: Any) -> Any:
        return torch.zeros(3)


FAULTS = {
    "kernel does not compile": Fault(TritonPrecompute(), does_not_compile, "CompilationError", 3, "no such function"),
    "capture refused": Fault(None, capture_refused, "RuntimeError", 1, "not permitted when stream is capturing"),
    "wrong shapes": Fault(WrongShapes(), no_patch, "InvalidValueError", 3, "seq_lens: expected at least 4 entries"),
    "not callable": Fault(NotCallable(), no_patch, "TypeError", 3, "not callable"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_at_capture(
    install: Install, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: Fault
) -> None:
    """Each strategy is tried; then sglang's shipped code is at work, as if there were no plugin."""
    fault.patch(monkeypatch)
    host, _ = install("auto", *([] if fault.plugin is None else [fault.plugin]))
    owner, backends = made("DECODE", num_steps=3)  # sglang's shipped path is right for two draft backends
    fresh = kit.make_backend(CONFIG, TABLE)
    for live in replays("DECODE", CONFIG.width):
        owner.init_forward_metadata_out_graph(kit.replay_view(live))
        assert wrong("DECODE", fresh, live, backends) == []
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == fault.tried
    assert all(fault.message in line and "NSA_PLUGIN_STRATEGY=off switches the plugin off" in line for line in errors)
    assert {(key[2], key[4]) for key in host.fallbacks} == {("capture", fault.error)}
    assert sum(host.fallbacks.values()) == fault.tried


def test_an_observer_that_raises(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    class Observer:
        calls = 0

        @hookimpl
        def nsa_plugin_observe_replays(self) -> Any:
            def observe(live: BatchDescriptor) -> None:
                self.calls += 1
                raise RuntimeError("observer")

            return observe

    observer = Observer()
    host, _ = install("share", observer)
    owner, backends = made("DECODE")
    for live in replays("DECODE", CONFIG.width):
        owner.init_forward_metadata_out_graph(kit.replay_view(live))
        assert wrong("DECODE", kit.make_backend(CONFIG, TABLE), live, backends) == []
    assert observer.calls == 1 and not host.fallbacks
    assert caplog.text.count("an observer of replays failed: it is not called again") == 1


def test_a_field_that_sglang_renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.attention import dsa_backend

    fields = [field.name for field in dataclasses.fields(dsa_backend.DSAMetadata)]
    renamed = ["paged_mqa_schedule" if name == "paged_mqa_schedule_metadata" else name for name in fields]
    monkeypatch.setattr(dsa_backend, "DSAMetadata", dataclasses.make_dataclass("DSAMetadata", renamed))
    before = methods()
    (problem,) = SglangAdapter().install(Host())
    assert "found it without paged_mqa_schedule_metadata; use a release of the engine that has it" in problem
    assert methods() == before


def test_an_engine_that_can_be_imported_by_half(monkeypatch: pytest.MonkeyPatch) -> None:
    before = methods()
    monkeypatch.setitem(sys.modules, releases.DSA.module, None)
    (problem,) = SglangAdapter().install(Host())
    assert "found ModuleNotFoundError" in problem and "install sglang 0.5.11 or later, complete" in problem
    monkeypatch.undo()
    assert methods() == before


@pytest.mark.parametrize("strategy", ["share", "copy"])
@pytest.mark.parametrize("decode_impl", ["fa3", "flashmla_kv"])
@pytest.mark.parametrize("mode", ["DECODE", "TARGET_VERIFY"])
def test_buffers_that_sleep_emptied(install: Install, mode: str, decode_impl: str, strategy: str) -> None:
    """sglang's memory saver gives the buffers' memory back while asleep: on waking they are at the same addresses, zero."""
    config = kit.Config(decode_impl=decode_impl)
    host, _ = install(strategy)
    owner, backends = made(mode, config)
    live = replays(mode, CONFIG.width - CONFIG.draft_tokens)[0]
    owner.init_forward_metadata_out_graph(kit.replay_view(live))
    for backend in backends:
        for value in backend.decode_cuda_graph_metadata.values():
            if isinstance(value, torch.Tensor) and value.dim() == 2:
                value.zero_()
        if decode_impl == "flashmla_kv":
            state = backend.decode_cuda_graph_metadata["flashmla_metadata"]
            state.flashmla_metadata.zero_()
            state.num_splits.zero_()
    owner.init_forward_metadata_out_graph(kit.replay_view(live))
    assert wrong(mode, kit.make_backend(config, TABLE), live, backends) == []
    assert not host.fallbacks


@pytest.mark.parametrize("strategy", ["graph", "share", "copy"])
def test_an_eager_forward_between_replays(install: Install, monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    """A batch larger than any captured one points the backends at metadata of its own; the next replay points them back."""
    host, _ = install(strategy)
    owner, backends = made("DECODE")
    captured = [backend.forward_metadata for backend in backends]
    larger = batch("DECODE", [70, 9, 300, 12, 5, 600, 8], [1, 2, 3, 4, 5, 6, 7])
    for backend in backends:
        kit.engine_metadata(backend, larger, "DECODE")  # sets forward_metadata, as the eager path does
        assert backend.forward_metadata is not captured[0]
    live = replays("DECODE", CONFIG.width)[0]
    owner.init_forward_metadata_out_graph(kit.replay_view(live))
    assert all(backend.forward_metadata is own for backend, own in zip(backends, captured, strict=True))
    assert wrong("DECODE", kit.make_backend(CONFIG, TABLE), live, backends) == []
    assert not host.fallbacks


@pytest.mark.parametrize("strategy", ["share", "copy"])
def test_idle_and_padded_batches_of_data_parallel_ranks(install: Install, strategy: str) -> None:
    """A rank without requests replays with nothing but padding, in whatever mode its batch says."""
    host, _ = install(strategy)
    owner, backends = made("DECODE")
    fresh = kit.make_backend(CONFIG, TABLE)
    for mode, seq_lens, requests in (
        ("IDLE", [1, 1, 1, 1], [0, 0, 0, 0]),
        ("DECODE", [900, 1, 1, 1], [3, 0, 0, 0]),
        ("IDLE", [1, 1, 1, 1], [0, 0, 0, 0]),
    ):
        live = batch("DECODE", seq_lens, requests)
        view = kit.replay_view(live, padding=sum(request == 0 for request in requests))
        view.forward_mode = kit.make_batch(mode, live.seq_lens, live.req_pool_indices).forward_mode
        owner.init_forward_metadata_out_graph(view)
        assert wrong("DECODE", fresh, live, backends) == []
    assert not host.fallbacks


@pytest.mark.parametrize("strategy", ["graph", "share", "copy"])
def test_a_capture_that_is_aborted_in_the_middle(
    install: Install, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """sglang's error reaches sglang; a second attempt captures, and what had been captured before stays right."""
    host, adapter = install(strategy)
    owner, backends = made("DECODE")
    cls = pkgutil.resolve_name(releases.DSA.backend)

    def out_of_memory(self: Any, forward_batch: Any) -> None:
        raise torch.OutOfMemoryError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(cls, "init_forward_metadata_in_graph", out_of_memory)
        static = capture_batch("DECODE", 2)
        owner.init_forward_metadata_out_graph(static, in_capture=True)
        with pytest.raises(torch.OutOfMemoryError, match="planted"):
            owner.init_forward_metadata_in_graph(static)
    for size in (4, 2):
        owner.init_forward_metadata_out_graph(capture_batch("DECODE", size), in_capture=True)
        owner.init_forward_metadata_in_graph(capture_batch("DECODE", size))
    fresh = kit.make_backend(CONFIG, TABLE)
    for live in (replays("DECODE", CONFIG.width)[0], batch("DECODE", [70, 500], [3, 1])):
        owner.init_forward_metadata_out_graph(kit.replay_view(live))
        assert wrong("DECODE", fresh, live, backends) == []
    assert not host.fallbacks
    adapter.undo()
    held = [backend.decode_cuda_graph_metadata[2] for backend in backends]
    assert len({id(metadata) for metadata in held}) == len(backends)


PROCESSES = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
import torch

torch.set_num_threads(1)
from nsa_plugin.rigs.sglang import backends as kit

def work() -> None:
    from sglang.srt.plugins import load_plugins
    load_plugins()
    from nsa_plugin import entry
    assert list(entry._hosts) == ["sglang"]
    config = kit.Config(width=256)
    table = kit.req_to_token(config, torch.device("cpu"))
    with kit.stand_ins():
        multi = kit.make_multi_step(config, table, 4)
        make = lambda lengths: kit.make_batch("DECODE", torch.tensor(lengths), torch.tensor([1, 2]), 2)
        multi.init_forward_metadata_out_graph(make([1, 1]), in_capture=True)
        live = make([70, 200])
        multi.init_forward_metadata_out_graph(kit.replay_view(live))
        expected = kit.engine_metadata(kit.make_backend(config, table), live, "DECODE")
        from nsa_plugin import ForwardMode
        for backend in multi.attn_backends:
            assert kit.differences(expected, backend.forward_metadata, backend, live, ForwardMode.DECODE) == []
        assert not entry._hosts["sglang"].fallbacks

if __name__ == "__main__":
    import multiprocessing
    method, count = sys.argv[1], int(sys.argv[2])
    if method == "fork":
        work()
    context = multiprocessing.get_context(method)
    workers = [context.Process(target=work) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print([worker.exitcode for worker in workers])
"""


@pytest.mark.skipif(
    not any(point.name == "nsa_plugin" for point in entry_points(group="sglang.srt.plugins")),
    reason="nsa-plugin is not installed in this environment",
)
@pytest.mark.parametrize(("method", "count"), [("fork", 8), ("spawn", 2)])
def test_worker_processes(tmp_path: Any, pytestconfig: pytest.Config, method: str, count: int) -> None:
    """Each loads the plugin by itself, or inherits it, and prepares the right values."""
    script = tmp_path / "workers.py"
    script.write_text(PROCESSES)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NSA_PLUGIN_")}
    path = os.pathsep.join([str(pytestconfig.rootpath), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script), method, str(count)],
        env={**clean, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip().splitlines()[-1] == str([0] * count), done.stderr[-3000:]
