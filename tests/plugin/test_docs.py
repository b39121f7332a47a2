"""The documents: links lead somewhere, names are those of the code, tables are those of the committed results."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.tables import TABLES, Table, replaced
from nsa_plugin import launch_lines, monitoring
from nsa_plugin.adapters.sglang import releases as sglang
from nsa_plugin.adapters.vllm import releases as vllm
from nsa_plugin.manager import HOOKS
from nsa_plugin.settings import NAMES, PREFIX
from nsa_plugin.testing.contract import LINES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, *sorted(path for room in ("benchmarks", "examples") for path in (ROOT / room).rglob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def names(paths: list[Path]) -> list[str]:
    """Paths as ids of tests."""
    return [str(path.relative_to(ROOT)) for path in paths]


def links(page: Path) -> Iterator[str]:
    """Targets of a page's links, those in code left out."""
    yield from LINK.findall(FENCED.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """What a link to a part of the page may name: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page: Path) -> list[str]:
    """Links of a page that lead nowhere."""
    found = []
    for link in links(page):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", LINKED, ids=names(LINKED))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One `thing`, more\n[a](#one-thing-more) [b](#two) [c](page.md#one-thing-more) [d](none.md)\n")
    assert broken(page) == ["#two", "none.md"]


def test_every_page_can_be_reached_from_the_readme() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(ROOT / "README.md")}
    assert set(PAGES[1:]) <= linked


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_settings_are_those_of_the_code() -> None:
    named = {name for page in PAGES for name in re.findall(rf"{PREFIX}[A-Z][A-Z_]*\b", page.read_text())}
    assert named == {PREFIX + name for name in NAMES.values()}
    table = re.findall(rf"^\| `({PREFIX}\w+)`", (ROOT / "docs" / "operating.md").read_text(), re.MULTILINE)
    assert sorted(table) == sorted(named), "a row for each"


def test_hooks_and_contract_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `?(\w+)`? \|", (ROOT / "docs" / "writing_an_adapter.md").read_text(), re.MULTILINE)
    assert sorted(row for row in rows if row.startswith("nsa_plugin_")) == sorted(HOOKS)
    contract = [row for row in rows if not row.startswith("nsa_plugin_")]
    assert contract == ["line", *(line for line in LINES if line != "coverage"), "hook"]


def test_metrics_are_those_of_the_code() -> None:
    made = set(re.findall(r'"(nsa_plugin_\w+)"', Path(monitoring.__file__).read_text()))
    rows = re.findall(r"^\| `(nsa_plugin_\w+)`", (ROOT / "docs" / "operating.md").read_text(), re.MULTILINE)
    assert set(rows) == made and made


def test_the_releases_of_the_readme_are_those_that_were_tested() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    first, last = (vllm.TESTED[index].removesuffix(".0") for index in (0, -1))
    assert f"Tested are sglang {sglang.TESTED[0]} to {sglang.TESTED[-1]} and vLLM {first} to {last}," in text


@pytest.mark.parametrize("page", LINKED, ids=names(LINKED))
def test_files_modules_and_targets_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text()
    named = re.findall(r"`((?:core|adapters|nsa_plugin|tests|benchmarks|examples|docs)/[\w./]*)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
    modules = re.findall(r"python -m (benchmarks[\w.]*)", text)
    assert [name for name in modules if find_spec(name) is None] == []
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [name for name in re.findall(r"`make ([\w-]+)", text) if name not in targets] == []


@pytest.mark.parametrize("table", TABLES, ids=[table.name for table in TABLES])
def test_tables_are_those_of_the_committed_results(table: Table) -> None:
    text = (ROOT / table.document).read_text()
    assert replaced(text, table.name, table.text()) == text, "run make tables"


def test_a_document_without_markers_is_refused() -> None:
    begin, end = "<!-- x: generated by make tables, do not edit -->", "<!-- /x -->"
    assert replaced(f"a{begin}old{end}b", "x", "new") == f"a{begin}\n\nnew\n\n{end}b"
    for text in ("nothing", f"a{end}", f"{begin}a"):
        with pytest.raises(ValueError, match=r"expected the markers .* put them where the table belongs"):
            replaced(text, "x", "new")


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_the_launch_lines_of_the_readme_are_the_printed_ones(engine: str) -> None:
    assert launch_lines.line(engine) in (ROOT / "README.md").read_text().splitlines()
