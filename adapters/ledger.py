"""The ledger of an adapter: every attribute of the engine that it replaces, with the reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LedgerRow:
    """One patch.

    Attributes
    ----------
    target : str
        Dotted path of the attribute of the engine.
    why : str
        What the patch is for.
    upstream : str
        The engine's own report or pull request about it; "not proposed" if there is none.
    gone_when : str
        What the engine must have for the patch to go.
    runs : str
        When the replacement runs: "capture", "every draft", …
    """

    target: str
    why: str
    upstream: str
    gone_when: str
    runs: str
