"""The version of what is built; all else is in pyproject.toml.

The release is written in `nsa_plugin/__init__.py`. At its tag the version is the release. Before the tag it is a
development version of that release, after the tag one of the next, each with the distance and the commit. Without git it is
what the sdist, or the archive that git made, has recorded; where nothing has, `UNKNOWN`.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools_scm.version import ScmVersion, guess_next_version

PACKAGE = Path(__file__).parent / "nsa_plugin"
RELEASE = re.findall(r'^_RELEASE = "(.+)"$', (PACKAGE / "__init__.py").read_text(), re.MULTILINE)[0]
UNKNOWN = f"{RELEASE}.dev0"
"""Of an unknown commit; also what stands for the tag where git has none."""
WRITTEN = "_version.py"
"""In wheels alone: in a checkout, or an editable install of one, it would be stale after the next commit."""


def version(found: ScmVersion) -> str:
    """Release and distance as one version; the commit is added behind it."""
    release = type(found.tag)(RELEASE)
    if found.tag > release:
        raise SystemExit(
            f"expected the release in nsa_plugin/__init__.py at the tag's {found.tag}, got {RELEASE}; set it"
        )
    if found.tag < release:
        return f"{RELEASE}.dev{found.distance}"
    return RELEASE if found.exact else str(found.format_next_version(guess_next_version))


class Build(build_py):
    """Writes the version into what is built."""

    def run(self) -> None:
        """Copy the modules, and add the version."""
        super().run()
        if not self.editable_mode:
            path = Path(self.build_lib) / PACKAGE.name / WRITTEN
            path.write_text(f'"""Written when this was built."""\n\nversion = "{self.distribution.get_version()}"\n')


setup(cmdclass={"build_py": Build}, use_scm_version={"version_scheme": version, "fallback_version": UNKNOWN})
