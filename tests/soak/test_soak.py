"""A short soak, and proof that the long one would notice."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import soak
from nsa_plugin import ForwardMode, PrecomputedMetadata
from nsa_plugin.trace import Round, Sizes

SIZES = Sizes(width=128, max_requests=5, captured=(1, 2, 4))


def test_some_thousand_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    result = soak.soak(soak.core_subjects(SIZES), 4000, SIZES, seed=1, compared=200)
    assert result["ok"], result
    assert result["verified"] >= 230


class Faulty(soak.Core):
    """Right, but something grows, moves or is wrong at one replay."""

    def __init__(self, fault: str) -> None:
        super().__init__(ForwardMode.DECODE, "share", (), SIZES)
        self.fault, self.calls = fault, 0
        self.kept: list[Any] = []

    def replay(self, entry: Round) -> None:
        super().replay(entry)
        self.calls += 1
        plan, static, consumers, graph = self.plans[len(entry.seq_lens)]
        if self.fault == "objects":
            self.kept += [[], []]
        elif self.fault == "bytes":
            self.kept.append(b"\1" * (1 << 17))  # more in all than earlier tests can have left free
        elif self.calls == FAULT and self.fault == "value":
            consumers[0].cu_seqlens_k[-1] += 1
        elif self.calls == FAULT:
            other = PrecomputedMetadata.allocate(static, self.geometry).steps[0]
            self.plans[len(entry.seq_lens)] = (plan, static, [other] * len(consumers), graph)


FAULT = 1500


@pytest.mark.parametrize(
    ("fault", "found"),
    [("objects", "python_objects"), ("bytes", "host_mib"), ("value", "differences"), ("address", "address_changes")],
)
def test_it_notices(fault: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "EVERY", FAULT - 1)  # so that the faulty replay is looked at
    result = soak.soak([Faulty(fault)], 3000, SIZES, seed=1, compared=0)
    assert not result["ok"]
    assert result.get(found) or result["growth_after_warm_up"].get(found, 0) > 0
