"""Verification of Model Runner V2's drafts on the real speculator: nothing wrong is reported, everything wrong is repaired."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config

from nsa_plugin import repro
from nsa_plugin.adapters.probe import Need
from nsa_plugin.adapters.vllm import releases
from nsa_plugin.adapters.vllm.adapter import VllmAdapter
from nsa_plugin.adapters.vllm.v2 import switch as v2_switch
from nsa_plugin.adapters.vllm.v2.verified import rebuild as v2_rebuild
from nsa_plugin.adapters.vllm.v2.verified import watch as v2_watch
from nsa_plugin.adapters.vllm.v2.verified.rebuild import Draft as Begun
from nsa_plugin.adapters.vllm.v2.verified.staged import Staged
from nsa_plugin.cli import main
from nsa_plugin.core.draft_steps import PastEnd
from nsa_plugin.host import Host
from nsa_plugin.rigs.vllm.drafts import BATCHES, LAYOUTS
from nsa_plugin.rigs.vllm.stand_ins import emulated_cuda
from nsa_plugin.rigs.vllm.v2_draft import CAPTURED, Draft
from tests.examples import examples
from tests.vllm.drafts import LARGE, SOME, captured

Install = Callable[..., tuple[Host, VllmAdapter]]
Step = dict[str, torch.Tensor]
POISON = 3
LAYOUT, TOKENS = "fp8 separate", 4
DRAWN = examples(60)
"""Random drafts."""
pytestmark = pytest.mark.usefixtures("hopper")


def propose(draft: Draft, batches: Any = BATCHES) -> list[Step]:
    """What every draft step of every batch saw, from buffers full of what nobody wrote."""
    seen = []
    for lengths, rejected, first_block in batches:
        draft.tables.slot_mappings.fill_(POISON)
        for builder in draft.builders:
            for name, value in vars(builder).items():
                if name.endswith("_buffer") and not name.startswith(("arange", "offsets")):
                    value.fill_(POISON)
        seen += draft.propose(lengths, [min(count, draft.tokens) for count in rejected], first_block)
    return seen


def unequal(want: list[Step], have: list[Step]) -> list[str]:
    """What differs in any step; schedules count rows of padding, of which a rebuild takes no notice."""
    wrong = set()
    for index, (theirs, ours) in enumerate(zip(want, have, strict=True)):
        assert theirs.keys() == ours.keys()
        names = theirs.keys() - ({"schedule"} if len(theirs["request map"]) < CAPTURED else set())
        wrong |= {f"{name} of step {index}" for name in names if not torch.equal(theirs[name], ours[name])}
    return sorted(wrong)


_stock: dict[Any, list[Step]] = {}


def stock(layout: str = LAYOUT, tokens: int = TOKENS) -> list[Step]:
    """What vLLM's own rebuild gives, before the plugin is installed."""
    if (layout, tokens) not in _stock:
        draft = Draft(*LAYOUTS[layout], tokens)
        assert not draft.speculator.supports_decode_metadata_update
        _stock[layout, tokens] = propose(draft)
    return _stock[layout, tokens]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each draft that was verified."""
    found: list[int] = []
    differences = Staged.differences

    def watched(staged: Staged, begun: Begun) -> Any:
        found.append(begun.num_reqs)
        return differences(staged, begun)

    monkeypatch.setattr(Staged, "differences", watched)
    return found


@pytest.mark.parametrize(("layout", "tokens"), SOME)
def test_right_values_pass(install: Install, layout: str, tokens: int, compared: list[int]) -> None:
    expected = stock(layout, tokens)
    host, _ = install(verify=1)
    assert unequal(expected, propose(captured(layout, tokens))) == []
    assert compared == [len(batch[0]) for batch in BATCHES]
    assert host.on and not host.mismatches and not host.fallbacks


def test_right_values_pass_on_blackwell(install: Install, compared: list[int]) -> None:
    """Whose indexer has a row of indices more."""
    with emulated_cuda(100):
        draft = Draft(*LAYOUTS["bf16"], 4)
        expected = propose(draft)
        assert "indices" in expected[0]
        host, _ = install(verify=1)
        assert unequal(expected, propose(captured("bf16", TOKENS))) == []
    assert len(compared) == len(BATCHES) and not host.mismatches and not host.fallbacks


def test_every_nth_draft_of_a_size_is_verified(install: Install, compared: list[int]) -> None:
    install(verify=3)
    draft = captured(LAYOUT, TOKENS)
    batch = BATCHES[1]
    for number in range(7):
        draft.propose(*batch)
        assert len(compared) == number // 3 + 1
    for _ in range(4):  # a batch larger than any captured one runs without a graph
        draft.propose(*LARGE)
    assert compared[3:] == [len(LARGE[0])] * 2


def test_many_random_drafts(install: Install, compared: list[int]) -> None:
    host, _ = install(verify=1)
    draft, rng = captured("fp8 mixed", TOKENS), random.Random(5)
    for _ in range(DRAWN):
        size = rng.randint(1, CAPTURED + 2)
        lengths = [
            rng.choice([rng.randint(5, 1024), rng.randint(1016, 1024), 64 * rng.randint(1, 16)]) for _ in range(size)
        ]
        draft.propose(lengths, [rng.randint(0, 4) for _ in range(size)], rng.randint(1, 200))
    assert len(compared) == DRAWN and not host.mismatches and not host.fallbacks


def test_captured_copies_read_where_every_later_draft_is_prepared(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a CUDA graph: the steps that were recorded at capture run for ever, with the addresses that they had."""
    expected = stock()
    host, _ = install(verify=1)
    draft = captured(LAYOUT, TOKENS)
    for batch in (LARGE, BATCHES[0]):
        draft.propose(*batch)
    step = v2_watch.Watch.step
    recorded: list[Any] = []

    def once(watch: Any, speculator: Any, metadata: Any, num_reqs: int) -> Any:
        if not recorded:
            recorded.append(step(watch, speculator, metadata, num_reqs))
        recorded[0]._next = 0
        return recorded[0]

    monkeypatch.setattr(v2_watch.Watch, "step", once)
    draft.warm_up()
    assert unequal(expected, propose(draft)) == [] and not host.mismatches


