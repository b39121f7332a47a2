"""Attention metadata of speculative drafts, computed once for all steps: a plugin for sglang and vLLM."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsa_plugin.core.api import fast_copy, precompute
    from nsa_plugin.core.batch import BatchDescriptor, BlockTable, ForwardMode, Geometry, TokenTable
    from nsa_plugin.core.errors import InvalidTypeError, InvalidValueError, NsaPluginError, UnavailableError
    from nsa_plugin.core.metadata import PrecomputedMetadata, StepMetadata
    from nsa_plugin.core.plan import ReplayPlan
    from nsa_plugin.entry import disable, enable
    from nsa_plugin.hookspec import hookimpl

_RELEASE = "0.2.0"

try:
    from nsa_plugin._version import version as __version__  # type: ignore[import-not-found,unused-ignore]
except ModuleNotFoundError:  # only wheels have it: it names the commit
    __version__ = _RELEASE

__all__ = [
    "BatchDescriptor",
    "BlockTable",
    "ForwardMode",
    "Geometry",
    "InvalidTypeError",
    "InvalidValueError",
    "NsaPluginError",
    "PrecomputedMetadata",
    "ReplayPlan",
    "StepMetadata",
    "TokenTable",
    "UnavailableError",
    "__version__",
    "disable",
    "enable",
    "fast_copy",
    "hookimpl",
    "precompute",
]

_EXPORTS = {
    "core.api": ("fast_copy", "precompute"),
    "core.batch": ("BatchDescriptor", "BlockTable", "ForwardMode", "Geometry", "TokenTable"),
    "core.errors": ("InvalidTypeError", "InvalidValueError", "NsaPluginError", "UnavailableError"),
    "core.metadata": ("PrecomputedMetadata", "StepMetadata"),
    "core.plan": ("ReplayPlan",),
    "entry": ("disable", "enable"),
    "hookspec": ("hookimpl",),
}
"""Module to the public names that it defines. They are imported at first use, because torch takes seconds."""


def __getattr__(name: str) -> Any:
    for module, names in _EXPORTS.items():
        if name in names:
            value = getattr(import_module(f"nsa_plugin.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
