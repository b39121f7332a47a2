"""An entry point whose module imports the engine, for the conformance kit to catch."""

from __future__ import annotations

import toy_engine  # noqa: F401
from toy_adapter import register  # noqa: F401
