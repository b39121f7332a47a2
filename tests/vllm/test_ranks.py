"""Ranks with gloo between them, each of which loads the plugin through vLLM: all fuse their draft, or none does.

The draft model stands for one with collectives: one after its layers and one for the logits, checked against what the
other ranks issue as their same collective. A capture is vLLM's own choice of what to capture and its warm-up, which runs it.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import pkgutil
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from nsa_plugin import __version__
from nsa_plugin.adapters.vllm import agreement
from tests import ranks

TOKENS = 4
BATCHES = (([100, 107, 126, 65], [1, 0, 2, 2], 1), ([63, 64, 700], [0, 0, 0], 70), ([300], [1], 140))
"""Lengths, rejected tokens and first block; smaller ones are padded to the captured size of four."""
WAIT_SECONDS = 3.0
"""For the vote of a rank that has no plugin."""
FORWARD, LOGITS, PADDING = range(3)
"""Kinds of collectives: of the model's layers, of its logits, and vLLM's own agreement on padding across data parallel ranks."""
BUILDER_UPDATE = "vllm.v1.attention.ops.metadata.compute_token_to_req_indices"
STEP_UPDATE = "nsa_plugin.core.step_update.StepUpdate.run"
"""What updates metadata in the graph: for the builder, taken from vLLM while the plugin loads; and in one kernel for all."""

pytestmark = pytest.mark.skipif(
    not any(point.name == "nsa_plugin" for point in entry_points(group="vllm.general_plugins")),
    reason="nsa-plugin is not installed in this environment",
)


class Lines(logging.Filter):
    """Keeps what is logged. Not a handler: vLLM takes those off when it configures logging."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep it, and let it pass."""
        self.records.append(record)
        return True


class Rank:
    """One rank: its draft, and the sequence of collectives that it issues.

    Parameters
    ----------
    data_parallel : bool
        Whether ranks have batches of their own; else they share the tensors of one.
    """

    def __init__(self, rank: int, world: int, store: str, data_parallel: bool = False) -> None:
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.distributed import parallel_state
        from vllm.plugins import load_general_plugins
        from vllm.v1.worker.gpu import dp_utils

        self.rank, self.world, self.data_parallel, self.lines = rank, world, data_parallel, Lines()
        self.issued: list[tuple[int, int]] = []
        self.unmatched: list[Any] = []
        self.alone = False
        logging.getLogger("vllm.plugins.nsa_plugin").addFilter(self.lines)
        load_general_plugins()
        load_general_plugins()
        parallel_state.init_distributed_environment(world, rank, store, rank, "gloo")
        config = VllmConfig()
        config.parallel_config.data_parallel_size = world if data_parallel else 1
        config.parallel_config.data_parallel_rank = rank if data_parallel else 0
        with set_current_vllm_config(config):
            parallel_state.ensure_model_parallel_initialized(1 if data_parallel else world, 1)
        agree = dp_utils.sync_cudagraph_and_dp_padding

        @functools.wraps(agree)
        def padding(*arguments: Any, **named: Any) -> Any:
            self.collective(PADDING, 0)
            return agree(*arguments, **named)

        dp_utils.sync_cudagraph_and_dp_padding = padding

    def collective(self, kind: int, size: int) -> None:
        """Issue one, unless alone; every rank's must be the same."""
        import torch
        import torch.distributed as dist

        self.issued.append((kind, size))
        if self.alone:
            return
        mine = torch.tensor([len(self.issued), kind, size])
        every = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(every, mine)
        if any(not torch.equal(other, mine) for other in every):
            self.unmatched.append([other.tolist() for other in every])

    def draft(self) -> Any:
        """A speculator whose model and graphs issue this rank's collectives."""
        import torch
        from vllm.config.compilation import CUDAGraphMode
        from vllm.forward_context import get_forward_context

        from nsa_plugin.testing import vllm_draft

        issue, world = self.collective, self.world if self.data_parallel else 1

        class Model(vllm_draft.DraftModel):
            """With collectives; writes nothing down for a batch without metadata."""

            def forward(self, input_ids: Any, positions: Any, hidden_states: Any, inputs_embeds: Any = None) -> Any:
                context = get_forward_context()
                assert (context.dp_metadata is not None) == (world > 1)
                tokens = hidden_states.shape[0]
                if context.dp_metadata is not None:  # ranks run unequal numbers, but know the same largest one
                    tokens = int(context.dp_metadata.num_tokens_across_dp_cpu.max())
                issue(FORWARD, tokens)
                if not context.attn_metadata:
                    return hidden_states.clone(), hidden_states.clone()
                return super().forward(input_ids, positions, hidden_states, inputs_embeds)

            def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
                issue(LOGITS, 0)  # of the rank's own requests under data parallelism: no size that must match
                return super().compute_logits(hidden)

        class Graphs(vllm_draft.Graphs):
            """Replays what vLLM's `capture` was given."""

            def capture(self, body: Any, *_: Any, **__: Any) -> None:
                """The warm-up of one captured size."""
                self._body = body
                self.run_fullgraph(None)

            def run_fullgraph(self, descriptor: Any) -> None:
                """The body, with the captured tensors."""
                size = vllm_draft.CAPTURED
                across = torch.full((world,), size, dtype=torch.int32) if world > 1 else None
                self._body(size, size, self._metadata, self._slots, across, CUDAGraphMode.NONE, TOKENS)

        made = vllm_draft.Draft("auto", 4, TOKENS)
        speculator = made.speculator
        speculator.model = made.model = Model()
        speculator.dp_size, speculator.dp_rank = world, self.rank if self.data_parallel else 0
        made.config.parallel_config.data_parallel_size = world
        made.config.parallel_config.data_parallel_rank = speculator.dp_rank
        speculator.decode_cudagraph_manager = Graphs(made)
        return made

    def capture(self, draft: Any) -> list[tuple[int, int]]:
        """Let vLLM capture; returns the collectives that this issued."""
        from vllm.config import set_current_vllm_config

        self.issued.clear()
        nothing = SimpleNamespace(use_breakable_cg=False, capture=lambda *_, **__: None)
        with (
            mock.patch.object(draft.speculator, "prefill_cudagraph_manager", nothing),
            set_current_vllm_config(draft.config),
        ):
            draft.speculator.capture()
        return list(self.issued)

    def rounds(self, draft: Any, idle: tuple[int, ...] = ()) -> dict[str, Any]:
        """Draft for every batch, or take part with a dummy one.

        Returns what each draft step saw, the collectives, those that did not match, and what was logged.
        """
        self.issued.clear()
        seen: list[Any] = []
        for lengths, rejected, first_block in BATCHES:
            if self.rank in idle:
                self.dummy(draft)
            else:
                steps = draft.propose(lengths, rejected, first_block)
                seen += [{name: value.tolist() for name, value in step.items()} for step in steps]
        return {
            "fused": draft.speculator.supports_decode_metadata_update, "seen": seen, "issued": list(self.issued),
            "unmatched": self.unmatched, "warnings": self.said(logging.WARNING), "errors": self.said(logging.ERROR),
        }  # fmt: skip

    def dummy(self, draft: Any) -> None:
        """As vLLM's runner does on a rank without requests."""
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.v1.worker.gpu.input_batch import InputBatch

        width = TOKENS + 1
        batch = InputBatch.make_dummy(1, width, draft.buffers, max_query_len=width, is_padding=True)
        state = [torch.zeros(16, dtype=dtype) for dtype in (torch.int64, torch.int32, torch.float32, torch.int64)]
        counts = torch.ones(1, dtype=torch.int32)
        with set_current_vllm_config(draft.config):
            draft.speculator.propose(
                batch, {}, {}, torch.zeros(width, 128).bfloat16(), None, counts, counts - 1, *state, dummy_run=True,
                skip_attn_for_dummy_run=True,
            )  # fmt: skip

    def said(self, level: int) -> list[str]:
        """What was logged at that level."""
        return [record.getMessage() for record in self.lines.records if record.levelno == level]


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
    from nsa_plugin.adapters.vllm.v2_staged import Staged

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


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[dict[str, Any]]]:
    """What every rank of every world returned; a world that hangs is killed, and fails."""
    found: dict[str, list[dict[str, Any]]] = ranks.script("tests.vllm.test_ranks", 400)
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
    line = "nsa-plugin: every rank drafts as vLLM does: nsa-plugin is absent, off or failing on rank 1 of 4"
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


