"""The picture and the table of what the plugin is worth say what the committed results say."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import curve
from benchmarks.end_to_end.report import BASELINE
from benchmarks.measured import RESULTS


def test_the_committed_picture_is_drawn_from_the_committed_results(pytestconfig: pytest.Config) -> None:
    assert (pytestconfig.rootpath / "docs/images/worth.svg").read_text() == curve.draw()


def test_every_cell_with_a_round_time_is_a_point() -> None:
    """Counted again from the files, without the code that makes the points."""
    expected = []
    for path in map(Path, sorted(RESULTS.glob("end_to_end_*_layers_*.json"))):
        for cell in json.loads(path.read_text())["cells"]:
            shipped, plugin = cell["variants"].get(BASELINE), cell["variants"].get("auto")
            if shipped and plugin and shipped["round_us_median"]:
                logs = map(math.log, plugin["tokens_per_s_all"]), map(math.log, shipped["tokens_per_s_all"])
                ratio = statistics.fmean(a - b for a, b in zip(*logs, strict=False))
                expected.append((round(shipped["round_us_median"] / 1e3, 6), round(100 * math.expm1(ratio), 6)))
    assert expected
    assert sorted(expected) == sorted((round(one.round_ms, 6), round(one.gain[0], 6)) for one in curve.points())


def test_a_gain_is_claimed_only_where_the_interval_leaves_out_0() -> None:
    rows = curve.table().splitlines()[4:]
    for one, row in zip(curve.points(), rows, strict=True):
        for gain, said in zip((one.gain, one.rounds), row.split(" | ")[8:10], strict=True):
            if gain is None:
                assert said == "–"
            elif not one.enough:
                assert "too few for an interval" in said
            else:
                assert gain[1] <= gain[0] <= gain[2]
                assert ("no difference seen" in said) == (gain[1] <= 0 <= gain[2])


def test_nothing_leaves_the_picture() -> None:
    picture = ElementTree.fromstring(curve.draw())
    width, height = (float(picture.attrib[side]) for side in ("width", "height"))
    circles = picture.findall("{*}circle")
    assert len(circles) == len(curve.points())
    for mark in circles:
        assert 0 < float(mark.attrib["cx"]) < width and 0 < float(mark.attrib["cy"]) < height
    for line in picture.findall("{*}line"):
        assert all(0 <= float(line.attrib[key]) <= width for key in ("x1", "x2"))
        assert all(0 <= float(line.attrib[key]) <= height for key in ("y1", "y2"))
