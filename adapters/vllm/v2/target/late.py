"""Runs at every batch of the target: metadata that is built when somebody asks for it, because the graph does without."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

ACCESSES = (
    "__getitem__", "__setitem__", "__delitem__", "__iter__", "__reversed__", "__len__", "__contains__", "__eq__", "__ne__",
    "__or__", "__ror__", "__ior__", "__repr__", "get", "setdefault", "pop", "popitem", "keys", "values", "items", "copy",
    "update", "clear",
)  # fmt: skip
"""Methods of a dictionary that look at what is in it."""


class LateMetadata(dict[str, Any]):
    """A dictionary of metadata by layer that is built by the first of `ACCESSES`.

    It is a `dict`, because an indexer layer takes anything else for a dummy run. With an `__iter__` of its own `dict(late)`
    and `{**late}` ask for the keys, too.

    Parameters
    ----------
    make : callable
        vLLM's own.
    """

    def __init__(self, make: Callable[[], Mapping[str, Any]]) -> None:
        super().__init__()
        self._make: Callable[[], Mapping[str, Any]] | None = make

    @property
    def built(self) -> bool:
        """Whether it was."""
        return self._make is None

    def build(self) -> None:
        """Build it, unless that was done."""
        make, self._make = self._make, None
        if make is not None:
            dict.update(self, make())


def _building(name: str) -> Callable[..., Any]:
    plain = getattr(dict, name)

    @functools.wraps(plain)
    def access(late: LateMetadata, *arguments: Any, **named: Any) -> Any:
        late.build()
        return plain(late, *arguments, **named)

    return access


for _name in ACCESSES:
    setattr(LateMetadata, _name, _building(_name))
