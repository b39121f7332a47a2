"""Runs when vLLM imports its speculator: the hooks of a fused draft, put together.

One kernel per step (`step`), the choice at every draft whether the graph is used (`switch`), observers (`observed`), and
what watches drafts where the settings ask that they be verified or measured (`verified.watch`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MappingProxyType

from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.probe import missing
from nsa_plugin.adapters.vllm import releases
from nsa_plugin.adapters.vllm.reports import logger, report
from nsa_plugin.adapters.vllm.v2 import step, switch
from nsa_plugin.adapters.vllm.v2.observed import ObservedDrafts
from nsa_plugin.adapters.vllm.v2.step import PATH, Hooks
from nsa_plugin.adapters.vllm.v2.verified import watch


def hooks(host: Host, owner: type, live: Callable[[], bool]) -> Hooks:
    """Replacements of the methods of `owner`, one of `releases.SPECULATORS`, by name.

    They pass their calls on to the originals when they are not `live`, or the plugin is off.
    """
    begin, watching = switch.planned(host, getattr(owner, switch.BEGIN)), watch.watch(host, live)
    if watching is not None and (problems := missing(releases.WATCH_NEEDS)):
        logger.warning("nsa-plugin: %s: drafts are neither verified nor measured: %s", PATH, "; ".join(problems))
        watching = None
    observed = ObservedDrafts(report(host, PATH))
    draft = observed.around(begin if watching is None else watching.begin(begin), live)
    replaced = functools.wraps(begin)(switch.begin(host, live, draft))
    return MappingProxyType({**step.hooks(host, owner, live, observed, watching), switch.BEGIN: replaced})
