"""Verification of Model Runner V1's drafts on the real proposer: nothing wrong is reported, everything wrong is repaired."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_plugin import repro
from nsa_plugin.adapters.patches import PatchSet
from nsa_plugin.adapters.verification import SpareBuffers
from nsa_plugin.adapters.vllm.ledger import v1_patches
from nsa_plugin.adapters.vllm.rebuilds import spare_group
from nsa_plugin.adapters.vllm.v1.kept import KeptSteps
from nsa_plugin.adapters.vllm.v1.proposer import PATH
from nsa_plugin.adapters.vllm.v1.steps import DraftSteps
from nsa_plugin.adapters.vllm.v1.verified import watch as v1_watch
from nsa_plugin.cli import main
from nsa_plugin.core.draft_steps import PastEnd
from nsa_plugin.host import Host
from nsa_plugin.rigs.vllm.drafts import BATCHES, LAYOUTS
from nsa_plugin.rigs.vllm.v1_draft import ALL_BATCHES, V1Draft, proposals, reference
from nsa_plugin.settings import Settings
from tests.examples import examples
from tests.vllm.drafts import SOME, assert_same

TOKENS = 4
DRAWN = examples(60)
"""Random drafts."""
Install = Callable[..., Host]


@pytest.fixture
def install() -> Iterator[Install]:
    """Patches the proposer for a host with settings."""
    patches: list[PatchSet] = []

    def installed(**settings: Any) -> Host:
        for patch in patches:
            patch.undo()
        host, patch = Host(Settings(**settings)), v1_patches()
        patches.append(patch)
        patch.install(host)
        return host

    yield installed
    for patch in patches:
        patch.undo()


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Draft steps of which the metadata was compared."""
    found: list[int] = []
    same = v1_watch.VerifiedDrafts._same_metadata

    def watched(check: Any, built: Any, draft_index: int) -> bool:
        if check._now is not None:
            found.append(draft_index)
        return same(check, built, draft_index)

    monkeypatch.setattr(v1_watch.VerifiedDrafts, "_same_metadata", watched)
    return found


@pytest.mark.parametrize(("layout", "tokens"), SOME[:-1])
def test_right_values_pass(install: Install, family: int, layout: str, tokens: int, compared: list[int]) -> None:
    draft = V1Draft(*LAYOUTS[layout], tokens)
    want = reference(draft)
    host = install(verify=1)
    for _ in range(2):  # as built, and as kept
        assert_same(want, proposals(draft))
    assert compared == list(range(1, tokens)) * len(ALL_BATCHES) * 2
    assert not host.mismatches and not host.fallbacks and host.on


def test_every_nth_draft_is_verified(install: Install, hopper: None, compared: list[int]) -> None:
    draft = V1Draft("auto", 4, 2)
    install(verify=3)
    for number in range(7):
        draft.propose(*BATCHES[0])
        assert len(compared) == number // 3 + 1


def test_many_random_drafts(install: Install, hopper: None, compared: list[int]) -> None:
    draft, rng = V1Draft("fp8_ds_mla", 64, TOKENS), random.Random(7)
    batches = []
    for _ in range(DRAWN):
        size = rng.randint(1, 9)
        lengths = [rng.choice([rng.randint(5, 1024), rng.randint(1016, 1024)]) for _ in range(size)]
        batches.append((lengths, [rng.randint(0, TOKENS) for _ in range(size)], rng.randint(1, 900)))
    want = reference(draft, batches)
    host = install(verify=1)
    assert_same(want, proposals(draft, batches))
    assert len(compared) == DRAWN * (TOKENS - 1) and not host.mismatches and not host.fallbacks


def test_a_verification_leaves_the_batch_as_it_is_without(install: Install, hopper: None) -> None:
    names = ("max_seq_len", "seq_lens_cpu_upper_bound", "slot_mapping", "seq_lens", "num_actual_tokens")
    draft = V1Draft("auto", 4, TOKENS)
    left = []
    for settings in ({}, {"verify": 1}):
        install(**settings)
        for batch in BATCHES[:4]:
            proposals(draft, [batch])
            values = {name: getattr(draft.last_batch, name) for name in names}
            left.append({name: value.clone() if torch.is_tensor(value) else value for name, value in values.items()})
    assert_same(left[:4], left[4:])


