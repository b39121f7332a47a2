"""Fixtures over the real sglang. Without it these tests are not collected."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import pytest

from nsa_plugin.adapters.sglang.adapter import SglangAdapter
from nsa_plugin.host import Host
from nsa_plugin.rigs.sglang import backends as sglang_backends
from tests.installing import installer

if importlib.util.find_spec("sglang") is None:
    collect_ignore_glob = ["test_*.py"]

Install = Callable[..., tuple[Host, SglangAdapter]]


@pytest.fixture(autouse=True)
def _stand_ins() -> Iterator[None]:
    with sglang_backends.stand_ins():
        yield


@pytest.fixture
def install() -> Iterator[Install]:
    """Installs the adapter; undoes it after the test."""
    yield from installer(SglangAdapter)
