"""The real vLLM on CPU tensors. Without it these tests are not collected."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from nsa_plugin.adapters.vllm.adapter import VllmAdapter
    from nsa_plugin.host import Host
    from tests.vllm.drafts import Step

os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["VLLM_PLUGINS"] = ""  # the tests themselves say when the plugin is installed

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def install() -> Iterator[Callable[..., tuple[Host, VllmAdapter]]]:
    """Installs the adapter; undoes it after the test."""
    from nsa_plugin.adapters.vllm.adapter import VllmAdapter
    from tests.installing import installer

    yield from installer(VllmAdapter)


@pytest.fixture
def log() -> Iterator[Callable[[int], list[str]]]:
    """The lines of a level or above that this plugin has logged since the start of the test.

    A filter keeps them: handlers are taken off when vLLM makes its first configuration.
    """
    logger = logging.getLogger("vllm.plugins.nsa_plugin")
    records: list[logging.LogRecord] = []
    before = logger.level

    def keep(record: logging.LogRecord) -> bool:
        records.append(record)
        return True

    logger.addFilter(keep)
    logger.setLevel(logging.INFO)
    yield lambda level: [record.getMessage() for record in records if record.levelno >= level]
    logger.removeFilter(keep)
    logger.setLevel(before)


@pytest.fixture(scope="session")
def expected() -> list[Step]:
    """What every draft step of every batch sees where vLLM rebuilds its metadata."""
    from nsa_plugin.rigs.vllm.v2_draft import Draft
    from tests.vllm.drafts import LAYOUT, TOKENS, proposals

    draft = Draft(*LAYOUT, TOKENS)
    assert not draft.fused
    return proposals(draft)


@pytest.fixture
def install_v1() -> Iterator[Callable[[], Host]]:
    """Patches Model Runner V1's proposer; undoes it after the test."""
    from nsa_plugin.rigs.vllm.v1_draft import patched

    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(patched())


@pytest.fixture(params=[90, 100])
def family(request: pytest.FixtureRequest) -> Iterator[int]:
    """The indexer builder's branches for Hopper or Blackwell, with a stand-in for DeepGEMM."""
    from nsa_plugin.rigs.vllm.stand_ins import emulated_cuda

    with emulated_cuda(request.param):
        yield request.param


@pytest.fixture
def hopper() -> Iterator[None]:
    """The indexer builder's branches for Hopper."""
    from nsa_plugin.rigs.vllm.stand_ins import emulated_cuda

    with emulated_cuda(90):
        yield


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each fused draft of Model Runner V2 that was verified."""
    from nsa_plugin.adapters.vllm.v2.verified.staged import Staged

    found: list[int] = []
    differences = Staged.differences

    def watched(staged: Staged, draft: Any, *values: Any) -> Any:
        found.append(draft.num_reqs)
        return differences(staged, draft, *values)

    monkeypatch.setattr(Staged, "differences", watched)
    return found
