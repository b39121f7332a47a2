"""For logs and the command line: which build of this package runs. Commits may share a version."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable

from nsa_plugin import _RELEASE, __version__

DIGITS = 12
WRITTEN = "_version.py"
"""What building adds to the sources: it names the commit, which equal sources need not share."""


def build() -> str:
    """The release and the hash of the `source`.

    Raises
    ------
    OSError
        The files can't be read.
    """
    return f"{_RELEASE}+{source()}"


def named() -> str:
    """`build`, and the commit where a wheel between releases names one. Raises as `build`."""
    return build() + ("" if __version__ == _RELEASE else f" ({__version__})")


@functools.cache
def source() -> str:
    """Hash of the installed source files. Equal files have equal hashes, wherever and however they are installed.

    Raises
    ------
    OSError
        The files can't be read.
    """
    return source_hash(files("nsa_plugin"))


def source_hash(package: Traversable) -> str:
    """Hash of the names and contents of all Python files of a package, but for `WRITTEN`."""
    found = hashlib.sha256()
    for name, file in sorted(_sources(package, ""), key=lambda source: source[0]):
        content = file.read_bytes()
        found.update(f"{name}\0{len(content)}\0".encode() + content)
    return found.hexdigest()[:DIGITS]


def _sources(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _sources(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".py") and prefix + entry.name != WRITTEN:
            yield prefix + entry.name, entry