class TestVote:
    """The vote itself, with a store in this process."""

    @pytest.fixture(autouse=True)
    def _two_ranks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch.distributed as dist

        self.store, self.rank = pkgutil.resolve_name("torch.distributed.HashStore")(), 0
        monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: self.store)
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(dist, "get_rank", lambda: self.rank)
        monkeypatch.setattr(agreement, "SECONDS", 0.0)

    def test_who_comes_late_takes_the_answer_that_is_there(self) -> None:
        answer = agreement.objection()
        assert answer == "nsa-plugin is absent, off or failing on rank 1 of 2"
        self.rank = 1
        assert agreement.objection() == answer

    def test_an_answer_ends_the_waiting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(agreement, "SECONDS", float("inf"))
        self.store.set(f"{agreement.KEY}/answer", "no")
        assert agreement.objection() == "no"

    @pytest.mark.parametrize(
        ("theirs", "answer"), [(__version__, ""), ("0.0.0", f"ranks have nsa-plugin 0.0.0 and {__version__}")]
    )
    def test_versions_must_be_equal(self, theirs: str, answer: str) -> None:
        self.store.set(f"{agreement.KEY}/1", theirs)
        assert agreement.objection() == answer

    def test_a_store_that_fails_is_an_objection(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch.distributed as dist

        monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: 1 / 0)
        assert agreement.objection() == "ranks can't agree (ZeroDivisionError: division by zero)"


def main() -> dict[str, Any]:
    """Start the worlds. Forks come from a process that has imported vLLM but computed nothing, and loaded no plugin."""
    from nsa_plugin.testing import vllm_draft  # noqa: F401
    from tests.vllm import test_ranks

    return {
        "absent": ranks.run("fork", 4, test_ranks.without_the_plugin_on_one, 120),
        "alone": ranks.run("fork", 2, test_ranks.each_for_itself, 90),
        "data parallel": ranks.run("fork", 2, test_ranks.data_parallel, 90),
        "verified": ranks.run("fork", 2, test_ranks.verified_on_one, 90),
        "spawn": ranks.run("spawn", 2, test_ranks.together, 150),
    }


if __name__ == "__main__":
    answer = main()
    sys.stdout.flush()
    print("\n" + json.dumps(answer))
