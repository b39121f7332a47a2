"""One kernel per step of the fused draft: equal to a rebuild at every step, counted, undone, and right when it fails.

DeepGEMM and its branch of the indexer's builder, which need a GPU, are emulated: the schedule is a plain function of the
lengths, so that a stale or missing one shows. All else is vLLM's.
"""

from __future__ import annotations

import functools
import logging
import pkgutil
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from vllm.v1.attention.backends.mla import flashmla_sparse, indexer

from nsa_plugin import host as host_module
from nsa_plugin.adapters.vllm import releases
from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.adapters.vllm.builders import INDEXER, INDEXER_DECODE, changes_of
from nsa_plugin.adapters.vllm.v2 import step as v2_step
from nsa_plugin.adapters.vllm.v2 import unfused as v2_unfused
from nsa_plugin.adapters.vllm.v2.updates import METHOD
from nsa_plugin.core import step_update
from nsa_plugin.host import Host
from nsa_plugin.rigs.vllm.drafts import BATCHES, LAYOUTS
from nsa_plugin.rigs.vllm.v2_draft import Draft
from nsa_plugin.settings import Settings
from tests.vllm.drafts import FIRST_IS_REBUILT, POISONED, SOME, unequal_steps

Install = Callable[..., tuple[Host, VllmAdapter]]
Owner = pkgutil.resolve_name(releases.speculator())
POISON = 3
NUM_SMS = 8


class CudaLike:
    """The platform as it is, but for saying that it is a Hopper GPU."""

    def __init__(self, platform: Any) -> None:
        self._platform = platform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    def is_cuda(self) -> bool:
        """Yes."""
        return True

    def is_device_capability_family(self, family: int) -> bool:
        """Whether it is that one."""
        return family == 90


def schedule(context_lens: torch.Tensor, block_size: int, num_sms: int, indices: Any = None) -> torch.Tensor:
    """Stand-in for DeepGEMM's schedule: int32 [slots + 1, 2], a function of every length and of the order of rows."""
    blocks = (context_lens.flatten().clamp(min=0) + block_size - 1) // block_size
    weights = torch.arange(1, blocks.numel() + 1)
    if indices is not None:
        weights = weights + indices
    slot = torch.arange(NUM_SMS + 1)
    return torch.stack([slot * blocks.sum(), (slot * (blocks * weights).sum()) % 97], 1).to(torch.int32)


