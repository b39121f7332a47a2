"""What is built and installed: every room, entry points, version, nothing called `core` or `adapters`, no finding of the tools."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import nsa_plugin
from tests.plugin.packages import FOR_ARCHIVES, ROOT, build, source

LOOK = """
import importlib, importlib.metadata as m
for name in ("nsa_plugin.core.kernels.metadata", "nsa_plugin.adapters.sglang.adapter", "nsa_plugin.demo.run", "nsa_plugin.rigs.sglang.original_loop",
             "nsa_plugin.testing.conformance", "nsa_plugin.doctor.run"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert error.name == "triton", error
for name in ("core", "adapters"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(name + " can be imported")
points = {(p.group, p.name): p for p in m.distribution("nsa-plugin").entry_points}
for key in (("sglang.srt.plugins", "nsa_plugin"), ("vllm.general_plugins", "nsa_plugin"), ("console_scripts", "nsa-plugin")):
    points[key].load()
import nsa_plugin
from nsa_plugin.rigs.models import TINY_DSV32
assert (TINY_DSV32 / "config.json").is_file()
from nsa_plugin.estimate.model import Measured
assert Measured.load().cells
assert nsa_plugin.__version__ == m.version("nsa-plugin")
print(nsa_plugin.__file__)
"""
RELEASE = nsa_plugin._RELEASE
MODULES = {
    str(path.relative_to(ROOT) if room == "nsa_plugin" else Path("nsa_plugin") / path.relative_to(ROOT))
    for room in ("nsa_plugin", "core", "adapters")
    for path in (ROOT / room).rglob("*.py")
    if not any(part.is_symlink() for part in path.parents)
}
"""Every module of every room, as it is packed."""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project without its history."""
    return source(tmp_path_factory.mktemp("source") / "project")


@pytest.fixture(scope="module")
def sdist(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its source distribution."""
    return build("sdist", copy, tmp_path_factory.mktemp("sdist"))


def test_the_sdist_holds_every_room_all_documents_and_the_tests(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"core/reference.py", "adapters/sglang/adapter.py", "nsa_plugin/py.typed", "LICENSE"} <= names
    assert {"docs/operating.md", "benchmarks/README.md", "examples/sglang/launch.sh", "CHANGELOG.md"} <= names
    assert {"Makefile", "setup.py", "tests/plugin/test_packaging.py", "tests/sglang/requirements.txt"} <= names


@pytest.fixture(scope="module")
def wheel(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its wheel."""
    return build("wheel", copy, tmp_path_factory.mktemp("wheel"))


@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_what_is_installed_is_one_top_level_package(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    made = request.getfixturevalue(kind)
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(made)]
    subprocess.run(pip, check=True, capture_output=True)
    assert {path.name for path in target.iterdir() if path.suffix != ".dist-info"} - {"bin"} == {"nsa_plugin"}
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", LOOK], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.strip() == str(target / "nsa_plugin" / "__init__.py")


def test_the_tools_of_the_package_index_find_nothing(copy: Path, sdist: Path, wheel: Path) -> None:
    for tool in ("twine", "check_wheel_contents", "validate_pyproject"):
        pytest.importorskip(tool)
    for command in (
        ["twine", "check", "--strict", str(sdist), str(wheel)],
        ["check_wheel_contents", str(wheel)],
        ["validate_pyproject", str(copy / "pyproject.toml")],
    ):
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def git(folder: Path, *arguments: str) -> bytes:
    who = ("-c", "user.name=somebody", "-c", "user.email=somebody@localhost")
    return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True).stdout


def version(folder: Path) -> str:
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def archived(folder: Path, to: Path) -> Path:
    """What `git archive` makes of it."""
    with tarfile.open(fileobj=io.BytesIO(git(folder, "archive", "HEAD"))) as archive:
        archive.extractall(to, filter="data")
    return to


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_build_between_releases_names_its_commit(copy: Path, tmp_path: Path) -> None:
    assert version(copy) == f"{RELEASE}.dev0", "no git, nothing recorded"
    folder = tmp_path / "project"
    shutil.copytree(copy, folder, symlinks=True)
    for name in FOR_ARCHIVES:
        shutil.copy(ROOT / name, folder)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "all")
    first = git(folder, "rev-parse", "HEAD").decode()
    git(tmp_path, "clone", "-q", str(folder), "clone")
    with zipfile.ZipFile(build("wheel", tmp_path / "clone", tmp_path)) as wheel:
        packed = {name for name in wheel.namelist() if name.endswith(".py")}
    assert packed == {*MODULES, "nsa_plugin/_version.py"}
    before, _, commit = version(folder).partition("+g")
    assert before == f"{RELEASE}.dev1" and first.startswith(commit) and len(commit) > 6
    git(folder, "tag", f"v{RELEASE}")
    assert version(folder) == RELEASE == version(archived(folder, tmp_path / "release"))
    (folder / "more").touch()
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "more")
    major, minor, patch = RELEASE.split(".")
    after = rf"{major}\.{minor}\.{int(patch) + 1}\.dev1\+g[0-9a-f]+"
    assert re.fullmatch(after, version(folder)) and re.fullmatch(after, version(archived(folder, tmp_path / "later")))
    git(folder, "tag", "v99.0")
    assert f"at the tag's 99.0, got {RELEASE}" in version(folder)
