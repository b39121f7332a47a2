"""Runs at start, when vLLM has made a draft: all ranks fuse it because of our updates in place, or none does.

vLLM decides in `DraftModelSpeculator.set_attn`, right after it has made the draft's attention groups. It fuses if the
builder of every group says that its metadata can be updated in place. A builder of ours says so only at that moment, only
in the draft's groups, and only for a draft of more than one step. Without such a draft no rank asks another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.probe import Need
from nsa_plugin.adapters.vllm import agreement, releases
from nsa_plugin.adapters.vllm.builders import row_of
from nsa_plugin.adapters.vllm.reports import report
from nsa_plugin.adapters.vllm.schedules import SCHEDULES
from nsa_plugin.adapters.vllm.v2 import switch as v2_switch
from nsa_plugin.adapters.vllm.v2.updates import PATH, Hooks, Served, served

SAYS = "supports_draft_decode_metadata_update"
ELASTIC = "elastic expert parallelism is not covered: ranks that share the draft come and go, and can't be asked"
"""All ranks have this setting, and so this objection: none asks another."""


def needs(speculator: str) -> tuple[Need, ...]:
    """What it takes of the speculator at a dotted path."""
    return (
        Need(
            f"{speculator}.{releases.CHOOSE[speculator]}",
            (),
            "choose the fused draft on all ranks or none",
            hooked=True,
        ),
    )


def hooks(host: Host, owner: type, live: Callable[[], bool]) -> Hooks:
    """The replacement of the method of `owner` that decides. If it is `live` it lets our builders speak, then calls vLLM's."""
    name = releases.CHOOSE[releases.speculator()]
    original = getattr(owner, name)

    @functools.wraps(original)
    def choose(speculator: Any, *args: Any, **kwargs: Any) -> Any:
        if live():
            try:
                _choose(host, speculator)
            except Exception as error:
                report(host, PATH).fell_back("capture", "graph", error)
        return original(speculator, *args, **kwargs)

    return MappingProxyType({name: choose})


def _choose(host: Host, speculator: Any) -> None:
    """Let the builders of the draft say whether they can be updated in place."""
    if speculator.num_speculative_steps == 1:
        return  # vLLM asks none of them
    builders = v2_switch.builders(speculator)
    ours = [(builder, how) for builder in builders if (how := served(builder)) is not None]
    if not ours:
        return
    refusals = _refusals(host, ours)
    lacking = [type(other).__name__ for other in builders if served(other) is None and not getattr(other, SAYS)]
    lacking = [f"{name} has no update in place" for name in lacking]
    lacking += [f"{type(each).__name__}: {why}" for each in builders if (why := _stale(host, each))]
    own = next(filter(None, (*refusals, *lacking)), "")
    off = _switched_off(host)
    problem = ELASTIC if agreement.is_elastic(speculator) else agreement.objection(own or off)
    v2_switch.chosen(
        host, speculator, fuses=not problem, refused_while_off=bool(off) and problem == off,
        scheduled=tuple(builder for builder, how in ours if how.row.changes in SCHEDULES),
    )  # fmt: skip
    for (builder, how), refusal in zip(ours, refusals, strict=True):
        setattr(builder, SAYS, not problem)
        why = refusal or problem
        said = report(host, how.path)
        if why:
            said.left_alone(why)
        else:
            said.using("graph")


def _refusals(host: Host, ours: list[tuple[Any, Served]]) -> list[str]:
    """For each of these builders why it is left to vLLM, or "". An error is an objection too: no rank waits for this one."""
    try:
        return [how.row.refused(builder) or how.row.left_by(host) for builder, how in ours]
    except Exception as error:
        report(host, PATH).fell_back("capture", "graph", error)
        return [f"{type(error).__name__}: {error}"] * len(ours)


def _stale(host: Host, builder: Any) -> str:
    """Empty, or that the builder's update is vLLM's own, which is not right, and that this adapter does not take its place."""
    row = row_of(builder)
    why = row.stale and (row.refused(builder) or row.left_by(host))
    return f"{row.stale}; {why}" if why else ""


def _switched_off(host: Host) -> str:
    if "graph" in host.strategies:
        return ""
    return "; ".join(("switched off", *host.reasons))
