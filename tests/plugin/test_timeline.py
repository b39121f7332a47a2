"""The picture of one round is what its script draws from the committed results, and says what they say."""

from __future__ import annotations

import copy
import json
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import timeline

NAMES = ("end_to_end_sglang_h100.json", "end_to_end_sglang_61_layers_h100.json")
Results = dict[str, Any]


@pytest.fixture
def results(pytestconfig: pytest.Config) -> list[Results]:
    """Of the small and of the large model."""
    return [json.loads(next(pytestconfig.rootpath.glob(f"*/results/{name}")).read_text()) for name in NAMES]


def test_the_committed_picture_is_drawn_from_the_committed_results(
    pytestconfig: pytest.Config, results: list[Results]
) -> None:
    assert (pytestconfig.rootpath / "docs/images/timeline.svg").read_text() == timeline.draw(*results)


@pytest.mark.parametrize("variant", timeline.VARIANTS)
@pytest.mark.parametrize("model", [0, 1])
def test_a_round_is_what_was_measured(results: list[Results], model: int, variant: str) -> None:
    cell = {"steps": timeline.STEPS, "prompt": timeline.PROMPT, "batch": timeline.BATCH}
    (seen,) = (one["variants"][variant] for one in results[model]["cells"] if cell.items() <= one.items())
    drawn = timeline.read(results[model], variant)
    assert drawn.busy == pytest.approx(seen["round us"]["median"] / 1000)
    twice = 2 * seen["verify and extend metadata us"]["median"]
    assert drawn.metadata == pytest.approx((seen["draft metadata us"]["median"] + twice) / 1000)
    assert drawn.total == seen["round_us_median"] / 1000
    assert all(length > 0 for *_, length in drawn.host) and drawn.busy <= drawn.total and drawn.gpu <= drawn.total


def test_the_headings_are_true(results: list[Results]) -> None:
    small, large = ([timeline.read(one, variant) for variant in timeline.VARIANTS] for one in results)
    assert all(one.busy > one.gpu for one in small) and small[1].total < small[0].total
    assert all(one.busy < one.gpu for one in large) and large[1].busy < large[0].busy
    assert large[1].total == pytest.approx(large[0].total, rel=0.01)


def test_no_bar_leaves_the_picture(results: list[Results]) -> None:
    picture = ElementTree.fromstring(timeline.draw(*results))
    width, height = (float(picture.attrib[side]) for side in ("width", "height"))
    for bar in picture.findall("{*}rect")[1:]:
        x, y, w, h = (float(bar.attrib[side]) for side in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height


def test_results_without_the_cell_are_refused(results: list[Results]) -> None:
    other = copy.deepcopy(results[0])
    other["cells"] = [cell for cell in other["cells"] if cell["batch"] != timeline.BATCH]
    with pytest.raises(LookupError, match="expected a cell"):
        timeline.draw(other, results[1])
