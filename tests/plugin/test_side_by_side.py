"""Refreshes as one call, where no CUDA graph is captured; tests/gpu has the other case."""

from __future__ import annotations

from nsa_plugin.adapters.side_by_side import side_by_side


def test_each_refresh_is_called_once_and_in_turn() -> None:
    seen: list[int] = []
    derive = side_by_side([lambda number=number: seen.append(number) for number in range(3)])  # type: ignore[misc]
    assert derive is not None
    derive()
    assert seen == [0, 1, 2]


def test_none_and_one_need_no_other_function() -> None:
    def refresh() -> None:
        pass

    assert side_by_side([]) is None
    assert side_by_side([refresh]) is refresh
