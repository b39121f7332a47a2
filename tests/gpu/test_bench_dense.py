"""On a CUDA device: the benchmark of sglang's dense backends, whose graphs are real ones here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nsa_plugin.cli import main

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    ("backend", "page_size"), [("fa3", "1"), ("fa3", "64"), ("fa3", "128"), ("flashmla", "64")], ids=str
)
def test_every_value_is_sglangs_and_the_launch_is_timed(backend: str, page_size: str, tmp_path: Path) -> None:
    pytest.importorskip("sglang")
    file = tmp_path / "b.json"
    sizes = ["--bs", "1", "32", "--ctx", "4096", "--steps", "4", "--width", "4224", "--page-size", page_size]
    modes = ["--mode", "decode", "verify", "extend"]
    assert main(["bench", "--engine", "sglang", "--backend", backend, *modes, *sizes, "--json", str(file)]) == 0
    cells = json.loads(file.read_text())["cells"]
    assert len(cells) == 6
    for cell in cells:
        by_sglang = backend == "fa3" and cell["mode"] == "draft_extend"
        ours = {"graph"} if by_sglang else {"share", "graph"}
        assert cell["contenders"].keys() == {"sglang shipped"} | ours
        for name, row in cell["contenders"].items():
            assert row["differs"] == [] and row["gpu_us"] > 0 and row["gpu_us_by_kernel"]
            assert ("launch_us" in row) is (name in ours and not by_sglang)
