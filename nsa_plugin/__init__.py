"""Attention metadata of speculative drafts, computed once for all steps: a plugin for sglang and vLLM."""

from nsa_plugin.core.api import fast_copy, precompute
from nsa_plugin.core.batch import BatchDescriptor, BlockTable, ForwardMode, Geometry, TokenTable
from nsa_plugin.core.errors import InvalidTypeError, InvalidValueError, NsaPluginError, UnavailableError
from nsa_plugin.core.metadata import PrecomputedMetadata, StepMetadata
from nsa_plugin.core.plan import ReplayPlan
from nsa_plugin.entry import disable, enable
from nsa_plugin.hookspec import hookimpl

__version__ = "0.1.0"

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
