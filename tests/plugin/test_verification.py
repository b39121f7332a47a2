"""The one mechanism of verification: whose turn it is, what is repaired and reported, spare buffers."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from nsa_plugin.adapters.verification import Afterwards, SpareBuffers, Verification, moment, shadow, snapshot
from nsa_plugin.core.batch import BatchDescriptor, BlockTable, ForwardMode, Geometry, TokenTable
from nsa_plugin.host import Host

SLOTS = TokenTable(torch.zeros((1, 64), dtype=torch.int32), torch.zeros(1, dtype=torch.int64))
BATCH = BatchDescriptor(ForwardMode.DECODE, 1, torch.ones(1, dtype=torch.int64), SLOTS)
LABELS = ("toy", "draft decode", "share")


def verification(host: Host, every: int) -> Verification:
    return Verification(host.path("toy", "draft decode", logging.getLogger("toy")), "share", every)


@pytest.mark.parametrize("every", [1, 2, 5])
def test_the_first_replay_is_verified_and_then_one_in_n(every: int) -> None:
    host, seen = Host(), list[int]()
    replay = verification(host, every).after(lambda batch: None, seen.append)
    for number in range(2 * every + 1):
        replay(number)
    assert seen == [0, every, 2 * every]
    assert host.verifications[LABELS] == 3


def test_equal_values_are_neither_repaired_nor_reported() -> None:
    host, one = Host(), {"lengths": torch.ones(2)}
    never: Any = pytest.fail
    assert verification(host, 1).settle([(0, one, {"lengths": torch.ones(2)})], never, never)
    assert host.on and not host.mismatches


def test_a_difference_is_repaired_before_it_is_reported() -> None:
    host, order = Host(), list[str]()
    want, have = {"lengths": torch.ones(2)}, {"lengths": torch.zeros(2)}

    def described() -> Any:
        order.append("described")
        return BATCH, Geometry(8, 16, 64), None

    found = [(0, want, want), (2, want, have)]
    assert not verification(host, 1).settle(found, lambda: order.append("repaired"), described)
    assert order == ["repaired", "described"]
    assert host.mismatches == {(*LABELS, "lengths"): 1} and not host.on


def test_spare_buffers_grow_where_they_are_shared() -> None:
    spares = SpareBuffers()
    small, large = torch.arange(6).view(2, 3), torch.arange(12).view(4, 3)
    first = spares.shared("table", large)
    second = spares.shared("table", small)
    assert second.data_ptr() == first.data_ptr() != large.data_ptr() and second.shape == small.shape
    own = spares.own(small.t())
    assert own.is_contiguous() and torch.equal(own, small.t())
    assert spares.size == 12 * 8 + 6 * 8
    assert spares.shared("table", torch.zeros(5, 3)).data_ptr() != first.data_ptr()


def test_a_shadow_writes_into_what_it_was_given() -> None:
    class Builder:
        def __init__(self) -> None:
            self.rows, self.size = torch.zeros(2), 2

        def build(self) -> None:
            self.rows.fill_(self.size)

    original = Builder()
    spare = torch.zeros(2)
    shadow(original, rows=spare).build()
    assert torch.equal(spare, torch.full((2,), 2.0)) and not original.rows.any()


def test_a_path_is_verified_as_the_setting_says_or_not_at_all() -> None:
    assert [moment("auto", *can) for can in (("before", "graph"), ("graph",))] == ["before", "graph"]
    assert [moment("graph", *can) for can in (("before", "graph"), ("before",))] == ["graph", None]
    assert [moment("before", *can) for can in (("before", "graph"), ("graph",))] == ["before", None]


def test_a_difference_that_was_used_is_reported_as_such(caplog: pytest.LogCaptureFixture) -> None:
    host, afterwards = Host(), Afterwards(SpareBuffers())
    found = [(0, {"lengths": torch.ones(2)}, {"lengths": torch.zeros(2)})]
    checks = verification(host, 1)

    def check() -> None:
        checks.settle(found, None, lambda: (BATCH, Geometry(8, 16, 64), None))

    afterwards.wait(check)
    assert host.on
    for _ in range(2):
        afterwards.settle()
        assert not host.on and host.mismatches == {(*LABELS, "lengths"): 1}
    assert "from the next batch on: this one was computed with the others" in caplog.text


@pytest.mark.parametrize("unit", [0, 64])
def test_a_snapshot_stays_when_the_batch_is_overwritten(unit: int) -> None:
    table, lengths = torch.arange(512, dtype=torch.int32).view(2, 256), torch.tensor([3, 65])
    rows = torch.tensor([1, 0])
    slots = BlockTable(table, unit) if unit else TokenTable(table, rows)
    batch = BatchDescriptor(ForwardMode.TARGET_VERIFY, 2, lengths, slots, draft_tokens=2)
    kept = snapshot(batch, Geometry(256, 64, 2048))
    before = batch.slots.lookup(2, 67).clone()
    for tensor in (table, lengths, rows):
        tensor.zero_()
    assert torch.equal(kept.slots.lookup(2, 67), before) and kept.seq_lens.tolist() == [3, 65]
    assert kept.slots.width() == 128
