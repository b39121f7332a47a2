"""At capture and at every replay: values that adapters attach to objects of the engine, and that go with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar
from weakref import ref

Value = TypeVar("Value")


class Attached(Generic[Value]):
    """A mapping from owners, compared by identity, to values that live as long as their owners.

    Each value is an attribute of its owner. A `WeakKeyDictionary` would keep an owner alive for ever if its value refers to
    it. A copy of an owner takes the attributes along, but is not an owner. One thread may iterate while another adds.

    Parameters
    ----------
    name : str
        Names the attribute: "prepared" becomes `_nsa_plugin_prepared`.
    """

    def __init__(self, name: str) -> None:
        self._name = f"_nsa_plugin_{name}"
        self._owners: dict[int, ref[Any]] = {}

    def get(self, owner: Any) -> Value | None:
        """The owner's value, if it has one."""
        value: Value | None = vars(owner).get(self._name) if self._owns(owner) else None
        return value

    def setdefault(self, owner: Any, default: Value) -> Value:
        """The owner's value. An owner without one gets `default`."""
        if not self._owns(owner):
            setattr(owner, self._name, default)
            number = id(owner)
            self._owners[number] = ref(owner, lambda dead: self._forget(number, dead))
        value: Value = vars(owner)[self._name]
        return value

    def set(self, owner: Any, value: Value) -> Value:
        """Give the owner this value in place of the one it may have; returns it."""
        self.setdefault(owner, value)
        setattr(owner, self._name, value)
        return value

    def values(self) -> Iterator[Value]:
        """The values of the owners that are alive."""
        for _, value in self.items():
            yield value

    def items(self) -> Iterator[tuple[Any, Value]]:
        """The owners that are alive, with their values."""
        for owner in self._alive():
            yield owner, vars(owner)[self._name]

    def clear(self) -> None:
        """Take the values off their owners."""
        for owner in self._alive():
            delattr(owner, self._name)
        self._owners.clear()

    def _owns(self, owner: Any) -> bool:
        known = self._owners.get(id(owner))
        return known is not None and known() is owner

    def _alive(self) -> list[Any]:
        return [owner for known in tuple(self._owners.values()) if (owner := known()) is not None]

    def _forget(self, number: int, dead: ref[Any]) -> None:
        if self._owners.get(number) is dead:
            del self._owners[number]
