"""At start and at undo: the adapter probes sglang, puts hooks on the methods of its `ledger`, and takes them off again."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from nsa_plugin.adapters.base import Host, PathPlan
from nsa_plugin.adapters.probe import Need, installed_version, untested, warn_if_untested, warn_of_untested
from nsa_plugin.adapters.sglang import registry, releases
from nsa_plugin.adapters.sglang.backends import MultiStepDraft, SingleBackend
from nsa_plugin.adapters.sglang.dense import ROWS as DENSE
from nsa_plugin.adapters.sglang.dense import DenseDraft, DenseRow, DenseSingle
from nsa_plugin.adapters.sglang.glue import GlueGraphs
from nsa_plugin.adapters.sglang.hooked import HookedBackend
from nsa_plugin.adapters.sglang.ledger import HookRow, rows
from nsa_plugin.adapters.sglang.recorded import ROWS as RECORDED
from nsa_plugin.adapters.sglang.recorded import RecordedBySglang
from nsa_plugin.adapters.sglang.refusals import not_graph, repairs, usable
from nsa_plugin.adapters.sglang.reports import ENGINE, logger
from nsa_plugin.adapters.sglang.rows import BackendRow

DENSE_ROWS: tuple[BackendRow, ...] = (*DENSE, *RECORDED)


class SglangAdapter:
    """Implements `nsa_plugin.adapters.base.Adapter` for sglang's DSA backends."""

    name = ENGINE
    features = frozenset({"verify", "step_lengths"})

    def __init__(self) -> None:
        self._host: Host | None = None
        self._backends: tuple[HookedBackend | RecordedBySglang, ...] = ()
        self._glue = GlueGraphs()
        self._hooks: dict[str, Callable[..., Any]] = {}
        self._left_alone = ""

    def probe(self) -> list[str]:
        """What the installed sglang lacks; empty if it fits."""
        return releases.probe()

    def untested(self) -> list[str]:
        """Hooked functions of the installed sglang with parameters that no tested release has."""
        return untested(_every_need(None))

    def install(self, host: Host) -> list[str]:
        """Hook sglang, completely or not at all; returns the problems that kept it from doing so."""
        if self._hooks:
            return []
        if problems := self.probe():
            return problems
        self._left_alone = releases.lacking("draft extend")
        warn_if_untested(logger, "sglang", releases.TESTED)
        warn_of_untested(logger, _every_need(host))
        glue = GlueGraphs()
        recorded = RecordedBySglang(host)
        dense = DenseDraft(host, glue), DenseSingle(host, glue, recorded)
        served = MultiStepDraft(host, glue), SingleBackend(host, glue), *dense, recorded
        made: dict[type, object] = {type(one): one for one in (*served, glue)}
        hooks: dict[str, Callable[..., Any]] = {
            row.target: MethodType(row.hook, made[row.hooked_by]) for row in rows(host)
        }
        if covered := registry.covered(hooks):
            return [
                f"looked for sglang's own hooks on {target}, found another patch over them; install this plugin before what "
                "patches it"
                for target in covered
            ]
        self._host, self._backends, self._glue, self._hooks = host, served, glue, hooks
        try:
            registry.put_on(hooks)
        except Exception:
            self.undo()
            raise
        return []

    def undo(self) -> None:
        """Put back every attribute that was replaced, by identity. Other plugins' hooks on the same methods stay.

        CUDA graphs go on reading the buffers that they were captured with. Draft backends that shared buffers therefore go
        on sharing them; sglang's own code fills them with equal values.
        """
        if not self._hooks:
            return
        recorded = sorted({path for served in self._backends for path in served.undo()})
        self._glue.undo()
        if recorded:
            logger.warning(
                "nsa-plugin: %s: CUDA graphs go on with the work that they recorded; a new capture, or a restart, frees them "
                "of it",
                ", ".join(recorded),
            )
        for target in registry.take_off(self._hooks):
            logger.warning("nsa-plugin: another patch covers the hook of %s: it stays there, and does nothing", target)
        self._host, self._backends, self._hooks = None, (), {}

    def ledger(self) -> tuple[HookRow, ...]:
        """Every attribute that `install` replaces in the installed sglang, a row each, with its hook.

        Before, these are the rows of all settings; some are for settings that name a strategy.
        """
        return rows(self._host)

    def summary(self) -> str:
        """What is accelerated and what is left to the engine, for one log line."""
        served = ["the multi-step draft", "target verify"] + ([] if self._left_alone else ["draft extend"])
        text = f"sglang {installed_version('sglang')}: metadata of {', '.join(served)} is computed once"
        return text + (f"; draft extend is left to sglang: {self._left_alone}" if self._left_alone else "")

    def switch(self, on: bool) -> list[str]:
        """What takes a new capture. Replays look at the host's switch, and so does what graphs have recorded."""
        return [f"{ENGINE}: {line}" for served in self._backends for line in served.captured_off()] if on else []

    def paths(self, host: Host) -> list[PathPlan]:
        """What would be done for each path with the host's settings. Asks the installed sglang, captures nothing."""
        problems = self.probe()
        problem = problems[0] if problems else ""
        extend = problem or releases.lacking("draft extend")
        needs = {"draft decode": problem, "target verify": problem, "draft extend": extend}
        plans = [PathPlan(path, *_plan(host, lacking)) for path, lacking in needs.items()]
        return [*plans, *(PathPlan(row.path, *_dense_plan(host, row, problem), row.gpus) for row in DENSE_ROWS)]


def _plan(host: Host, problem: str) -> tuple[str, str]:
    """The strategy that would be tried first, and why not a better one."""
    if problem:
        return "off", problem
    asked = host.strategies
    if not asked:
        return "off", "switched off"
    strategies = usable(asked, host)
    if strategies[0] == "graph":
        return "graph", ""
    if asked[0] == "graph" and (why := not_graph()):
        return strategies[0], why
    if repairs(host) and asked[0] == "graph":
        return strategies[0], "NSA_PLUGIN_VERIFY: what a CUDA graph computes can't be repaired before it is used"
    return strategies[0], "NSA_PLUGIN_STRATEGY asks for it"


def _dense_plan(host: Host, row: BackendRow, problem: str) -> tuple[str, str]:
    """The same for dense backends. What the settings leave out is not looked for."""
    why = "" if host.strategies else "switched off"
    if why := problem or why or row.left_out(host) or releases.lacking(row.part):
        return "off", why
    return _plan(host, "") if isinstance(row, DenseRow) else ("graph", "")


def _every_need(host: Host | None) -> tuple[Need, ...]:
    """Everything that hooks need. What the host's settings leave out, or all that `auto` leaves out, is not imported."""
    left_out = (row.part for row in DENSE_ROWS if (not row.proved if host is None else row.left_out(host)))
    return releases.every_need(tuple(left_out))
