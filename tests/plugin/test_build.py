"""A build is known by its source files: the same wherever they are, another one for any difference."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest

from nsa_plugin import _RELEASE
from nsa_plugin.adapters.build import DIGITS, WRITTEN, build, named, source_hash

ROOT = Path(__file__).parents[2]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package as a wheel has it."""
    copy = tmp_path / "site" / "nsa_plugin"
    shutil.copytree(ROOT / "nsa_plugin", copy, symlinks=False, ignore=shutil.ignore_patterns("__pycache__"))
    assert (copy / "adapters" / "vllm" / "agreement.py").is_file() and not (copy / "core").is_symlink()
    return copy


def test_equal_files_are_one_build_wherever_they_are(package: Path, tmp_path: Path) -> None:
    """Linked together in a checkout, copied into a site folder, with byte code beside them, in an archive."""
    here = source_hash(files("nsa_plugin"))
    assert build() == f"{_RELEASE}+{here}" and len(here) == DIGITS
    assert source_hash(package) == here
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "cli.cpython-311.pyc").write_bytes(b"byte code")
    (package / WRITTEN).write_text('version = "0.0.1.dev7+g0123456"')
    assert source_hash(package) == here, "the commit that a wheel names is no source"
    archive = shutil.make_archive(str(tmp_path / "wheel"), "zip", package.parent, "nsa_plugin")
    assert source_hash(zipfile.Path(archive, "nsa_plugin/")) == here


@pytest.mark.parametrize("change", ["a line", "a new file", "a file less", "another name", "another place"])
def test_a_difference_is_another_build_of_the_same_version(package: Path, change: str) -> None:
    file = package / "core" / "kernels" / "tiles.py"
    if change == "a line":
        file.write_text(file.read_text() + "\n")
    elif change == "a new file":
        (package / "new.py").touch()
    elif change == "a file less":
        file.unlink()
    else:
        file.rename(package / ("core/kernels/other.py" if change == "another name" else "core/tiles.py"))
    assert source_hash(package) != source_hash(files("nsa_plugin"))


def test_the_command_line_says_which_build_it_is() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nsa_plugin", "--version"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == f"nsa-plugin {build()}"


def test_a_wheel_between_releases_names_its_commit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert named() == build()
    monkeypatch.setattr("nsa_plugin.adapters.build.__version__", "0.0.1.dev7+g0123456")
    assert named() == f"{build()} (0.0.1.dev7+g0123456)"
