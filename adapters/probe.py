"""What an adapter needs of its engine, and the check that it is there: by capability, never by version alone."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import pkgutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Need:
    """Something of an engine that must be there.

    Attributes
    ----------
    path : str
        Dotted path.
    parameters : tuple of str
        Parameters that the callable must accept, or fields that the dataclass must have.
    why : str
        What it is used for.
    """

    path: str
    parameters: tuple[str, ...]
    why: str


def missing(needs: tuple[Need, ...]) -> list[str]:
    """A line for each need that the installed engine does not meet."""
    problems = []
    for need in needs:
        try:
            found = pkgutil.resolve_name(need.path)
        except Exception as error:
            problems.append(problem_line(need, f"{type(error).__name__}: {error}"))
            continue
        if dataclasses.is_dataclass(found):
            names = {field.name for field in dataclasses.fields(found)}
        elif not need.parameters:
            continue
        elif callable(found):
            names = set(inspect.signature(found).parameters)
        else:
            problems.append(problem_line(need, f"{found!r}, which can't be called"))
            continue
        if absent := [name for name in need.parameters if name not in names]:
            problems.append(problem_line(need, f"it without {', '.join(absent)}"))
    return problems


def installed_version(distribution: str) -> str:
    """Version of an installed distribution, or "unknown"."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


def warn_if_untested(
    logger: logging.Logger, distribution: str, tested: tuple[str, ...], release: str | None = None
) -> None:
    """Say once that a release (default: the installed one) is used although no conformance test runs against it."""
    release = installed_version(distribution) if release is None else release
    if release not in tested:
        logger.warning(
            "nsa-plugin: %s %s is not among the tested releases (%s); it has all that is needed and is used",
            distribution,
            release,
            ", ".join(tested),
        )


def problem_line(need: Need, found: str) -> str:
    """What every problem of a probe says: what was looked for, what was found, what to do."""
    wanted = need.path + (f"({', '.join(need.parameters)})" if need.parameters else "")
    return f"looked for {wanted} ({need.why}), found {found}; use a release of the engine that has it, or another of this plugin"
