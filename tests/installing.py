"""Installs an engine's adapter for a test, and undoes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from nsa_plugin.adapters.base import Adapter
from nsa_plugin.host import Host
from nsa_plugin.settings import Settings

Kind = TypeVar("Kind", bound=Adapter)


def installer(kind: type[Kind]) -> Iterator[Callable[..., tuple[Host, Kind]]]:
    """The body of a fixture: yields `install(strategy="auto", *plugins, on=True, **settings)`, undoes its adapters afterwards."""
    adapters: list[Kind] = []

    def install(strategy: str = "auto", *plugins: object, on: bool = True, **settings: Any) -> tuple[Host, Kind]:
        host = Host(Settings(strategy=strategy, **settings))
        if not on:
            host.switch(False, "test")
        for plugin in plugins:
            host.manager.register(plugin)
        adapter = host.manager.adapter(kind.name)
        assert isinstance(adapter, kind)
        adapters.append(adapter)
        assert adapter.install(host) == []
        return host, adapter

    yield install
    for adapter in adapters:
        adapter.undo()
