"""The release matrix: what a static probe sees in a wheel, and what the table says of it."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.matrix import check, render, run
from benchmarks.matrix.engines import ENGINES, Needs
from benchmarks.matrix.static import Wheel
from nsa_plugin.adapters.probe import Need
from nsa_plugin.adapters.sglang import releases as sglang
from nsa_plugin.adapters.vllm import releases as vllm
from nsa_plugin.adapters.vllm.v1 import proposer as v1_proposer
from nsa_plugin.testing.engine import Case

SOURCE = {
    "toy/__init__.py": "",
    "toy/base.py": """
from dataclasses import dataclass
class Base:
    flag: bool = False
    def inherited(self, batch): ...
@dataclass
class Common:
    lengths: int
""",
    "toy/backend.py": """
from toy.base import Base, Common
from compiled.elsewhere import borrowed
from toy.base import nothing
@dataclass
class Metadata(Common):
    pages: int
class Backend(Base):
    registry = {}
    def prepare(self, batch, *, in_capture=False): ...
try:
    import fast
except ImportError:
    def fallback(a): ...
Other = Backend
Backend = Backend
""",
    "toy-2.0.dist-info/METADATA": "Name: toy\nRequires-Dist: pinned==1.2.3\nRequires-Dist: loose>=3\nRequires-Dist: extra==1; extra == 'x'\n",
}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "toy-2.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in SOURCE.items():
            archive.writestr(name, text)
    return path


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("toy.backend.Backend.prepare", ("batch", "in_capture")),
        ("toy.backend.Backend.inherited", ("batch",)),
        ("toy.backend.Backend.registry", ()),
        ("toy.backend.Backend.flag", ()),
        ("toy.backend.Other.prepare", ("batch",)),
        ("toy.backend.Metadata", ("pages", "lengths")),
        ("toy.backend.fallback", ("a",)),
        ("toy.backend.borrowed", ()),
    ],
)
def test_what_is_there_is_found(wheel: Path, path: str, parameters: tuple[str, ...]) -> None:
    assert Wheel(wheel).missing((Need(path, parameters, "test"),)) == []


@pytest.mark.parametrize(
    ("path", "parameters", "found"),
    [
        ("toy.backend.Backend.prepare", ("rows",), "found it without rows"),
        ("toy.backend.Backend.gone", (), "found no gone in toy.backend"),
        ("toy.backend.nothing", (), "found no nothing in toy.backend"),
        ("toy.backend.borrowed", ("a",), "found it without a"),
        ("toy.backend.Metadata", ("heads",), "found it without heads"),
        ("toy.nowhere.Backend", (), "found no nowhere in toy"),
        ("other.Backend", (), "found no module other"),
    ],
)
def test_what_is_missing_is_named(wheel: Path, path: str, parameters: tuple[str, ...], found: str) -> None:
    (problem,) = Wheel(wheel).missing((Need(path, parameters, "test"),))
    assert problem.startswith(f"looked for {path}") and found in problem


REGISTRY = """
_current_plugin_source = None
class HookType:
    AROUND = 1
class HookRegistry:
    _hooks = {}
    _patched = set()
    def register(cls, target, hook, hook_type): ...
    def apply_hooks(cls): ...
