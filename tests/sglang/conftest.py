"""Fixtures over the real sglang. Without it these tests are not collected."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import pytest

from nsa_plugin.adapters.sglang.adapter import SglangAdapter
from nsa_plugin.host import Host
from nsa_plugin.settings import Settings
from nsa_plugin.testing import sglang_backends

if importlib.util.find_spec("sglang") is None:
    collect_ignore_glob = ["test_*.py"]

Install = Callable[..., tuple[Host, SglangAdapter]]


@pytest.fixture(autouse=True)
def _stand_ins() -> Iterator[None]:
    with sglang_backends.stand_ins():
        yield


@pytest.fixture
def install() -> Iterator[Install]:
    """Installs the adapter with a strategy and any plugins; undoes it after the test."""
    adapters: list[SglangAdapter] = []

    def install(strategy: str, *plugins: object) -> tuple[Host, SglangAdapter]:
        host = Host(Settings(strategy=strategy))
        for plugin in plugins:
            host.manager.register(plugin)
        adapter = host.manager.adapter("sglang")
        assert isinstance(adapter, SglangAdapter)
        adapters.append(adapter)
        assert adapter.install(host) == []
        return host, adapter

    yield install
    for adapter in adapters:
        adapter.undo()
