"""The metadata builders in vLLM's source, and which of them the adapter's table does not name. Imports nothing of vLLM."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

from nsa_plugin.adapters.vllm.builders import ROWS

BACKENDS = "vllm.v1.attention.backends"
"""The package whose builders are looked at."""


def classes(sources: Mapping[str, str | bytes]) -> dict[str, ast.ClassDef]:
    """Every class in the source of modules, by its dotted path, those that functions make included."""
    return {path: node for module, text in sources.items() for path, node in _classes(module, ast.parse(text))}


def _classes(path: str, scope: ast.AST) -> Iterator[tuple[str, ast.ClassDef]]:
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.ClassDef):
            yield f"{path}.{node.name}", node
            yield from _classes(f"{path}.{node.name}", node)
        elif isinstance(node, ast.FunctionDef):
            yield from _classes(f"{path}.{node.name}.<locals>", node)
        else:
            yield from _classes(path, node)


def bases(node: ast.ClassDef) -> list[str]:
    """The names of a class's bases, without what they are subscripted with."""
    found = (base.value if isinstance(base, ast.Subscript) else base for base in node.bases)
    return [ast.unparse(base).rpartition(".")[2] for base in found]


def metadata_builders(sources: Mapping[str, str | bytes]) -> dict[str, ast.ClassDef]:
    """The classes that are called metadata builders, or derive from one; without abstract ones."""
    known = classes(sources)
    named = {node.name for node in known.values() if node.name.endswith("MetadataBuilder")}
    while more := {node.name for node in known.values() if _is_builder(node, named)} - named:
        named |= more
    return {path: node for path, node in known.items() if node.name in named and "ABC" not in bases(node)}


def _is_builder(node: ast.ClassDef, named: set[str]) -> bool:
    return any(base in named or base.endswith("MetadataBuilder") for base in bases(node))


def unexamined(sources: Mapping[str, str | bytes]) -> list[str]:
    """Dotted paths of the metadata builders in the source of modules that have no row."""
    return sorted(metadata_builders(sources).keys() - ROWS.keys())