"""


@pytest.mark.parametrize(
    ("there", "named"),
    [
        (["nsa_backend"], "nsa_backend.NativeSparseAttnMultiStepBackend.init_forward_metadata_capture_cuda_graph"),
        (
            ["dsa_backend", "nsa_backend"],
            "dsa_backend.DeepseekSparseAttnMultiStepBackend.init_forward_metadata_out_graph",
        ),
        ([], "dsa_backend.DeepseekSparseAttnMultiStepBackend.init_forward_metadata_out_graph"),
    ],
)
def test_a_wheel_is_probed_for_the_names_that_it_goes_by(tmp_path: Path, there: list[str], named: str) -> None:
    path = tmp_path / "sglang-9.9-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("sglang/srt/plugins/hook_registry.py", REGISTRY)
        for module in there:
            archive.writestr(f"sglang/srt/layers/attention/{module}.py", "")
    row = run.check("sglang", path, tmp_path / "no environment")
    assert row["how"] == "static"
    for strategies in row["paths"].values():
        for state in strategies.values():
            assert state.startswith(f"unsupported: looked for sglang.srt.layers.attention.{named}")


def test_pins_and_release_come_from_the_wheel(wheel: Path) -> None:
    assert run.release_of(wheel) == "2.0"
    assert run.pins(wheel, ("pinned", "loose", "extra")) == ["pinned==1.2.3"]


ROWS: list[dict[str, Any]] = [
    {"engine": "toy", "release": "1.0", "date": "2026-01-01",
     "paths": {"draft": {"share": "unsupported: looked for a.b.C.d(x, y) (why), found no module a; use another"}}},
    {"engine": "toy", "release": "2.0", "date": "2026-01-02", "environment": {"torch": "3"},
     "paths": {"draft": {"graph": "faithful", "share": "faithful", "copy": "differs: round 1"}}},
    {"engine": "toy", "release": "3.0", "date": "2026-01-02", "problems": ["undo: x"], "why static": "no gpu",
     "paths": {"draft": {"graph": "static only"}}},
]  # fmt: skip


def test_the_table() -> None:
    assert render.table(ROWS).splitlines()[2:] == [
        "| toy 3.0 | static only: graph | source only, 2026-01-02 |",
        "| toy 2.0 | faithful: graph, share; differs: copy | torch 3, 2026-01-02 |",
        "| toy 1.0 | unsupported: no `C.d` | source only, 2026-01-01 |",
    ]


def test_parameters_and_fields_that_are_missing_are_named() -> None:
    state = "unsupported: looked for a.b.C.d(x, y, z) (why, found), found it without x, z; use another"
    assert render.cell({"graph": state}) == "unsupported: `C.d` without x, z"


def test_a_path_that_a_release_was_not_tried_on_is_said_to_be_not_run() -> None:
    rows = [
        ROWS[0],
        ROWS[1] | {"paths": {**ROWS[1]["paths"], "draft (another runner)": {"copy": "faithful"}}},
        ROWS[1] | {"engine": "other"},
    ]
    assert render.table(rows).splitlines()[2:] == [
        "| toy 2.0 | faithful: graph, share; differs: copy | faithful: copy | torch 3, 2026-01-02 |",
        "| toy 1.0 | unsupported: no `C.d` | not run | source only, 2026-01-01 |",
        "| other 2.0 | faithful: graph, share; differs: copy | – | torch 3, 2026-01-02 |",
    ]


def test_every_path_of_a_kit_is_probed() -> None:
    """What the kit of an engine finds out has a cell to go into."""
    needs = {name: [set(of.paths) for of in engine.needs] for name, engine in ENGINES.items()}
    assert needs["vllm"] == [{"draft decode", v1_proposer.PATH, "target verify", "draft extend"}]
    paths = {"draft decode", "target verify", "draft extend", "dense FlashAttention", "dense FlashMLA"}
    assert needs["sglang"] == [paths, paths]


def test_a_canary_names_every_difference() -> None:
    assert run.differences([ROWS[1] | {"paths": {"draft": {"graph": "faithful"}}}]) == []
    assert run.differences(ROWS[1:]) == [
        "toy 2.0: draft: differs: round 1; faithful",
        "toy 3.0: undo: x",
        "toy 3.0: the kit did not run: no gpu",
        "toy 3.0: draft: static only",
    ]


def test_a_canary_names_metadata_builders_without_a_row(tmp_path: Path) -> None:
    path = tmp_path / "vllm-9.9-py3-none-any.whl"
    source = """
from vllm.v1.attention.backend import AttentionMetadataBuilder
class NewMetadataBuilder(AttentionMetadataBuilder[int]): ...
class AbstractMetadataBuilder(AttentionMetadataBuilder, abc.ABC): ...
def make(base):
    class Derived(NewMetadataBuilder): ...