def spoil_field(leaf: str, step: int) -> Callable[[Staged], None]:
    """One wrong value in a field."""

    def spoil(staged: Staged) -> None:
        rows = next(field.rows[step] for group in staged.groups for field in group.fields if field.leaf == leaf)
        rows[(0,) * rows.dim()] += 1

    return spoil


def spoil_slot(row: int, step: int) -> Callable[[Staged], None]:
    """A slot that belongs to somebody else."""

    def spoil(staged: Staged) -> None:
        staged._slots[step][0, row] += 7

    return spoil


PLANTS = {
    **{f"{leaf}, step {step}": (leaf, step, spoil_field(leaf, step))
       for leaf in ("seq_lens", "schedule_metadata") for step in range(3)},
    **{leaf: (leaf, 0, spoil_field(leaf, 0))
       for leaf in ("req_id_per_token", "decode_lens", "per_req_decode_lens", "block_table")},
    **{f"slot, step {step}": ("slot_mapping", step, spoil_slot(1, step)) for step in range(3)},
    **{f"slot of padding, step {step}": ("slot_mapping.padding", step, spoil_slot(3, step)) for step in range(3)},
}  # fmt: skip
PADDED, FULL = 1, 3
"""A batch of three requests, padded to the captured four, and one of four."""


@pytest.mark.parametrize(("leaf", "step", "spoil"), PLANTS.values(), ids=PLANTS)
def test_a_difference_gives_vllms_values_switches_off_and_leaves_a_repro(
    install: Install, monkeypatch: pytest.MonkeyPatch, log: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    leaf: str, step: int, spoil: Callable[[Staged], None],
) -> None:  # fmt: skip
    expected = stock()
    host, _ = install(verify=1, repro_dir=tmp_path)
    wrong = FULL if leaf == "schedule_metadata" else PADDED
    prepare, prepared = Staged.prepare, [0]

    def planted(staged: Staged, begun: Begun) -> None:
        prepare(staged, begun)
        prepared[0] += 1
        if prepared[0] == wrong + 1:
            spoil(staged)

    monkeypatch.setattr(Staged, "prepare", planted)
    draft = captured(LAYOUT, TOKENS)
    prepared[0] = 0
    for number, batch in enumerate(BATCHES):
        part = expected[number * 3 : number * 3 + 3]
        assert unequal(part, propose(draft, [batch])) == []
        assert host.on == (number < wrong)
    assert prepared[0] == wrong + 1 and len(host.mismatches) == 1 and not host.fallbacks
    ((engine, path, strategy, field),) = host.mismatches
    assert (engine, path, strategy) == ("vllm", "draft step", "copy") and field.endswith(leaf)
    (line,) = log(logging.ERROR)
    (file,) = tmp_path.iterdir()
    assert f"nsa-plugin verify {file}" in line and "computed other values than vllm's own path" in line
    recorded = repro.load(file)
    assert recorded.batch.batch_size == len(BATCHES[wrong][0]) and recorded.limits is not None
    assert recorded.limits.past_end is PastEnd.CLAMP
    assert main(["verify", str(file)]) == 0
    assert "Here every implementation gives the engine's values." in capsys.readouterr().out
    in_steps = range(3) if leaf in ("req_id_per_token", "decode_lens", "per_req_decode_lens", "block_table") else [step]
    assert {at for at, _ in recorded.got} == set(in_steps)
    recomputed = (
        [] if leaf in ("schedule_metadata", "slot_mapping.padding") else [f"step {at}: {field}" for at in in_steps]
    )
    for impl in ("reference", "triton"):
        found = repro.recompute(recorded, impl)
        assert found == {"engine": [], "plugin": recomputed}


