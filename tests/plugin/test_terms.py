"""One name per thing: words that the glossary has replaced are in no document, picture, metric or message."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RETIRED = {
    r"\bstock\b|\bvanilla\b|\bunpatched\b": "shipped",
    r"(?<!wide )(?<!real )\b(wide|token-level|per-token) (table|pages)\b": "wide page table",
    r"[`\"']one\s+kernel[`\"']": "graph",
    r"(?<![_\w])[Ff]allbacks?\b": "fall-back",
    r"\b(native|original) path\b|\bengine's path\b": "own path",
    r"\bkill switch\b": "switch file, or switched off",
    r"\b(left|leaves?) (it |them )?alone\b|\buntouched\b": "left to the engine, or left as it is",
    r"\b(graph|share|copy) mode\b": "strategy graph, share, copy",
}
"""What is no longer said, to what is."""
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted(path for room in ("docs", "benchmarks", "examples") for path in (ROOT / room).rglob("*.md")),
]
OTHERS = [
    ROOT / "examples/monitoring/alerts.yml",
    ROOT / "examples/monitoring/grafana.json",
    ROOT / "docs/images/timeline.svg",
]
CODE = [
    path
    for room in ("core", "adapters", "nsa_plugin")
    for path in sorted((ROOT / room).rglob("*.py"))
    if not any(part.is_symlink() for part in path.parents)
]
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def retired(text: str) -> list[str]:
    """Each retired word of a text, with the word that is used instead."""
    return [f"{found.group()}: say {instead}" for word, instead in RETIRED.items() for found in re.finditer(word, text)]


def said(page: Path) -> str:
    """A document without its program text, whose lines may be an engine's."""
    return FENCED.sub("", page.read_text())


def messages(path: Path) -> Iterator[str]:
    """What a module may print or log: its texts of more than a word, without docstrings."""
    tree = ast.parse(path.read_text())
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in alone
            and " " in node.value
        ):
            yield node.value


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: str(page.relative_to(ROOT)))
def test_documents_use_the_words_of_the_glossary(page: Path) -> None:
    assert retired(said(page)) == []


def test_messages_use_the_words_of_the_glossary() -> None:
    found = {str(path.relative_to(ROOT)): [word for text in messages(path) for word in retired(text)] for path in CODE}
    assert {path: words for path, words in found.items() if words} == {}


def test_a_retired_word_is_seen() -> None:
    for text in ("vLLM stock", "the wide table", "`one kernel`", "a fallback", "the engine's path", "it is left alone"):
        assert len(retired(text)) == 1, text
    for text in ("in one kernel", "nsa_plugin_fallbacks", "a fall-back", "the wide page table", "the own path"):
        assert retired(text) == [], text


def test_the_glossary_has_every_word_that_is_used_instead_and_each_once() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text()
    words = re.findall(r"^\| \*\*([^*]+)\*\*", text, re.MULTILINE)
    assert words == sorted(words, key=str.lower) and len(set(words)) == len(words)
    defined = set(re.findall(r"\*\*([^*]+)\*\*", text))
    for term in ("shipped", "wide page table", "fall-back", "own path", "switch file", "step down", "verification"):
        assert term in defined, term
    for term in ("strategy", "consumer", "plane", "left to the engine", "left as it is", "switched off"):
        assert term in defined, term
