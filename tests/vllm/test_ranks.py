"""Ranks with gloo between them, each of which loads the plugin through vLLM: all fuse their draft, or none does.

The draft model stands for one with collectives: one after its layers and one for the logits, checked against what the
other ranks issue as their same collective. A capture is vLLM's own choice of what to capture and its warm-up, which runs it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import pkgutil
import sys
import tempfile
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nsa_plugin.adapters.vllm import agreement
from nsa_plugin.adapters.vllm.builder_rows import BuilderRow
from tests import ranks
from tests.vllm.rank import BATCHES, FORWARD, PADDING, TOKENS, Rank

WAIT_SECONDS = 10.0
"""For the vote of a rank that has no plugin."""
BUILDER_UPDATE = "vllm.v1.attention.ops.metadata.compute_token_to_req_indices"
STEP_UPDATE = "nsa_plugin.core.step_update.StepUpdate.run"
"""What updates metadata in the graph: for the builder, taken from vLLM while the plugin loads; and in one kernel for all."""

pytestmark = pytest.mark.skipif(
    not any(point.name == "nsa_plugin" for point in entry_points(group="vllm.general_plugins")),
    reason="nsa-plugin is not installed in this environment",
)


def together(rank: int, world: int, store: str) -> dict[str, Any]:
    """Sound ranks; then rank 1 fails whenever it updates metadata in place."""
    from vllm.v1.attention import backend  # noqa: F401  (vLLM's own use of what is planted stays sound)

    armed: list[int] = []

    def planted(path: str) -> Any:
        original = pkgutil.resolve_name(path)

        @functools.wraps(original)
        def function(*arguments: Any, **named: Any) -> Any:
            if rank in armed:
                raise RuntimeError("planted")
            return original(*arguments, **named)

        return mock.patch(path, function)

    with planted(BUILDER_UPDATE):
        one = Rank(rank, world, store)
        sound = one.draft()
    found: dict[str, Any] = {"sound": {"capture": one.capture(sound), **one.rounds(sound)}}
    armed.append(1)
    with planted(STEP_UPDATE):
        failing = one.draft()
        found["failing"] = {"capture": one.capture(failing), **one.rounds(failing)}
    return found


def without_the_plugin_on_one(rank: int, world: int, store: str) -> dict[str, Any]:
    """The plugin is missing, or left out by vLLM's own switch, on rank 1."""
    agreement.SECONDS = WAIT_SECONDS
    if rank == 1:
        os.environ["VLLM_PLUGINS"] = ""
    one = Rank(rank, world, store)
    draft = one.draft()
    return {"capture": one.capture(draft), **one.rounds(draft)}


def each_for_itself(rank: int, world: int, store: str) -> dict[str, Any]:
    """What would happen if rank 1 stepped down alone: its capture, by itself, and replays, together."""
    one = Rank(rank, world, store)
    draft = one.draft()
    draft.speculator.supports_decode_metadata_update &= rank != 1
    one.alone = True
    capture = one.capture(draft)
    one.alone = False
    return {"capture": capture, **one.rounds(draft)}


def data_parallel(rank: int, world: int, store: str) -> dict[str, Any]:
    """Rank 1 has no request while rank 0 drafts."""
    one = Rank(rank, world, store, data_parallel=True)
    draft = one.draft()
    return {"capture": one.capture(draft), **one.rounds(draft, idle=(1,))}


def verified_on_one(rank: int, world: int, store: str) -> dict[str, Any]:
    """Rank 1 alone verifies its drafts, and finds a difference in the second."""
    if rank == 1:
        os.environ["NSA_PLUGIN_VERIFY"] = "1"
    one = Rank(rank, world, store)
    from nsa_plugin import entry
    from nsa_plugin.adapters.vllm.v2.verified.staged import Staged

    prepare, drafts = Staged.prepare, [0]

    def planted(staged: Any, begun: Any) -> None:
        prepare(staged, begun)
        drafts[0] += not begun.dummy
        if drafts[0] == 2:
            staged._slots[1][0, 0] += 7

    with mock.patch.object(Staged, "prepare", planted):
        draft = one.draft()
        found = {"capture": one.capture(draft), **one.rounds(draft)}
    return {**found, "prepared": drafts[0], "on": entry._hosts["vllm"].on}