def test_what_a_repro_of_a_draft_holds(install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Lengths and block tables, no tokens; a wrong value of the engine's shows when it is computed again."""
    host, _ = install(verify=1, repro_dir=tmp_path)
    draft = captured(LAYOUT, TOKENS)
    differences = Staged.differences

    def wrong_engine(staged: Staged, begun: Begun) -> Any:
        for step, expected, got in differences(staged, begun):
            expected["slot_mapping"][0] += step == 1
            yield step, expected, got

    monkeypatch.setattr(Staged, "differences", wrong_engine)
    draft.propose(*BATCHES[3])  # at the model's maximal length
    (file,) = tmp_path.iterdir()
    recorded = repro.load(file)
    assert recorded.batch.seq_lens.tolist() == [1001, 1022, 1024, 11]
    assert {name for _, name in recorded.got} == {
        "slot_mapping", "slot_mapping.padding", "FlashMLASparseMetadata.req_id_per_token",
        *(f"DeepseekV32IndexerMetadata.decode.{leaf}"
          for leaf in ("seq_lens", "decode_lens", "per_req_decode_lens", "block_table", "schedule_metadata")),
    }  # fmt: skip
    assert repro.recompute(recorded, "reference") == {"engine": ["step 1: slot_mapping"], "plugin": []}
    assert main(["verify", str(file)]) == 1 and set(host.mismatches.values()) == {1}


def test_an_error_while_preparing_hands_drafts_back(
    install: Install, monkeypatch: pytest.MonkeyPatch, log: Any
) -> None:
    expected = stock()
    host, _ = install(verify=1)
    prepare, working = Staged.prepare, iter([True, False])

    def failing(staged: Staged, begun: Begun) -> None:
        if not next(working, True):
            raise RuntimeError("planted")
        prepare(staged, begun)

    monkeypatch.setattr(Staged, "prepare", failing)
    draft = captured(LAYOUT, TOKENS)
    assert unequal(expected, propose(draft)) == []
    assert host.fallbacks == {("vllm", "draft step", "replay", "copy", "RuntimeError"): 1} and host.on
    assert len(log(logging.ERROR)) == 1


def test_a_draft_for_the_sake_of_other_ranks_is_prepared_and_not_compared(
    install: Install, compared: list[int]
) -> None:
    host, _ = install(verify=1)
    draft = captured(LAYOUT, TOKENS)
    draft.propose(*BATCHES[0])
    descriptor = draft.graphs.dispatch(CAPTURED, CAPTURED)
    with set_current_vllm_config(draft.config):
        draft.speculator._fused_multi_step_decode(1, True, descriptor, None, torch.ones(1, dtype=torch.int32), 4)
    assert compared == [len(BATCHES[0][0])] and not host.fallbacks and not host.mismatches


def test_a_rebuild_that_fails_ends_verification_only(
    install: Install, monkeypatch: pytest.MonkeyPatch, compared: list[int]
) -> None:
    expected = stock()
    host, _ = install(verify=1)
    draft = captured(LAYOUT, TOKENS)
    monkeypatch.setattr(v2_rebuild.Rebuild, "steps", lambda rebuild, begun: 1 / 0)
    assert unequal(expected, propose(draft)) == []
    assert len(compared) == 1 and sum(host.fallbacks.values()) == 2 and host.on


def test_what_cant_be_verified_is_recorded_in_the_graph_and_said(
    install: Install, monkeypatch: pytest.MonkeyPatch, log: Any
) -> None:
    expected = stock()
    monkeypatch.setattr(v2_watch, "Rebuild", lambda *arguments: 1 / 0)
    install(verify=1)
    draft = captured(LAYOUT, TOKENS)
    assert unequal(expected[:3], propose(draft, BATCHES[:1])) == []
    assert any("NSA_PLUGIN_VERIFY can't be had: division by zero" in line for line in log(logging.WARNING))
    assert "draft step: strategy graph" in " ".join(log(logging.INFO))
    choice = v2_switch.drafts.get(draft.speculator)
    assert choice is not None and choice.recorded and not choice.switchable


def test_without_what_it_takes_drafts_are_served_all_the_same(
    install: Install, monkeypatch: pytest.MonkeyPatch, log: Any
) -> None:
    expected = stock()
    need = Need("vllm.absent", (), "test")
    monkeypatch.setattr(releases, "WATCH_NEEDS", (need,))
    install(verify=1)
    assert any("neither verified nor measured: looked for vllm.absent" in line for line in log(logging.WARNING))
    draft = Draft(*LAYOUTS["fp8 separate"], 4)
    assert draft.speculator.supports_decode_metadata_update
    assert unequal(expected[:3], propose(draft, BATCHES[:1])) == []


def noted(calls: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, of which every call is written down."""

    def call(*arguments: Any) -> Any:
        calls.append(name)
        return function(*arguments)

    return call


def test_a_running_process_can_be_switched(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = stock()
    host, _ = install(verify=1)
    ways: list[str] = []
    for name in ("prepare", "prepare_natively"):
        monkeypatch.setattr(Staged, name, noted(ways, name, getattr(Staged, name)))
    draft = captured(LAYOUT, TOKENS)
    ways.clear()
    for on in (True, False, True):
        assert host.switch(on, "test") == []
        assert unequal(expected[3:6], propose(draft, BATCHES[1:2])) == []
    assert ways == ["prepare", "prepare_natively", "prepare"] and not host.mismatches


def test_nothing_is_watched_when_nothing_is_asked(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = stock()
    monkeypatch.setattr(v2_watch, "Watch", lambda *arguments: 1 / 0)
    install()
    assert unequal(expected[:3], propose(captured(LAYOUT, TOKENS), BATCHES[:1])) == []


def test_spare_buffers_are_those_of_a_draft(install: Install) -> None:
    """No captured buffer is written by a rebuild, and no spare one has room for a whole batch of prefills."""
    install(verify=1)
    draft = captured("fp8 mixed", TOKENS)
    known = vars(draft.speculator)["_nsa_plugin_watched"]
    (rebuild,) = known._rebuilds.values()
    own = {value.data_ptr() for builder in draft.builders for value in integers(builder)}
    own |= {draft.tables.slot_mappings.data_ptr(), draft.speculator.input_buffers.seq_lens.data_ptr()}
    spare = [
        builder for groups in rebuild._speculator.attn_groups for group in groups for builder in group.metadata_builders
    ]
    tensors = [value for builder in spare for value in integers(builder)]
    assert len(tensors) >= 12 and not own & {value.data_ptr() for value in tensors}
    assert max(value.shape[0] for value in tensors if value.dim() == 2) <= draft.sizes.requests


def integers(builder: Any) -> list[torch.Tensor]:
    """What a builder writes metadata into."""
    tensors = [value for value in vars(builder).values() if torch.is_tensor(value)]
    return [value for value in tensors if value.numel() and not value.is_floating_point()]


def test_a_fused_draft_keeps_its_graph_unverified_where_only_graphs_may_be_compared(install: Install, log: Any) -> None:
    expected = stock()
    host, adapter = install(verify=1, verify_mode="graph")
    draft = captured(LAYOUT, TOKENS)
    assert unequal(expected[:3], propose(draft, BATCHES[:1])) == []
    assert any("not verified: NSA_PLUGIN_VERIFY_MODE=graph can't be had here" in line for line in log(logging.WARNING))
    assert not host.verifications and not host.fallbacks
    plans = {plan.path: plan for plan in adapter.paths(host)}
    assert plans["draft decode (Model Runner V2)"].strategy == "graph"
    assert "NSA_PLUGIN_VERIFY_MODE=graph can't be had here" in plans["draft decode (Model Runner V2)"].why
    assert plans["target verify (Model Runner V2)"].strategy == "graph"
