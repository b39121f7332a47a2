"""Builds distributions of a copy of this project, as an index, a container or a user would."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE", "Makefile")
FOR_ARCHIVES = (".git_archival.txt", ".gitattributes")
FOLDERS = ("core", "adapters", "nsa_plugin", "benchmarks", "docs", "examples", "tests")


def source(folder: Path) -> Path:
    """A copy of the project without its history."""
    pytest.importorskip("setuptools_scm", reason="setuptools-scm, which the build needs, is not installed")
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
    folder.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=left_out)
    return folder


def build(kind: str, folder: Path, out: Path) -> Path:
    """Build an "sdist" or a "wheel"; fails if setuptools warns about what it packs."""
    call = f"import sys; from setuptools.build_meta import build_{kind} as build; build(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", call, str(out)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "Deprecat" in line or "Warning:" in line] == []
    return next(out.glob("*.tar.gz" if kind == "sdist" else "*.whl"))
