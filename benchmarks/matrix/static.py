"""A probe that imports nothing: it looks an adapter's needs up in the source of an engine's wheel."""

from __future__ import annotations

import ast
import zipfile
from functools import cache
from pathlib import Path

from nsa_plugin.adapters.probe import Need, problem_line

Scope = ast.Module | ast.ClassDef


class Wheel:
    """The Python source in a wheel."""

    def __init__(self, path: Path) -> None:
        self._archive = zipfile.ZipFile(path)
        self._names = set(self._archive.namelist())
        self.module = cache(self._module)

    def _module(self, name: str) -> ast.Module | None:
        """A module's syntax tree; None if the wheel does not have it."""
        stem = name.replace(".", "/")
        for member in (f"{stem}.py", f"{stem}/__init__.py"):
            if member in self._names:
                return ast.parse(self._archive.read(member))
        return None

    def sources(self, package: str) -> dict[str, bytes]:
        """The source of every module below a package, by dotted name."""
        folder = package.replace(".", "/") + "/"
        members = (name for name in self._names if name.startswith(folder) and name.endswith(".py"))
        return {name.removesuffix(".py").replace("/", "."): self._archive.read(name) for name in members}

    def missing(self, needs: tuple[Need, ...]) -> list[str]:
        """A line for each need that the source does not meet, as from `nsa_plugin.adapters.probe.missing`."""
        problems = []
        for need in needs:
            found = self._find(need.path)
            if isinstance(found, str):
                problems.append(problem_line(need, found))
                continue
            if not need.parameters:
                continue
            module, node = found
            names = self._names_of(module, node)
            if absent := [name for name in need.parameters if name not in names]:
                problems.append(problem_line(need, f"it without {', '.join(absent)}"))
        return problems

    def _find(self, path: str) -> tuple[str, ast.AST] | str:
        """The module and the node that a dotted path names, or what is not there."""
        parts = path.split(".")
        for size in range(len(parts) - 1, 0, -1):
            module = ".".join(parts[:size])
            if (tree := self.module(module)) is not None:
                break
        else:
            return f"no module {parts[0]}"
        node: ast.AST = tree
        for name in parts[size:]:
            if not isinstance(node, ast.Module | ast.ClassDef):
                return f"nothing that can have an attribute {name}"
            inner = self._member(module, node, name)
            if inner is None:
                return f"no {name} in {module}"
            module, node = inner
        return module, node

    def _member(self, module: str, scope: Scope, name: str) -> tuple[str, ast.AST] | None:
        """What `name` is in a module or class. Bases and imports within the wheel are followed; the last definition counts.

        What comes from elsewhere is taken to be there.
        """
        found: tuple[str, ast.AST] | None = None
        for node in _statements(scope):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
                found = module, node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if not any(isinstance(target, ast.Name) and target.id == name for target in targets):
                    continue
                if not isinstance(node.value, ast.Name):
                    found = module, node
                elif node.value.id != name:  # another name for something
                    found = self._member(module, scope, node.value.id) or (module, node)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        tree = self.module(node.module)
                        there = (module, node) if tree is None else self._member(node.module, tree, alias.name)
                        found = there or found
        if found is None and isinstance(scope, ast.ClassDef):
            for base in self._bases(module, scope):
                if (inherited := self._member(*base, name)) is not None:
                    return inherited
        return found

    def _bases(self, module: str, scope: ast.ClassDef) -> list[tuple[str, ast.ClassDef]]:
        bases = []
        for base in scope.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            tree = self.module(module)
            if isinstance(base, ast.Name) and tree is not None:
                found = self._member(module, tree, base.id)
                if found is not None and isinstance(found[1], ast.ClassDef):
                    bases.append((found[0], found[1]))
        return bases

    def _names_of(self, module: str, node: ast.AST) -> set[str]:
        """Parameters of a function, fields of a dataclass with its bases."""
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            return {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
        if isinstance(node, ast.ClassDef):
            names = {
                statement.target.id
                for statement in node.body
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
            }
            return names.union(*(self._names_of(*base) for base in self._bases(module, node)))
        return set()


def _statements(scope: Scope) -> list[ast.stmt]:
    """The statements of a body, and of the `if` and `try` blocks in it."""
    statements: list[ast.stmt] = []
    queue = list(scope.body)
    while queue:
        node = queue.pop(0)
        statements.append(node)
        for block in ("body", "orelse", "handlers", "finalbody") if isinstance(node, ast.If | ast.Try) else ():
            for inner in getattr(node, block, []):
                queue += inner.body if isinstance(inner, ast.ExceptHandler) else [inner]
    return statements
