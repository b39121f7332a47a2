"""At start: what an adapter needs of its engine, and the check that it is there, by capability and never by version alone."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import pkgutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Need:
    """Something that an engine must have.

    Attributes
    ----------
    path : str
        Dotted path of a function, a class, or a constant.
    parameters : tuple of str
        Parameters that the callable must accept, or fields that the dataclass must have.
    why : str
        What the plugin uses it for.
    hooked : bool
        Whether the plugin stands in for this function. It then passes on arguments that it does not know.
    known : tuple of str
        Further parameters of a hooked function that tested releases have; see `untested`.
    """

    path: str
    parameters: tuple[str, ...]
    why: str
    hooked: bool = False
    known: tuple[str, ...] = ()


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
        elif not need.parameters and not need.hooked:
            continue
        elif callable(found):
            names = set(inspect.signature(found).parameters)
        else:
            problems.append(problem_line(need, f"{found!r}, which can't be called"))
            continue
        if absent := [name for name in need.parameters if name not in names]:
            problems.append(problem_line(need, f"it without {', '.join(absent)}"))
    return problems


def untested(needs: tuple[Need, ...]) -> list[str]:
    """A line for each hooked function with parameters that no tested release has; to be asked before it is hooked.

    The hook passes them on. Nobody knows what they mean for the values that this plugin computes. `missing` names
    functions that are not there.
    """
    lines = []
    for need in needs:
        if not need.hooked:
            continue
        try:
            found = inspect.signature(pkgutil.resolve_name(need.path)).parameters
        except Exception:
            continue
        known = {"self", *need.parameters, *need.known}
        if new := [name for name, parameter in found.items() if name not in known and parameter.kind not in _VARIADIC]:
            lines.append(f"{need.path} has parameters that no tested release has: {', '.join(new)}; they are passed on")
    return lines


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
"""Kinds of parameters by which wrappers pass everything on."""


def warn_of_untested(logger: logging.Logger, needs: tuple[Need, ...]) -> None:
    """Warn of what is `untested`, a line each, when hooks are about to be installed."""
    for line in untested(needs):
        logger.warning("nsa-plugin: untested: %s", line)


def installed_version(distribution: str) -> str:
    """Version of an installed distribution, or "unknown"."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


def warn_if_untested(
    logger: logging.Logger, distribution: str, tested: tuple[str, ...], release: str | None = None
) -> None:
    """Warn that a release (default: the installed one) is used although no conformance test runs against it."""
    release = installed_version(distribution) if release is None else release
    if release not in tested:
        logger.warning(
            "nsa-plugin: %s %s is not among the tested releases (%s); it has all that is needed and is used",
            distribution,
            release,
            ", ".join(tested),
        )


def problem_line(need: Need, found: str) -> str:
    """The line for a need that is not met: what was looked for, what was found, what to do."""
    wanted = need.path + (f"({', '.join(need.parameters)})" if need.parameters else "")
    return f"looked for {wanted} ({need.why}), found {found}; use a release of the engine that has it, or another of this plugin"
