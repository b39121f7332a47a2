"""State that belongs to an object of the engine, for as long as that lives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar
from weakref import WeakSet

Value = TypeVar("Value")


class Attached(Generic[Value]):
    """A mapping from owners, compared by identity, to values that live and die with them.

    The values are attributes of their owners. In a `WeakKeyDictionary` a value that refers to its own key would keep
    both alive for ever. A copy of an owner, which takes its attributes along, is not an owner.

    Parameters
    ----------
    name : str
        What the values are, for the name of the attribute.
    """

    def __init__(self, name: str) -> None:
        self._name = f"_nsa_plugin_{name}"
        self._owners: WeakSet[Any] = WeakSet()

    def get(self, owner: Any) -> Value | None:
        """The owner's value, if it has one."""
        value: Value | None = vars(owner).get(self._name) if owner in self._owners else None
        return value

    def setdefault(self, owner: Any, default: Value) -> Value:
        """The owner's value; `default` becomes it if there is none."""
        if owner not in self._owners:
            self._owners.add(owner)
            setattr(owner, self._name, default)
        value: Value = vars(owner)[self._name]
        return value

    def values(self) -> Iterator[Value]:
        """The values of all owners that are alive."""
        for owner in tuple(self._owners):
            yield vars(owner)[self._name]

    def clear(self) -> None:
        """Take the values off their owners."""
        for owner in tuple(self._owners):
            delattr(owner, self._name)
        self._owners.clear()
