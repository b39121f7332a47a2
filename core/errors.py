"""Errors that name the field, what was expected, what came, and what to do."""

from __future__ import annotations

from typing import NoReturn


class NsaPluginError(Exception):
    """Base of every error that this package raises on purpose."""


class InvalidValueError(NsaPluginError, ValueError):
    """A value, shape, stride or device that the core can't work with."""


class InvalidTypeError(NsaPluginError, TypeError):
    """A dtype or Python type that the core can't work with."""


class UnavailableError(NsaPluginError, RuntimeError):
    """Something optional (an implementation, an engine, a package) is asked for and is not available here."""


def reject(
    field: str, expected: object, got: object, *, fix: str = "", error: type[NsaPluginError] = InvalidValueError
) -> NoReturn:
    """Raise `error` in this package's one form of message."""
    raise error(f"{field}: expected {expected}, got {got}" + (f"; {fix}" if fix else ""))
