"""sglang's own parser takes the launch line that is printed for it, and its own resolution accepts it on an H100."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nsa_plugin import launch_lines
from nsa_plugin.rigs.models import TINY_DSV32

server_args = pytest.importorskip("sglang.srt.server_args")


@pytest.fixture
def _h100(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(
        total_memory=80 << 30, major=9, minor=0, name="NVIDIA H100 80GB HBM3", multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *device, **more: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device, **more: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device, **more: card.name)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *device, **more: (79 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def resolve(words: list[str]) -> SimpleNamespace:
    """What sglang makes of a server's arguments, with a model of two layers in place of the named one."""
    resolved_view = pytest.importorskip("sglang.srt.arg_groups.overrides").resolved_view
    model = words.index("--model-path") + 1
    words[model] = str(TINY_DSV32)
    pretended = ("--device", "cuda", "--load-format", "dummy", "--skip-tokenizer-init")
    found = server_args.prepare_server_args([*words, *pretended])
    found.resolve_once()
    found.check_server_args()
    view = resolved_view(found)
    return SimpleNamespace(
        algorithm=view.speculative_algorithm, steps=view.speculative_num_steps, topk=view.speculative_eagle_topk,
        draft_tokens=view.speculative_num_draft_tokens,
    )  # fmt: skip


@pytest.mark.usefixtures("_h100")
def test_the_launch_line_is_resolved() -> None:
    found = resolve(list(launch_lines.arguments("sglang")))
    assert found == SimpleNamespace(
        algorithm="EAGLE", steps=launch_lines.STEPS, topk=1, draft_tokens=launch_lines.STEPS + 1
    )


@pytest.mark.usefixtures("_h100")
def test_a_line_without_top_k_is_told_from_one_that_works() -> None:
    words = list(launch_lines.arguments("sglang"))
    at = words.index("--speculative-eagle-topk")
    del words[at : at + 4]
    with pytest.raises(Exception, match=r"NoneType|topk"):
        resolve(words)
