"""The package is one that an index takes: twine, check-wheel-contents and validate-pyproject find nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugin.packages import build, source


def test_the_tools_of_the_package_index_find_nothing(tmp_path: Path) -> None:
    for tool in ("twine", "check_wheel_contents", "validate_pyproject"):
        pytest.importorskip(tool)
    project, out = source(tmp_path / "project"), tmp_path / "dist"
    out.mkdir()
    made = [str(build(kind, project, out)) for kind in ("sdist", "wheel")]
    for command in (
        ["twine", "check", "--strict", *made],
        ["check_wheel_contents", made[1]],
        ["validate_pyproject", str(project / "pyproject.toml")],
    ):
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
