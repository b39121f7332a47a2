"""What the probe says of an engine: parameters of hooked functions that no tested release has."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_plugin.adapters.probe import Need, missing, untested, warn_of_untested

PATH = f"{__name__}.hooked"
NEED = Need(PATH, ("batch",), "prepare", hooked=True, known=("in_capture",))


def hooked(self: Any, batch: Any) -> None:
    """Stands for a function of an engine."""


def of_release(signature: str) -> Any:
    """`hooked` as a release has it."""
    namespace: dict[str, Callable[..., None]] = {}
    exec(f"def hooked({signature}): ...", namespace)
    return mock.patch(PATH, namespace["hooked"])


@pytest.mark.parametrize(
    ("signature", "new"),
    [
        ("self, batch", ""),
        ("self, batch, in_capture=False", ""),
        ("self, batch, *arguments, **keywords", ""),
        ("self, batch, stream=None", "stream"),
        ("self, stream, batch, *, in_capture=False, rank=0", "stream, rank"),
    ],
)
def test_new_parameters_are_untested_and_nothing_else_is(
    signature: str, new: str, caplog: pytest.LogCaptureFixture
) -> None:
    with of_release(signature):
        assert missing((NEED,)) == []
        lines = untested((NEED,))
        warn_of_untested(logging.getLogger("toy"), (NEED,))
    said = f"{PATH} has parameters that no tested release has: {new}; they are passed on"
    assert lines == ([said] if new else [])
    assert [record.getMessage() for record in caplog.records] == ([f"nsa-plugin: untested: {said}"] if new else [])


@given(new=st.sets(st.sampled_from(("stream", "rank", "layer")), min_size=1))
def test_whatever_is_not_known_is_named(new: set[str]) -> None:
    with of_release(", ".join(("self", "batch", *sorted(new)))):
        (line,) = untested((NEED,))
        assert f"has: {', '.join(sorted(new))};" in line
        assert untested((Need(PATH, ("batch",), "read"),)) == [], "it is not hooked"
        assert untested((Need(PATH, ("batch",), "prepare", hooked=True, known=tuple(new)),)) == []


def test_what_is_not_there_is_missing_not_untested() -> None:
    gone = Need(f"{__name__}.no_such_function", ("batch",), "prepare", hooked=True)
    assert untested((gone,)) == [] and len(missing((gone,))) == 1
