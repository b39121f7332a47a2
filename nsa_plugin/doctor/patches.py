"""What adapters patch in their engines, why, and when each patch can go."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from nsa_plugin.adapters.base import Adapter
from nsa_plugin.adapters.ledger import LedgerRow

FIELDS = tuple(field.name for field in dataclasses.fields(LedgerRow))
Ledger = list[Mapping[str, str]]
"""A row for each patch: text for each of `FIELDS`."""


def ledger(adapter: Adapter) -> Ledger:
    """The adapter's `ledger()`; empty if it has none. One that raises is a row that says so."""
    rows = getattr(adapter, "ledger", None)
    if rows is None:
        return []
    try:
        return [{field: str(getattr(row, field)) for field in FIELDS} for row in rows()]
    except Exception as error:  # a third party's adapter may do anything
        return [dict.fromkeys(FIELDS, "") | {"target": "all", "why": f"{type(error).__name__}: {error}"}]