def in_metadata(path: str) -> Callable[[Any], Any]:
    """A copy of a group's metadata with one wrong value; None if it has no such field."""

    def spoil(metadata: Any) -> Any:
        if type(metadata).__name__ != path.split(".")[0]:
            return metadata
        spoilt = copy.copy(metadata)
        owner, (*parents, leaf) = spoilt, path.split(".")[1:]
        for name in parents:
            setattr(owner, name, copy.copy(getattr(owner, name)))
            owner = getattr(owner, name)
        value = getattr(owner, leaf)
        if isinstance(value, int):
            setattr(owner, leaf, value + 1)
        else:
            wrong = value.clone()
            wrong[(0,) * wrong.dim()] += 1
            setattr(owner, leaf, wrong)
        return spoilt

    return spoil


SPARSE, INDEXER = "FlashMLASparseMetadata", "DeepseekV32IndexerMetadata"
METADATA = [
    f"{SPARSE}.req_id_per_token", f"{SPARSE}.seq_lens", f"{SPARSE}.block_table", f"{SPARSE}.slot_mapping",
    f"{SPARSE}.query_start_loc", f"{SPARSE}.max_seq_len", f"{SPARSE}.num_decode_tokens",
    f"{SPARSE}.fp8_extra_metadata.decode.seq_lens", f"{INDEXER}.seq_lens", f"{INDEXER}.slot_mapping",
    f"{INDEXER}.decode.seq_lens", f"{INDEXER}.decode.block_table", f"{INDEXER}.decode.decode_lens",
    f"{INDEXER}.decode.per_req_decode_lens", f"{INDEXER}.decode.schedule_metadata",
]  # fmt: skip
RECOMPUTED = ("positions", "slot_mapping", "seq_lens", "block_table", "req_id_per_token", "decode_lens",
              "per_req_decode_lens", "query_start_loc")  # fmt: skip
WRONG = 3
"""The batch with the planted value; some of its requests pass the model's maximal length."""


def check_outcome(
    host: Host, log: Any, folder: Path, capsys: pytest.CaptureFixture[str], field: str, step: int
) -> None:
    """One line, one count, one file that tells where the wrong value came from."""
    assert host.mismatches == {("vllm", PATH, "copy", field): 1} and not host.fallbacks and not host.on
    (line,) = log(logging.ERROR)
    (file,) = folder.iterdir()
    assert f"nsa-plugin verify {file}" in line and "computed other values than vllm's own path" in line
    recorded = repro.load(file)
    assert recorded.batch.batch_size == len(BATCHES[WRONG][0]) and {at for at, _ in recorded.got} == {step}
    assert recorded.limits is not None and recorded.limits.past_end is PastEnd.PAD
    assert main(["verify", str(file)]) == 0
    assert "Here every implementation gives the engine's values." in capsys.readouterr().out
    known = [f"step {step}: {field}"] if field.rpartition(".")[2] in RECOMPUTED else []
    for impl in ("reference", "triton"):
        assert repro.recompute(recorded, impl) == {"engine": [], "plugin": known}


def run_with_a_plant(draft: V1Draft, host: Host) -> list[Any]:
    """Every batch; the host is on until the wrong one."""
    have = []
    for number, batch in enumerate(ALL_BATCHES):
        have += proposals(draft, [batch])
        assert host.on == (number < WRONG)
    return have


@pytest.mark.parametrize(("path", "step"), [(path, at % (TOKENS - 1)) for at, path in enumerate(METADATA)])
def test_a_difference_in_the_metadata(
    install: Install, hopper: None, monkeypatch: pytest.MonkeyPatch, log: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], path: str, step: int,
) -> None:  # fmt: skip
    draft = V1Draft(*LAYOUTS["fp8 separate"], TOKENS)
    want = reference(draft)
    host = install(verify=1, repro_dir=tmp_path)
    at, drafts = KeptSteps.at, [0]
    begin = DraftSteps.begin

    def begun(steps: DraftSteps) -> None:
        drafts[0] += 1
        begin(steps)

    def planted(kept: KeptSteps, index: int, longest: int) -> Any:
        metadata = at(kept, index, longest)
        return in_metadata(path)(metadata) if (drafts[0], index) == (WRONG + 1, step) else metadata

    monkeypatch.setattr(DraftSteps, "begin", begun)
    monkeypatch.setattr(KeptSteps, "at", planted)
    assert_same(want, run_with_a_plant(draft, host))
    check_outcome(host, log, tmp_path, capsys, path, step)