def in_turn(rank: int, world: int, store: str) -> dict[str, Any]:
    """Drafts made one after the other, while rank 1 is switched off and on, has another build, or fails."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NSA_PLUGIN_SWITCH_FILE"] = str(Path(folder, "off"))
        one = Rank(rank, world, store)
        from nsa_plugin import entry

        host = entry._hosts["vllm"]
        found: dict[str, Any] = {"on": one.made()}
        if rank == 1:
            Path(folder, "off").touch()
            host.look_at_switch_file()
        found["off"] = one.made(capture=True)
        if rank == 1:
            Path(folder, "off").unlink()
            host.look_at_switch_file()
        found["on again"] = one.made()
        with mock.patch.object(agreement, "build", lambda: f"0.1.0+{rank}"):
            found["builds"] = one.made()
        planted = mock.Mock(side_effect=RuntimeError("planted") if rank == 1 else None, return_value="")
        with mock.patch.object(BuilderRow, "refused", planted):
            found["failing"] = one.made()
        with mock.patch.object(BuilderRow, "refused", lambda *_: "all refuse"):
            found["refused"] = one.made()
    return found


def where_nothing_can_be_fused(rank: int, world: int, store: str) -> dict[str, Any]:
    """Only rank 0 has the plugin; no draft, a draft of one token, and one under elastic expert parallelism."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.backends.mla import flashmla_sparse

    from nsa_plugin import entry
    from nsa_plugin.rigs.vllm import v2_draft as vllm_draft

    if rank == 1:
        os.environ["VLLM_PLUGINS"] = ""
    one, start = Rank(rank, world, store), time.monotonic()
    none = vllm_draft.Draft("auto", 4, 1)
    spec = none.config.compilation_config.static_forward_context[vllm_draft.TARGET[0]]._spec
    without = dataclasses.replace(none.config, speculative_config=None)
    with set_current_vllm_config(without):
        target = flashmla_sparse.FlashMLASparseMetadataBuilder(spec, [vllm_draft.TARGET[0]], without, vllm_draft.CPU)
    elastic = type("Elastic", (), {"enable_elastic_ep": True, "__getattr__": _inner})
    configure = vllm_draft.Speculator.set_attn

    def set_attn(speculator: Any, *arguments: Any) -> None:
        parallel = speculator.vllm_config.parallel_config
        speculator.vllm_config.parallel_config = elastic()
        speculator.vllm_config.parallel_config.inner = parallel
        try:
            configure(speculator, *arguments)
        finally:
            speculator.vllm_config.parallel_config = parallel

    with mock.patch.object(vllm_draft.Speculator, "set_attn", set_attn):
        made = vllm_draft.Draft("auto", 4, TOKENS)
    return {
        "fused": [none.fused, made.fused], "target": target.supports_draft_decode_metadata_update,
        "seconds": time.monotonic() - start, "warnings": one.said(logging.WARNING),
        "paths": sorted(said[1:] for host in entry._hosts.values() for said in host._said),
    }  # fmt: skip


def _inner(parallel: Any, name: str) -> Any:
    return getattr(parallel.inner, name)


def pipeline(rank: int, world: int, store: str) -> dict[str, Any]:
    """Two stages of two ranks each. The first, which has no draft, lacks the plugin on rank 0."""
    if rank == 0:
        os.environ["VLLM_PLUGINS"] = ""
    one, start = Rank(rank, world, store, stages=2), time.monotonic()
    sharing = agreement.sharing()
    fused = one.draft().fused if rank >= 2 else None
    return {
        "sharing": sharing, "fused": fused, "seconds": time.monotonic() - start, "warnings": one.said(logging.WARNING)
    }  # fmt: skip


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[dict[str, Any]]]:
    """What every rank of every world returned; a world that hangs is killed, and fails."""
    found: dict[str, list[dict[str, Any]]] = ranks.script("tests.vllm.test_ranks")
    return found


