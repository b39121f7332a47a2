"""How many examples a test of interpreted kernels draws: a third of what THOROUGH=1 asks for."""

from __future__ import annotations

import os


def examples(thorough: int) -> int:
    """So many if THOROUGH is set in the environment, else a third of them, at least three."""
    return thorough if os.environ.get("THOROUGH") else max(thorough // 3, 3)
