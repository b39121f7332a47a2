"""The demo finds a planted difference, reads and refuses traces, and the command line says what is wrong."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_plugin.cli import main
from nsa_plugin.core import reference
from nsa_plugin.core.metadata import PrecomputedMetadata, live_entries
from nsa_plugin.demo.embedded import Harness, describe
from nsa_plugin.demo.run import INDEX_TOPK, _live_values
from nsa_plugin.trace import Round, Sizes, SlotTable, generate, load, save, sizes_of

COMPARED = (
    "cache_seqlens", "cu_seqlens_k", "nsa_cache_seqlens", "nsa_cu_seqlens_k", "page_table_1", "real_page_table",
)  # fmt: skip
RECORDED = Path(__file__).parents[2] / "examples" / "traces" / "sglang_h100.jsonl"


def test_demo_is_green(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--rounds", "30", "--steps", "2", "4"]) == 0
    out = capsys.readouterr().out
    assert "Every live value of every round is equal." in out
    assert out.index("values compared") < out.index("Every live value") < out.index("What these times mean")
    for operation in ("cumsum", "top-k lengths", "page lookup", "table transform", "concatenation"):
        assert operation in out


def test_demo_counts_what_it_compares_and_what_runs() -> None:
    sizes = Sizes()
    entries = list(generate(12, 4, sizes))
    slots, compared = SlotTable(sizes, torch.device("cpu")), 0
    harness = Harness(sizes, INDEX_TOPK, 4, slots.table)
    for entry in entries:
        slots.advance(entry)
        harness.run(entry)
        batch = describe(entry, slots.table, 3)
        made = PrecomputedMetadata((harness._buffers["share", batch.batch_size][0],), batch, harness._geometry)
        entire = live_entries(made, made.steps[0], 0, COMPARED)
        compared += sum(int((values >= 0).sum()) for values in entire.values())
    assert sum(_live_values(entry, sizes.page_size) for entry in entries) == compared > 0
    more = Harness(sizes, INDEX_TOPK, 8, slots.table)
    more.run(entries[-1])
    first, copy, share = harness.contenders
    assert harness.operations[share] == more.operations[share] > 0, "once, for any number of steps"
    assert harness.operations[first] * 7 == more.operations[first] * 3 > 0
    assert harness.operations[share] < harness.operations[copy] < more.operations[copy]


@pytest.mark.skipif(torch.cuda.is_available(), reason="plants the error in the reference, which a GPU does not use")
def test_demo_exits_1_on_a_single_wrong_value(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = reference.precompute

    def wrong(batch: object, out: PrecomputedMetadata, *rest: Any) -> None:
        right(batch, out, *rest)  # type: ignore[arg-type]
        out.steps[0].real_page_table[0, 0] += 1

    monkeypatch.setattr(reference, "precompute", wrong)
    assert main(["demo", "--rounds", "5", "--steps", "4"]) == 1
    assert "share, draft step 0: real_page_table" in capsys.readouterr().out


def test_traces_have_joins_leaves_padding_growth_and_empty_rounds() -> None:
    sizes = Sizes()
    rounds = list(generate(400, 4, sizes, seed=1))
    assert {len(entry.seq_lens) for entry in rounds} == set(sizes.captured)
    assert any(entry.live < len(entry.seq_lens) for entry in rounds)
    sets = [set(entry.requests[: entry.live]) for entry in rounds]
    assert any(after - before for before, after in itertools.pairwise(sets))
    assert any(before - after for before, after in itertools.pairwise(sets))
    assert all(1 <= length <= sizes.width for entry in rounds for length in entry.seq_lens)
    assert any(entry.live == 0 for seed in range(5) for entry in generate(5, 4, sizes, seed))


def test_no_two_live_requests_share_a_page() -> None:
    sizes = Sizes()
    slots = SlotTable(sizes, torch.device("cpu"))
    for entry in generate(100, 4, sizes):
        slots.advance(entry)
        used = [
            slots.table[request, :length]
            for request, length in zip(entry.requests[: entry.live], entry.seq_lens, strict=False)
        ]
        if used:
            together = torch.cat(used)
            assert len(set(together.tolist())) == together.numel()


def test_a_recorded_trace_is_replayed(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rounds = list(generate(20, 4, Sizes()))
    save(path, rounds)
    assert load(path) == rounds
    assert main(["demo", "--trace", str(path), "--steps", "4"]) == 0
    assert main(["demo", "--trace", str(RECORDED), "--steps", "4"]) == 0


@pytest.mark.parametrize(("path", "added_tokens"), [("draft decode", 0), ("target verify", 5), ("draft extend", 0)])
def test_the_trace_of_a_real_engine_has_every_page_of_every_live_request(path: str, added_tokens: int) -> None:
    rounds = load(RECORDED, path)
    assert len(rounds) > 150 and any(entry.live < len(entry.seq_lens) for entry in rounds)
    held: dict[int, list[int]] = {}
    for entry in rounds:
        for request, (at, new) in entry.pages.items():
            held[request] = [*held.get(request, [])[:at], *new]
        owners = [page for request in entry.requests[: entry.live] for page in held[request]]
        assert len(set(owners)) == len(owners)
        for request, length in zip(entry.requests[: entry.live], entry.seq_lens, strict=False):
            assert len(held[request]) == -(-(length + added_tokens) // 64)


def test_recorded_pages_are_used_as_they_were_recorded() -> None:
    rounds = [
        Round((70, 1), (2, 0), 1, pages={2: (0, (9, 4))}),
        Round((71, 1), (2, 0), 1),
        Round((130, 1), (2, 0), 1, pages={2: (1, (5, 6))}),
    ]
    slots = SlotTable(sizes_of(rounds), torch.device("cpu"))
    pages = []
    for entry in rounds:
        slots.advance(entry)
        pages.append((slots.table[2, : entry.seq_lens[0] : 64] // 64).tolist())
    assert pages == [[9, 4], [9, 4], [9, 5, 6]]
    assert slots.table[2, 65] == 5 * 64 + 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: expected an object with seq_lens"),
        ('{"seq_lens": [1, 2, 3], "req_pool_indices": [1, 2], "live": 3}', "as many lengths as requests"),
        ('{"seq_lens": [1], "req_pool_indices": [1], "live": 2}', "no more that are live"),
        ('{"seq_lens": [-1], "req_pool_indices": [1], "live": 1}', "lengths of 0 to 1048576"),
        ('{"seq_lens": [90], "req_pool_indices": [99999], "live": 1}', "requests of 0 to 65536"),
        ('{"path": "target verify", "seq_lens": [9], "req_pool_indices": [1], "live": 1}', "rounds of draft decode"),
    ],
)
def test_a_bad_trace_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line)
    assert main(["demo", "--trace", str(path), "--steps", "4"]) == 2
    assert message in capsys.readouterr().err
    assert main(["demo", "--trace", str(tmp_path / "absent")]) == 2


@pytest.mark.parametrize(
    "arguments", [["demo", "--rounds", "0"], ["demo", "--steps", "1"], ["demo", "--engine", "trt"], []]
)
def test_bad_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "expected" in capsys.readouterr().err or arguments in ([], ["demo", "--engine", "trt"])


def test_plugins_lists_the_built_in_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins"]) == 0
    assert "nsa_plugin_adapters" in capsys.readouterr().out