def check(found: list[dict[str, Any]], expected: list[Any], fused: bool) -> None:
    """Every rank saw the right metadata and issued the same collectives in the same order."""
    assert [rank["fused"] for rank in found] == [fused] * len(found)
    assert all(rank["seen"] == expected for rank in found)
    assert all(rank["issued"] == found[0]["issued"] and rank["capture"] == found[0]["capture"] for rank in found)
    assert not any(rank["unmatched"] for rank in found)
    assert len(found[0]["capture"]) == 2 * (TOKENS - 1 if fused else 1)


@pytest.fixture
def stock(outcomes: dict[str, list[dict[str, Any]]]) -> list[Any]:
    """What draft steps see without the plugin."""
    seen: list[Any] = outcomes["absent"][1]["seen"]
    assert len(seen) == len(BATCHES) * (TOKENS - 1)
    return seen


def test_all_ranks_fuse(outcomes: dict[str, list[dict[str, Any]]], stock: list[Any]) -> None:
    found = [rank["sound"] for rank in outcomes["spawn"]]
    check(found, stock, fused=True)
    assert not any(rank["errors"] or rank["warnings"] for rank in found)


def test_a_failure_on_one_rank_changes_no_collective(
    outcomes: dict[str, list[dict[str, Any]]], stock: list[Any]
) -> None:
    found = [rank["failing"] for rank in outcomes["spawn"]]
    check(found, stock, fused=True)
    assert found[0]["errors"] == []
    assert sorted(line.split(";")[0] for line in found[1]["errors"]) == [
        f"nsa-plugin: {path}: strategy graph failed at capture (RuntimeError: planted)"
        for path in ("draft decode", "draft step")
    ]


def test_without_the_plugin_on_one_rank_none_fuses(outcomes: dict[str, list[dict[str, Any]]], stock: list[Any]) -> None:
    """Four ranks. Every rank that has it says which one does not."""
    check(outcomes["absent"], stock, fused=False)
    line = (
        "nsa-plugin: every rank drafts as vLLM does: nsa-plugin is absent or failing on rank 1 of 4 "
        "that share the draft"
    )
    assert [rank["warnings"] for rank in outcomes["absent"]] == [[line], [], [line], [line]]
    assert not any(rank["errors"] for rank in outcomes["absent"])


def test_why_ranks_must_agree(outcomes: dict[str, list[dict[str, Any]]], stock: list[Any]) -> None:
    """A rank that steps down alone issues other collectives at capture; at replay it does not."""
    fused, alone = outcomes["alone"]
    assert (len(fused["capture"]), len(alone["capture"])) == (2 * (TOKENS - 1), 2)
    assert fused["issued"] == alone["issued"] and fused["seen"] == alone["seen"] == stock
    assert not fused["unmatched"] and not alone["unmatched"]


def test_a_difference_on_one_rank_changes_no_collective(
    outcomes: dict[str, list[dict[str, Any]]], stock: list[Any]
) -> None:
    """Every rank goes on with what it has captured; the one whose values differed has vLLM's in it, from that draft on."""
    check(outcomes["verified"], stock, fused=True)
    plain, verified = outcomes["verified"]
    assert (plain["prepared"], plain["on"], plain["errors"]) == (0, True, [])
    assert (verified["prepared"], verified["on"]) == (2, False)
    (line,) = verified["errors"]
    assert line.startswith(
        "nsa-plugin: draft step: strategy copy computed other values than vllm's own path (slot_mapping)"
    )


