"""What is built and installed: every room, its entry points, nothing called `core` or `adapters`, no finding of the tools."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

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
print(nsa_plugin.__file__)
"""


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    """The source distribution of the files that git knows."""
    clean = tmp_path_factory.mktemp("source")
    names = ("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE")
    for name in (*names, "core", "adapters", "nsa_plugin", "benchmarks", "docs", "examples"):
        subprocess.run(["cp", "-a", str(pytestconfig.rootpath / name), str(clean)], check=True)
    return build("sdist", clean, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that an installer builds from the source distribution."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def build(kind: str, source: Path, out: Path) -> Path:
    """Build the "sdist" or "wheel" of a source folder, as its build backend does; returns the file."""
    code = f"import sys; from setuptools.build_meta import build_{kind} as build; build(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=source, check=True, capture_output=True)
    (made,) = out.iterdir()
    return made


def test_the_sdist_holds_every_room_and_all_documents(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"core/reference.py", "adapters/sglang/adapter.py", "nsa_plugin/py.typed", "LICENSE"} <= names
    assert {"docs/operating.md", "benchmarks/README.md", "examples/sglang/launch.sh", "CHANGELOG.md"} <= names


def test_the_wheel_installs_one_top_level_package(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    assert {path.name for path in target.iterdir() if path.suffix != ".dist-info"} - {"bin"} == {"nsa_plugin"}
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", LOOK], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.strip() == str(target / "nsa_plugin" / "__init__.py")


def test_the_tools_of_the_package_index_find_nothing(sdist: Path, wheel: Path, pytestconfig: pytest.Config) -> None:
    for tool in ("twine", "check_wheel_contents", "validate_pyproject"):
        pytest.importorskip(tool)
    for command in (
        ["twine", "check", "--strict", str(sdist), str(wheel)],
        ["check_wheel_contents", str(wheel)],
        ["validate_pyproject", str(pytestconfig.rootpath / "pyproject.toml")],
    ):
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