@pytest.mark.parametrize("step", range(TOKENS - 1))
@pytest.mark.parametrize("field", ["positions", "slot_mapping", "seq_lens", "slot_mapping.padding"])
def test_a_difference_in_places(
    install: Install, hopper: None, monkeypatch: pytest.MonkeyPatch, log: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], field: str, step: int,
) -> None:  # fmt: skip
    draft = V1Draft(*LAYOUTS["fp8 mixed"], TOKENS)
    execution = draft.proposer._determine_batch_execution_and_padding

    def padded(tokens: int, use_cudagraphs: bool = True) -> Any:
        mode, _, across = execution(tokens)
        return mode, -(-tokens // 8) * 8, across

    draft.proposer._determine_batch_execution_and_padding = padded
    want = reference(draft)
    host = install(verify=1, repro_dir=tmp_path)
    advance, drafts = DraftSteps.advance, [0]

    def planted(steps: DraftSteps, *arguments: Any) -> torch.Tensor:
        moved = advance(steps, *arguments)
        _, _, batch, size, rows, _ = arguments
        drafts[0] += steps.step == 1
        if (drafts[0], steps.step - 1) == (WRONG + 1, step):
            slots = draft.proposer._slot_mapping_buffer
            spoilt = {"positions": moved, "slot_mapping": slots, "seq_lens": batch.seq_lens}
            assert rows > size
            spoilt.get(field, slots[size:])[0] += 1
        return moved

    monkeypatch.setattr(DraftSteps, "advance", planted)
    assert_same(want, run_with_a_plant(draft, host))
    check_outcome(host, log, tmp_path, capsys, field, step)


def test_it_can_be_switched_on_again(install: Install, hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a difference, by somebody who has looked at it."""
    draft = V1Draft("auto", 4, TOKENS)
    want = reference(draft)
    host = install(verify=1)
    with monkeypatch.context() as patch:
        patch.setattr(KeptSteps, "at", lambda kept, index, longest: in_metadata(METADATA[0])(kept.steps[index]))
        proposals(draft, BATCHES[:1])
    assert not host.on and sum(host.mismatches.values()) == 1
    host.switch(True, "test")
    advanced: list[int] = []
    advance = DraftSteps.advance

    def counted(steps: DraftSteps, *arguments: Any) -> torch.Tensor:
        advanced.append(steps.step)
        return advance(steps, *arguments)

    monkeypatch.setattr(DraftSteps, "advance", counted)
    assert_same(want, proposals(draft))
    assert len(advanced) == len(want) and sum(host.mismatches.values()) == 1


def test_spare_groups_of_releases_without_kernel_block_tables() -> None:
    """vLLM before 0.32. What has room for tokens is cut to the requests of a draft; floating-point workspaces stay shared."""
    limits = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=64))
    builder = type("Builder", (), {})()
    vars(builder).update(vllm_config=limits, map=torch.arange(64), offsets=torch.arange(9), workspace=torch.zeros(64))
    group = SimpleNamespace(metadata_builders=[builder], get_metadata_builder=lambda: builder)
    spare = spare_group(group, 8, SpareBuffers())
    (copied,) = spare.metadata_builders
    assert copied.map.tolist() == list(range(8)) and copied.offsets.tolist() == list(range(9))
    assert copied.map.data_ptr() != builder.map.data_ptr() and copied.offsets.data_ptr() != builder.offsets.data_ptr()
    assert copied.workspace is builder.workspace and group.metadata_builders == [builder]


@pytest.mark.parametrize("what", ["_follow", "_spare", "_defined"])
def test_a_verification_that_fails_leaves_drafts_to_vllm(
    install: Install, hopper: None, monkeypatch: pytest.MonkeyPatch, log: Any, what: str
) -> None:
    draft = V1Draft("fp8_ds_mla", 64, TOKENS)
    want = reference(draft)
    host = install(verify=1)
    monkeypatch.setattr(v1_watch, what, lambda *arguments: 1 / 0)
    assert_same(want, proposals(draft))
    assert host.fallbacks == {("vllm", PATH, "replay", "copy", "ZeroDivisionError"): 1} and not host.mismatches
    assert len(log(logging.ERROR)) == 1


def test_a_fault_of_ours_in_a_verified_draft(install: Install, hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = V1Draft("auto", 4, TOKENS)
    want = reference(draft)
    host = install(verify=1)
    monkeypatch.setattr(KeptSteps, "at", lambda kept, index, longest: 1 / 0)
    assert_same(want, proposals(draft))
    assert host.fallbacks == {("vllm", PATH, "replay", "copy", "ZeroDivisionError"): 1} and not host.mismatches