def test_an_idle_data_parallel_rank_takes_part(outcomes: dict[str, list[dict[str, Any]]], stock: list[Any]) -> None:
    """vLLM agrees on padding twice per draft, whatever the number of steps, and the captured steps do not ask again."""
    busy, idle = outcomes["data parallel"]
    assert busy["fused"] and idle["fused"] and busy["seen"] == stock and idle["seen"] == []
    assert busy["issued"] == idle["issued"] and busy["capture"] == idle["capture"]
    assert not busy["unmatched"] and not idle["unmatched"]
    kinds = [kind for kind, _ in busy["issued"]]
    assert kinds.count(PADDING) == 2 * len(BATCHES) and kinds.count(FORWARD) == TOKENS * len(BATCHES)


def test_each_draft_is_voted_on_anew(outcomes: dict[str, list[dict[str, Any]]]) -> None:
    """Whoever is off, or fails, objects; the others say which rank, and why. Nobody waits for long."""
    plain, other = outcomes["in turn"]
    said = "nsa-plugin: every rank drafts as vLLM does: "
    for name, fused, lines, others in (
        ("on", True, [], []),
        ("off", False, [f"{said}rank 1: switched off"], []),
        ("on again", True, [], []),
        ("builds", False, [DIFFERENT], [DIFFERENT]),
        ("failing", False, [f"{said}rank 1: RuntimeError: planted"], []),
        ("refused", False, [], []),
    ):
        assert (plain[name]["fused"], other[name]["fused"]) == (fused, fused), name
        for found, expected in ((plain, lines), (other, others)):
            warnings = [line for line in found[name]["warnings"] if said in line]
            assert len(warnings) == len(expected), (name, warnings)
            assert all(line.startswith(start) for line, start in zip(warnings, expected, strict=True)), warnings
    assert len(plain["off"]["capture"]) == 2 and plain["off"]["capture"] == other["off"]["capture"]
    assert [len(rank["failing"]["errors"]) for rank in (plain, other)] == [0, 1]


DIFFERENT = (
    "nsa-plugin: every rank drafts as vLLM does: ranks have different builds of nsa-plugin: 0.1.0+0 on rank 0; "
    "0.1.0+1 on rank 1"
)


def test_no_rank_is_asked_where_nothing_can_be_fused(outcomes: dict[str, list[dict[str, Any]]]) -> None:
    has, lacks = outcomes["nothing to fuse"]
    for rank in (has, lacks):
        assert rank["fused"] == [False, False] and not rank["target"] and not rank["warnings"]
        assert rank["seconds"] < agreement.SECONDS / 2
    assert lacks["paths"] == []
    ((path, strategy),) = has["paths"]
    assert path == "draft decode" and strategy.startswith("off (elastic expert parallelism is not covered")


def test_ranks_of_another_pipeline_stage_have_no_say(outcomes: dict[str, list[dict[str, Any]]]) -> None:
    found = outcomes["pipeline"]
    assert [rank["sharing"] for rank in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["fused"] for rank in found] == [None, None, True, True]
    assert not any(rank["warnings"] for rank in found)
    assert max(rank["seconds"] for rank in found) < agreement.SECONDS / 2


def main() -> dict[str, Any]:
    """Start the worlds. Forks come from a process that has imported vLLM but computed nothing, and loaded no plugin."""
    from nsa_plugin.rigs.vllm import v2_draft as vllm_draft  # noqa: F401
    from tests.vllm import test_ranks

    return {
        "absent": ranks.run("fork", 4, test_ranks.without_the_plugin_on_one),
        "alone": ranks.run("fork", 2, test_ranks.each_for_itself),
        "data parallel": ranks.run("fork", 2, test_ranks.data_parallel),
        "verified": ranks.run("fork", 2, test_ranks.verified_on_one),
        "in turn": ranks.run("fork", 2, test_ranks.in_turn),
        "nothing to fuse": ranks.run("fork", 2, test_ranks.where_nothing_can_be_fused),
        "pipeline": ranks.run("fork", 4, test_ranks.pipeline),
        "spawn": ranks.run("spawn", 2, test_ranks.together),
    }


if __name__ == "__main__":
    answer = main()
    sys.stdout.flush()
    print("\n" + json.dumps(answer))
