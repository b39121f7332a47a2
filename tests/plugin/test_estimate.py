"""`nsa-plugin estimate`: held-back measurements lie in its intervals, and it says so where there is nothing to gain."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.measured import FILE, measured
from nsa_plugin import cli
from nsa_plugin.core.errors import InvalidValueError
from nsa_plugin.estimate import metrics
from nsa_plugin.estimate.model import Measured, Round, interpolated, round_of

MEASURED = Measured.load()
WIDTH = 163840
SGLANG = """# HELP sglang:spec_accept_length Mean acceptance length
sglang:spec_accept_length{model_name="a b",tp_rank="0"} 2.5
sglang:inter_token_latency_seconds_sum{model_name="m"} 8.0
sglang:inter_token_latency_seconds_bucket{le="0.01",model_name="m"} 900.0
sglang:inter_token_latency_seconds_count{model_name="m"} 1000.0
"""
VLLM = """vllm:inter_token_latency_seconds_sum{engine="0"} 6.0
vllm:inter_token_latency_seconds_sum{engine="1"} 6.0
vllm:inter_token_latency_seconds_count{engine="0"} 500.0
vllm:inter_token_latency_seconds_count{engine="1"} 500.0
vllm:spec_decode_num_drafts_total{engine="0"} 400.0
vllm:spec_decode_num_accepted_tokens_total{engine="0"} 800.0
"""


def a_round(engine: str = "sglang", round_ms: float = 18.1, host_ms: float | None = 5.9, **other: int) -> Round:
    """A round of sglang's 61-layer model, unless said otherwise."""
    return Round(engine, round_ms, host_ms, **{"steps": 4, "context": 1024, "batch": 1, "width": WIDTH, **other})


def run(*words: str) -> int:
    """The exit status."""
    return cli.main(["estimate", *words])


def test_the_packaged_measurements_are_those_of_the_committed_results() -> None:
    assert FILE.read_text() == measured(), "run make tables"


def test_held_back_cells_lie_in_the_interval() -> None:
    inside = []
    for cell in MEASURED.cells:
        low, _, high = MEASURED.without(cell).estimate(round_of(cell)).gain
        inside.append(low <= math.expm1(cell["log_ratio"]) <= high)
    assert len(inside) >= 20 and sum(inside) >= 0.9 * len(inside)


def test_intervals_are_no_wider_than_the_measurements_differ() -> None:
    """An interval that has everything in it would pass the test above."""
    low, mid, high = MEASURED.estimate(a_round()).gain
    assert mid is not None and high - low < 0.06
    low, mid, high = MEASURED.estimate(a_round(round_ms=7.3, host_ms=6.4, steps=8)).gain
    assert mid is not None and 0.1 < low < mid < high < 1


def test_nothing_to_gain_with_61_layers() -> None:
    found = MEASURED.estimate(a_round())
    assert found.nothing and found.bound.high == 0 and found.host.mid > 1


@pytest.mark.parametrize(
    ("engine", "round_ms", "host_ms", "steps", "least"),
    [("sglang", 6.66, 5.82, 4, 0.2), ("sglang", 7.33, 6.46, 8, 0.4), ("vllm", 5.81, 5.38, 3, 0.6)],
)
def test_two_layers_gain_from_host_time(engine: str, round_ms: float, host_ms: float, steps: int, least: float) -> None:
    found = MEASURED.estimate(a_round(engine, round_ms, host_ms, steps=steps))
    assert found.bound.low == 1 and not found.nothing
    assert found.gain[1] is not None and found.gain[1] > least


def test_a_stale_schedule_counts_in_a_round_that_the_gpu_bounds() -> None:
    long = MEASURED.estimate(a_round(context=131072))
    assert long.schedule.mid == pytest.approx(3 * (293.8 - 6.2) / 1e3)
    assert not long.nothing and long.gain[0] > 0.02
    assert MEASURED.schedule(a_round(context=131072, steps=3)) == (0, 0, 0)
    assert MEASURED.schedule(a_round("vllm", context=131072)) == (0, 0, 0)


def test_with_more_requests_than_measured_a_fresh_schedule_takes_longer() -> None:
    found = [MEASURED.schedule(a_round(context=131072, batch=batch)).mid for batch in (1, 8, 16, 32, 128)]
    assert found == sorted(found, reverse=True) and found[-1] == 0


