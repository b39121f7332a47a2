"""The conformance kit as pytest tests, one for each line of the adapter contract.

class TestMine(AdapterConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Engine:
        return MyEngine()
"""

from __future__ import annotations

import pytest

from nsa_plugin.testing.conformance import Conformance
from nsa_plugin.testing.engine import Engine, Skipped


class AdapterConformance:
    """Inherit from it and provide the fixture `engine`."""

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Engine:
        """The engine and its adapter, of scope "class"."""
        raise NotImplementedError(f"{cls.__name__} must have a fixture 'engine' that returns an Engine")

    @pytest.fixture(scope="class")
    @classmethod
    def conformance(cls, engine: Engine) -> Conformance:
        """The kit; its runs are shared by the tests of the class."""
        return Conformance(engine)

    def test_cases_cover_every_situation_of_the_engine(self, conformance: Conformance) -> None:
        """Of the test itself: a fixture that leaves something out proves nothing."""
        _require(conformance, "coverage")

    def test_probe_goes_by_capability_and_names_what_is_missing(self, conformance: Conformance) -> None:
        """Line 1."""
        _require(conformance, "probe")

    def test_install_is_complete_or_nothing_and_happens_once(self, conformance: Conformance) -> None:
        """Line 2."""
        _require(conformance, "install")

    def test_undo_restores_every_attribute_by_identity(self, conformance: Conformance) -> None:
        """Line 2."""
        _require(conformance, "undo")

    def test_the_ledger_names_what_is_replaced_and_why(self, conformance: Conformance) -> None:
        """Line 2."""
        _require(conformance, "ledger")

    def test_describe_takes_every_type_of_batch_and_copies_no_tensor(self, conformance: Conformance) -> None:
        """Line 3."""
        _require(conformance, "describe")

    def test_every_value_is_the_engines_own(self, conformance: Conformance) -> None:
        """Line 4."""
        _require(conformance, "faithful")

    def test_an_error_of_ours_never_reaches_the_engine(self, conformance: Conformance) -> None:
        """Line 5."""
        _require(conformance, "errors")

    def test_buffers_stay_where_they_are(self, conformance: Conformance) -> None:
        """Line 6."""
        _require(conformance, "addresses")

    def test_a_replay_allocates_nothing_and_does_not_sync(self, conformance: Conformance) -> None:
        """Line 6, on a GPU."""
        _require(conformance, "replays")

    def test_unknown_parameters_are_passed_on_and_said_to_be_untested(self, conformance: Conformance) -> None:
        """Line 7."""
        _require(conformance, "parameters")

    def test_off_is_off_from_the_moment_it_is_said(self, conformance: Conformance) -> None:
        """Line 8."""
        _require(conformance, "switch")

    def test_memory_is_flat_and_goes_with_what_it_belongs_to(self, conformance: Conformance) -> None:
        """Line 9."""
        _require(conformance, "memory")

    def test_register_never_raises_and_says_one_line(self, conformance: Conformance) -> None:
        """Line 10."""
        _require(conformance, "register")


def _require(conformance: Conformance, line: str) -> None:
    try:
        problems = conformance.problems(line)
    except Skipped as reason:
        pytest.skip(str(reason))
    assert not problems, f"{line}:\n" + "\n".join(problems)