"""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vllm/v1/attention/backends/mla/new.py", source)
        archive.writestr("vllm/v1/attention/backends/gdn_attn.py", "class GDNAttentionMetadataBuilder(Base): ...")
        archive.writestr("vllm/elsewhere.py", "class OtherMetadataBuilder(AttentionMetadataBuilder): ...")
    row = run.check("vllm", path, tmp_path / "no environment")
    module = "vllm.v1.attention.backends.mla.new"
    assert row["unexamined"] == [f"{module}.NewMetadataBuilder", f"{module}.make.<locals>.Derived"]
    assert f"vllm 9.9: not examined: {module}.NewMetadataBuilder" in run.differences([row])


def test_committed_results_are_those_of_the_adapters() -> None:
    """What is faithful everywhere is what the adapters call tested."""
    rows = json.loads(run.RESULTS.read_text())
    for name, tested in (("sglang", sglang.TESTED), ("vllm", vllm.TESTED)):
        known = {row["release"]: row for row in rows if row["engine"] == name}
        assert list(known) == list(ENGINES[name].releases)
        faithful = [
            release
            for release, row in known.items()
            if row["how"] == "kit"
            and not row["problems"]
            and all(
                state == "faithful" or state.startswith("unsupported")
                for strategies in row["paths"].values()
                for state in strategies.values()
            )
        ]
        assert tuple(faithful) == tested, name


def test_what_a_release_lacks_is_unsupported_in_its_column(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pooled(Case):
        column = "pooled index keys"

    class Absent:
        tried = (Pooled("1", "draft decode, X", 1, frozenset()), Case("2", "target verify", 1, frozenset()))

        def __init__(self) -> None:
            raise ImportError("looked for a.b, found none")

    found_lacking = SimpleNamespace(cases=list, left_out={"dense": "looked for c.d, found none", "target verify": "x"})
    there = SimpleNamespace(logger="toy", cases=lambda: [Case("3", "draft decode", 1, frozenset())])
    made = {"There": lambda: there, "Lacking": lambda: found_lacking, "Absent": Absent}
    monkeypatch.setattr(check, "FIXTURES", {"torch": tuple(made)})
    monkeypatch.setattr(check, "LINES", ())
    monkeypatch.setattr(check, "Conformance", lambda engine: SimpleNamespace(runs=()))
    monkeypatch.setattr("pkgutil.resolve_name", made.__getitem__)
    found = check.main("torch")
    absent, lacking = "looked for a.b, found none", "looked for c.d, found none"
    assert found["left out"] == {"dense": lacking, "pooled index keys": absent, "target verify": absent}
    assert found["skipped"] == {"Lacking": f"{lacking}; x", "Absent": absent} and not found["values"]
    assert check.main("torch", ["Lacking"])["left out"] == found_lacking.left_out
    with pytest.raises(ValueError, match=r"fixtures of torch: expected some of There, Lacking, Absent, got Lack$"):
        check.main("torch", ["There", "Lack"])


KNOWN: dict[str, Any] = {
    "engine": "toy", "release": "1.0", "date": "2026-01-01", "how": "kit", "environment": {"torch": "3"},
    "problems": ["undo: Old: x", "undo: New: y"], "skipped": {"replays": "no gpu", "New": "lacks"},
    "paths": {"draft": {"graph": "faithful"}, "dense": {"graph": "unsupported: lacks"}},
}  # fmt: skip


def test_a_fixture_run_alone_replaces_its_columns_and_dates_them() -> None:
    alone = KNOWN | {
        "date": "2026-01-02", "problems": [], "skipped": {"replays": "no gpu"}, "paths": {"dense": {"graph": "faithful"}},
    }  # fmt: skip
    row = run.merged(KNOWN, alone, ["New"])
    assert row == KNOWN | {
        "paths": KNOWN["paths"] | alone["paths"], "problems": ["undo: Old: x"], "skipped": {"replays": "no gpu"},
        "dates": {"dense": "2026-01-02"},
    }  # fmt: skip
    assert render.table([row]).endswith("| torch 3, 2026-01-01; dense: 2026-01-02 |")
    assert run.merged(row, alone | {"date": "2026-01-01"}, ["New"])["dates"] == {}
    for other in ({"environment": {"torch": "4"}}, {"environment": "static"}):
        with pytest.raises(
            ValueError, match=r"toy 1\.0: looked for the environment .* found .*; run it without --only"
        ):
            run.merged(KNOWN, alone | other, ["New"])


def test_only_some_fixtures_are_run(monkeypatch: pytest.MonkeyPatch, wheel: Path, tmp_path: Path) -> None:
    engine = ENGINES["sglang"]
    needs = [Needs("toy", {"draft": {"graph": ()}, "dense": {"graph": ()}, "other": {"graph": ()}})]
    monkeypatch.setitem(ENGINES, "toy", replace(engine, needs=tuple(needs), unexamined=lambda wheel: []))
    monkeypatch.setattr(run, "prepare", lambda *arguments: "python")
    report = {
        "lines": {}, "skipped": {}, "environment": {}, "values": {"dense": {"graph": []}}, "left out": {"more": "lacks"},
    }  # fmt: skip
    commands: list[list[str]] = []

    def kit(command: list[str], **keywords: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(stdout=json.dumps(report), stderr="")

    monkeypatch.setattr("subprocess.run", kit)
    assert run.check("toy", wheel, tmp_path, ["New"])["paths"].keys() == {"dense", "more"}
    assert run.check("toy", wheel, tmp_path)["paths"].keys() == {"draft", "dense", "other", "more"}
    assert [command[-1] for command in commands] == ["New", "toy"]
