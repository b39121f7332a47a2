"""The package is one that an index takes: twine, check-wheel-contents and validate-pyproject find nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def test_the_tools_of_the_package_index_find_nothing(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    for tool in ("twine", "check_wheel_contents", "validate_pyproject"):
        pytest.importorskip(tool)
    source, out = tmp_path / "source", tmp_path / "dist"
    source.mkdir()
    out.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "core", "adapters", "nsa_plugin"):
        subprocess.run(["cp", "-a", str(pytestconfig.rootpath / name), str(source)], check=True)
    for kind in ("sdist", "wheel"):
        build = f"import sys; from setuptools.build_meta import build_{kind} as build; build(sys.argv[1])"
        subprocess.run([sys.executable, "-c", build, str(out)], cwd=source, check=True, capture_output=True)
    made = sorted(map(str, out.iterdir()))
    wheels = [name for name in made if name.endswith(".whl")]
    assert len(made) == 2 and len(wheels) == 1
    for command in (
        ["twine", "check", "--strict", *made],
        ["check_wheel_contents", *wheels],
        ["validate_pyproject", str(source / "pyproject.toml")],
    ):
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