@pytest.fixture
def deep_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the builders' CUDA branches, with the stand-in for the schedule.

    Those of Hopper: the kernel that builds metadata for Blackwell can't be interpreted.
    """
    platform = CudaLike(indexer.current_platform)
    monkeypatch.setattr(indexer, "current_platform", platform)
    monkeypatch.setattr(flashmla_sparse, "current_platform", platform)
    monkeypatch.setattr(indexer, "has_deep_gemm", lambda: True)
    monkeypatch.setattr(indexer, "get_paged_mqa_logits_metadata", schedule)
    monkeypatch.setattr(indexer, "num_compute_units", lambda *_: NUM_SMS)
    monkeypatch.setattr(indexer, "native_next_n_supported", lambda n: n in (1, 2, 4))


def drafts(layout: str, tokens: int, poison: bool = False) -> list[dict[str, torch.Tensor]]:
    """What each draft step of each batch saw; with poisoned buffers the one captured graph has to make all of it right."""
    draft = Draft(*LAYOUTS[layout], tokens)
    seen = []
    for lengths, rejected, first_block in BATCHES:
        for builder in draft.builders if poison else ():
            for name in POISONED:
                if hasattr(builder, name):
                    getattr(builder, name).fill_(POISON)
        if poison:
            draft.tables.slot_mappings.fill_(POISON)
        seen += draft.propose(lengths, [min(count, tokens) for count in rejected], first_block)
    return seen


@pytest.mark.usefixtures("deep_gemm")
@pytest.mark.parametrize("impl", ["kernel", "reference"])
@pytest.mark.parametrize(("layout", "tokens"), SOME)
def test_every_step_equals_a_full_rebuild(
    install: Install, monkeypatch: pytest.MonkeyPatch, layout: str, tokens: int, impl: str
) -> None:
    expected = drafts(layout, tokens)
    assert len(expected) == len(BATCHES) * (tokens - 1)
    host, _ = install()
    if impl == "reference":
        monkeypatch.setattr(host_module, "best_impl", lambda device: "reference")
    updates: list[None] = []
    in_graph = len(BATCHES) * (tokens - 1 - FIRST_IS_REBUILT)
    run = v2_step.Step.run
    monkeypatch.setattr(v2_step.Step, "run", lambda step: updates.append(run(step)))
    got = drafts(layout, tokens, poison=True)
    assert unequal_steps(expected, got) == set()
    assert len(updates) == in_graph and not host.fallbacks
    monkeypatch.setattr(releases, "uncovered_speculator", lambda speculator: "vLLM's own updates in place")
    in_place = drafts(layout, tokens, poison=True)
    assert len(updates) == in_graph, "the plugin's step was used"
    assert unequal_steps(in_place, got, rebuilt=False) == set()


@pytest.mark.usefixtures("deep_gemm")
def test_the_comparison_can_fail(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = drafts("fp8 mixed", 4)
    assert {"schedule", "query tokens", "request map"} <= expected[0].keys()
    install()
    monkeypatch.setattr(v2_step.Step, "run", lambda step: None)
    wrong = unequal_steps(expected, drafts("fp8 mixed", 4, poison=True))
    same_in_all_steps = set() if FIRST_IS_REBUILT else {"request map", "indexer blocks", "query tokens"}
    assert {"slots", "indexer lengths", "schedule"} | same_in_all_steps <= wrong


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is launched: torch operations that are not views, Triton kernels, DeepGEMM's schedule."""

    VIEWS = frozenset(
        [
            "slice.Tensor",
            "view.default",
            "unsqueeze.default",
            "select.int",
            "alias.default",
            "detach.default",
            "expand.default",
            "_unsafe_view.default",
            "as_strided.default",
            "permute.default",
            "t.default",
            "transpose.int",
            "squeeze.dim",
        ]
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()
        self.inside = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).removeprefix("aten.")
        if not self.inside and name not in self.VIEWS:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))

    def counted(self, function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        """`function`, of whose calls each counts as one, whatever it does inside."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.inside:
                self.found[name(*args)] += 1
            self.inside += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.inside -= 1

        return call


def count(layout: str, tokens: int) -> list[Counter[str]]:
    """What each draft step launches for its metadata, before its model runs: no sampling, no advancing of positions."""
    operations = Operations()
    steps: list[Counter[str]] = []
    draft = Draft(*LAYOUTS[layout], tokens)
    speculator = draft.speculator
    model_ran = False

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal model_ran
            if not drafting or operations.inside:
                return function(*args, **kwargs)
            if model_ran:
                steps.append(Counter())
                model_ran = False
            operations.found.clear()
            with operations:
                result = function(*args, **kwargs)
            steps[-1] += operations.found
            return result

        return call

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal model_ran
        model_ran = True
        return run_model(*args, **kwargs)

    def begun(num_reqs: int) -> None:
        drafting.append(num_reqs)
        begin(num_reqs)

    drafting: list[int] = []
    run_model = speculator._run_model
    kernel, begin = interpreter.GridExecutor.__call__, speculator.on_multi_step_decode_begin
    with pytest.MonkeyPatch.context() as patch:
        name = operations.counted(kernel, lambda self, *_: f"triton {self.fn.__name__}")
        patch.setattr(interpreter.GridExecutor, "__call__", name)
        dg = operations.counted(schedule, lambda *_: "DeepGEMM schedule")
        patch.setattr(indexer, "get_paged_mqa_logits_metadata", dg)
        patch.setattr(speculator, "_run_model", forward)
        patch.setattr(speculator, "on_multi_step_decode_begin", begun)
        patch.setattr(draft.tables, "compute_slot_mappings", watched(draft.tables.compute_slot_mappings))
        for method in ("_build_uniform_attn_metadata", "_build_draft_attn_metadata", v2_step.UPDATE_STEP):
            if hasattr(speculator, method):
                patch.setattr(speculator, method, watched(getattr(speculator, method)))
        patch.setattr(v2_unfused.KeptStep, "run", watched(v2_unfused.KeptStep.run))
        if FIRST_IS_REBUILT:
            patch.setattr(v2_step.Step, "run", watched(v2_step.Step.run))
            for group in (group for groups in speculator.attn_groups for group in groups):
                patch.setattr(group, METHOD, watched(getattr(group, METHOD)))
        draft.propose([100, 107, 126, 65], [1, 0, 2, 2], 1)
    assert len(steps) == tokens - 1
    return steps


@pytest.mark.usefixtures("deep_gemm")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_launches_per_draft_step(
    install: Install, monkeypatch: pytest.MonkeyPatch, layout: str, capfd: pytest.CaptureFixture[str]
) -> None:
    stock = count(layout, 4)
    _, adapter = install("copy")
    kept = count(layout, 4)
    adapter.undo()
    install()
    with monkeypatch.context() as patch:
        patch.setattr(releases, "uncovered_speculator", lambda speculator: "counted without")
        in_place = count(layout, 4)
    ours = count(layout, 4)
    with capfd.disabled():
        for way, steps in (("stock", stock), ("kept", kept), ("in place", in_place), ("one kernel", ours)):
            print(f"\n{layout}, {way}: {[step.total() for step in steps]} launches a step, the last {dict(steps[-1])}")
    assert all(step.total() > 25 for step in stock)
    assert kept.pop(0) == stock[0]
    assert all(step.total() == 3 for step in kept)  # the kernel, DeepGEMM's schedule, its copy to where graphs read it
    if FIRST_IS_REBUILT:
        assert in_place.pop(0) == ours.pop(0) == stock[0]
    assert all(step.total() == 8 for step in in_place)
    assert all(step == {"triton step_update_kernel": 1, "DeepGEMM schedule": 1} for step in ours)


def test_undo_restores_the_speculator_by_identity(install: Install) -> None:
    before = dict(vars(Owner))
    host, adapter = install()
    assert vars(Owner)[v2_step.GENERATE] is not before[v2_step.GENERATE]
    assert (v2_step.UPDATE_STEP in vars(Owner)) != FIRST_IS_REBUILT
    patched = dict(vars(Owner))
    assert adapter.install(host) == [] and dict(vars(Owner)) == patched
    adapter.undo()
    after = dict(vars(Owner))
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)


@pytest.mark.usefixtures("deep_gemm")
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_in_any_step_leaves_vllms_results_right(
    install: Install, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: int
) -> None:
    expected = drafts("fp8 separate", 4)
    host, _ = install()
    logging.getLogger("vllm").propagate = True
    runs = iter(range(100))
    run = step_update.StepUpdate.run

    def planted(update: Any, *, first: bool) -> None:
        if next(runs) % 3 == failing:
            raise RuntimeError("planted")
        run(update, first=first)

    monkeypatch.setattr(step_update.StepUpdate, "run", planted)
    got = drafts("fp8 separate", 4, poison=True)
    assert unequal_steps(expected, got) == set()
    assert [(cause[1], cause[4], times > 0) for cause, times in host.fallbacks.items()] == [
        (v2_step.PATH, "RuntimeError", True)
    ]
    errors = {id(record): record.getMessage() for record in caplog.records if record.levelname == "ERROR"}
    assert len(errors) == 1 and all("planted" in line for line in errors.values())


def test_an_error_when_it_is_bound_leaves_the_in_place_updates(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(indexer, "has_deep_gemm", lambda: False)
        draft = Draft(*LAYOUTS["bf16"], 3)
        expected = draft.propose(*BATCHES[1])
    host, _ = install()

    def planted(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(host_module, "StepUpdate", planted)
    got = Draft(*LAYOUTS["bf16"], 3)
    assert got.fused
    for want, have in zip(expected, got.propose(*BATCHES[1]), strict=True):
        assert all(torch.equal(want[name], have[name]) for name in want)
    assert sum(host.fallbacks.values()) > 0
    assert not isinstance(got.speculator.block_tables, v2_step.DeferredSlots)


@pytest.mark.parametrize("change", ["a field more", "a method of its own", "more query tokens"])
def test_an_indexer_that_is_not_understood_updates_itself(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = Draft(*LAYOUTS["bf16"], 3)
    builder = next(
        builder for builder in draft.builders if isinstance(builder, indexer.DeepseekV32IndexerMetadataBuilder)
    )
    metadata = draft.graphs._metadata["model.layers.2.mtp_block.self_attn.indexer.k_cache"]
    rows = draft.sizes.captured
    host = Host(Settings(strategy="auto"))
    assert changes_of(builder, metadata, rows, "update", host) == "lengths and schedule"
    if change == "a field more":
        known: Any = INDEXER.fields
        monkeypatch.setitem(known, INDEXER_DECODE, known[INDEXER_DECODE] - {"indices"})
    elif change == "a method of its own":
        own = type("Own", (type(builder),), {"update_draft_decode_metadata": lambda self, metadata: None})
        monkeypatch.setattr(builder, "__class__", own)
    else:
        rows += 1
    assert changes_of(builder, metadata, rows, "update", host) == "other"


def test_context_parallelism_is_left_to_vllm(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    draft = Draft(*LAYOUTS["bf16"], 3)
    assert releases.uncovered_speculator(draft.speculator) == ""
    monkeypatch.setattr(draft.tables, "cp_size", 2)
    assert "context parallelism" in releases.uncovered_speculator(draft.speculator)
    monkeypatch.setattr(draft.tables, "cp_size", 1)
    monkeypatch.setattr(draft.speculator, "pcp_manager", object(), raising=False)
    assert "context parallelism" in releases.uncovered_speculator(draft.speculator)
