"""Models that the rigs and the launch scripts are tried with."""

from __future__ import annotations

from pathlib import Path

TINY_DSV32 = Path(__file__).parent / "tiny_dsv32"
"""The configuration of a DeepSeek-V3.2 with MTP and two small layers; it has no weights."""
TINY_DSV3 = Path(__file__).parent / "tiny_dsv3"
"""The same of a DeepSeek-V3, which has no indexer."""
