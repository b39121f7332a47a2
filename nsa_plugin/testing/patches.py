"""The line of the adapter contract about the ledger: what an installation replaces, and what the adapter says of it."""

from __future__ import annotations

import pkgutil
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from nsa_plugin.adapters.ledger import LedgerRow
from nsa_plugin.testing.watching import attributes, make_host, restored

if TYPE_CHECKING:
    from nsa_plugin.testing.conformance import Conformance

ABSENT = object()


def ledger(kit: Conformance) -> list[str]:
    """The ledger has a complete row for every attribute that an installation replaces, and no other.

    Before an installation it may have rows for other settings, too.
    """
    engine = kit.engine
    host, adapter = make_host(engine)
    rows = adapter.ledger()
    problems = [
        f"{row.target}: the row of the ledger has no {field.name!r}"
        for row in rows
        for field in fields(LedgerRow)
        if not getattr(row, field.name)
    ]
    targets = [(row.target, *_owner_and_name(row.target)) for row in rows]
    with restored(engine):
        before, values = attributes(engine), [vars(owner).get(name, ABSENT) for _, owner, name in targets]
        if found := adapter.install(host):
            return [f"install() found {found}"]
        try:
            after = attributes(engine)
            installed = {row.target for row in adapter.ledger()}
            for (target, owner, name), value in zip(targets, values, strict=True):
                if target in installed and vars(owner).get(name, ABSENT) is value:
                    problems.append(f"{target}: the ledger has a row for it, but install() does not replace it")
        finally:
            adapter.undo()
    named = {(id(owner), name) for target, owner, name in targets if target in installed}
    owners = engine.patched()
    for index, name in sorted(before.keys() | after.keys()):
        replaced = before.get((index, name), ABSENT) is not after.get((index, name), ABSENT)
        if replaced and (id(owners[index]), name) not in named:
            problems.append(f"{name}: install() replaces it, but the ledger has no row for it")
    return problems


def _owner_and_name(target: str) -> tuple[Any, str]:
    path, _, name = target.rpartition(".")
    return pkgutil.resolve_name(path), name