def test_wide_page_tables_count_by_batch_and_width() -> None:
    saved = [
        MEASURED.page_tables(a_round(context=131072, batch=batch, width=width)).mid
        for batch, width in ((1, WIDTH), (32, WIDTH), (128, WIDTH), (128, 1 << 20))
    ]
    assert saved == sorted(saved) and saved[-1] > 4
    assert MEASURED.page_tables(a_round(batch=128, width=1 << 21)).low == 0, "wider than measured"
    assert MEASURED.page_tables(a_round("vllm", batch=128)) == (0, 0, 0)


def test_between_measured_points_the_value_is_linear_and_beyond_the_nearest() -> None:
    points: dict[tuple[float, ...], float] = {(1.0, 1.0): 2.0, (3.0, 1.0): 6.0, (3.0, 5.0): 10.0}
    assert interpolated(points, (1, 1)) == (2, 2, 2)
    assert interpolated(points, (2, 1)) == (2, 4, 6)
    assert interpolated(points, (3, 2)) == (6, 7, 10)
    assert interpolated(points, (9, 1)) == (0, 6, 6)


def test_a_host_time_that_is_not_known_gives_a_range() -> None:
    low, mid, high = MEASURED.estimate(a_round(host_ms=None)).gain
    assert mid is None and low <= 0 and high > 0.2


def test_the_round_of_the_metrics() -> None:
    assert metrics.round_ms(SGLANG, "sglang") == pytest.approx(8 * 2.5)
    assert metrics.round_ms(VLLM, "vllm") == pytest.approx(12), "its tokens of a round come together"


@pytest.mark.parametrize(
    ("text", "engine", "says"),
    [
        ("", "sglang", "inter_token_latency_seconds_sum .* --enable-metrics"),
        (SGLANG, "vllm", "vllm:inter_token_latency_seconds_sum"),
        (SGLANG.replace("_length{", "_lengths{"), "sglang", "spec_accept_length of at least 1"),
        (SGLANG.replace("} 2.5", "} NaN"), "sglang", "spec_accept_length of at least 1"),
        (SGLANG.replace("} 1000.0", "} 0.0"), "sglang", "_count above 0"),
        (VLLM.replace("} 6.0", "} x"), "vllm", "_sum and _count above 0"),
    ],
)
def test_metrics_without_a_round_time_are_refused(text: str, engine: str, says: str) -> None:
    with pytest.raises(InvalidValueError, match=rf"metrics: expected .*{says}"):
        metrics.round_ms(text, engine)


@pytest.mark.parametrize("source", ["", "/absent/file", "a\0b", "http://[x", "http://a b/", "http://127.0.0.1:1/"])
def test_metrics_that_can_not_be_read_are_refused(source: str) -> None:
    with pytest.raises(InvalidValueError, match="a URL of an engine's /metrics, or a file"):
        metrics.read(source)


def test_the_command_says_where_there_is_nothing_to_gain(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--engine", "sglang", "--round-ms", "18.1", "--host-ms", "5.9") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Nothing to gain: " in said and "STEP_LENGTHS=exact, accepted tokens with 4 steps: +1.5 %" in said
    assert run("--engine", "vllm", "--round-ms", "5.8", "--host-ms", "5.4", "--steps", "3") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Expect +" in said and "95 % interval" in said and "exact" not in said


def test_the_command_reads_metrics_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics").write_text(SGLANG)
    assert run("--engine", "sglang", "--metrics", str(tmp_path / "metrics")) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "rounds of 20 ms, host busy in it: unknown" in said and "Give --host-ms" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--round-ms", "5", "--host-ms", "6"), "host-ms: expected at most the round's 5, got 6"),
        (("--round-ms", "0.5", "--host-ms", "0.1", "--context", "131072"), "round-ms: expected more than the 0.86 ms"),
        (("--metrics", "/absent/file"), "metrics: expected a URL"),
    ],
)
def test_what_can_not_be_is_refused(words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--engine", "sglang", *words) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [("--round-ms", "5", "--metrics", "x"), (), ("--round-ms", "0"), ("--round-ms", "nan")]
)
def test_words_that_do_not_fit_are_refused(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("--engine", "sglang", *words)
    assert stop.value.code == 2 and "nsa-plugin estimate: error" in capsys.readouterr().err
