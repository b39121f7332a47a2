"""At start: every attribute of sglang that is replaced, a row each, with the reason and the hook that stands in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.ledger import LedgerRow
from nsa_plugin.adapters.sglang.backends import MultiStepDraft, SingleBackend
from nsa_plugin.adapters.sglang.dense import ROWS as DENSE
from nsa_plugin.adapters.sglang.dense import DenseBackends, DenseDraft, DenseSingle
from nsa_plugin.adapters.sglang.glue import GlueGraphs
from nsa_plugin.adapters.sglang.recorded import ROWS as RECORDED
from nsa_plugin.adapters.sglang.releases import GLUE_GRAPH, IN, OUT, Part, generation, lacking

UPSTREAM = (
    "sglang pull requests 14781, 17554 and 29499 go part of the way; 38213, the reuse of a draft's metadata, is open"
)
"""What of the work below sglang has taken up."""
NOT_PROPOSED = "not proposed"
ONCE = "sglang computes the metadata of a draft once, and fresh for every backend"


@dataclass(frozen=True)
class HookRow(LedgerRow):
    """A patch with its hook.

    Attributes
    ----------
    hooked_by : type
        The class of the object that the hook gets first; an installation makes one object of each class.
    hook : callable(object, original, owner, *arguments, **keywords)
        What stands in for the method. `owner` is the object of sglang whose method is called.
    """

    hooked_by: type
    hook: Callable[..., Any]


def rows(host: Host | None = None) -> tuple[HookRow, ...]:
    """The rows of the installed sglang. A row that it has no use for is left out, by what is there.

    `host` says which rows its settings leave out; without it, the settings leave out none.
    """
    found = generation()
    drafts = (
        HookRow(
            f"{found.multi_step}.{entry.method}",
            "All draft backends get their metadata from one computation. sglang's own code also leaves the DeepGEMM "
            "schedule and the top-k plan of the first three backends stale where there are more than two.",
            UPSTREAM,
            ONCE,
            entry.runs,
            MultiStepDraft,
            entry.hook,
        )
        for entry in found.draft_entries
    )
    singles = (
        HookRow(
            f"{found.backend}.{entry.method}",
            "Target verify and draft extend get their metadata from the same computation.",
            UPSTREAM,
            "sglang computes the metadata of a batch in one launch",
            entry.runs,
            SingleBackend,
            entry.hook,
        )
        for entry in found.single_entries
    )
    tables = HookRow(
        f"{found.multi_step}.init_cuda_graph_state",
        "All draft backends share one page table. Each of sglang's own has one, and all hold equal values.",
        NOT_PROPOSED,
        "sglang's draft backends share their page table",
        "when CUDA-graph buffers are made, before the captures",
        MultiStepDraft,
        MultiStepDraft.cuda_graph_state,
    )
    optional: dict[Part, HookRow] = {
        "exact step lengths": HookRow(
            f"{found.multi_step}.__init__",
            "Exact step lengths ask whether draft steps share top-k indices. The draft model's configuration says so.",
            NOT_PROPOSED,
            "the batches of every draft worker say it",
            "when a draft is made",
            MultiStepDraft,
            MultiStepDraft.made,
        ),
        "glue graph": HookRow(
            f"{GLUE_GRAPH}.run",
            "sglang would record the hooked methods in a graph, and call them no more: no verification, no switch.",
            NOT_PROPOSED,
            "sglang's glue graph is gone, or asks a backend before it records",
            "before each replay that a glue graph prepares",
            GlueGraphs,
            GlueGraphs.run,
        ),
        "captured glue graph": HookRow(
            f"{GLUE_GRAPH}.is_captured",
            "sglang would replay a glue graph that it recorded while the plugin was off.",
            NOT_PROPOSED,
            "sglang's glue graph is gone, or asks a backend before it replays",
            "before each replay that a glue graph may prepare",
            GlueGraphs,
            GlueGraphs.is_captured,
        ),
    }
    return (*drafts, tables, *singles, *(row for part, row in optional.items() if not lacking(part)), *_dense(host))


def _dense(host: Host | None) -> Iterator[HookRow]:
    """The methods of dense backends, each once, however many rows of a table are about its class."""
    capture, within = "before each capture and each replay", "inside each capture"
    why = {row.backend: row for row in DENSE if row.is_taken(host)}
    for backend, row in why.items():
        if row.draft:
            yield HookRow(
                f"{backend}.init_cuda_graph_state",
                "All draft backends share one page table. Each of sglang's own has several, and uses one.",
                NOT_PROPOSED,
                "sglang's draft backends share their page table",
                "when CUDA-graph buffers are made, before the captures",
                DenseDraft,
                DenseDraft.cuda_graph_state,
            )
        served: type[DenseBackends] = DenseDraft if row.draft else DenseSingle
        what = "Draft steps" if row.draft else "Target verify and draft extend"
        hooks: tuple[tuple[str, str, Callable[..., None]], ...] = (
            (OUT, capture, served.out_graph),
            (IN, within, served.in_graph),
        )
        for method, runs, hook in hooks:
            yield HookRow(
                f"{backend}.{method}",
                f"{what} get their metadata from one launch, recorded in the CUDA graph that reads it.",
                NOT_PROPOSED,
                ONCE,
                runs,
                served,
                hook,
            )
    recorded = dict.fromkeys(row.backend for row in RECORDED if row.is_taken(host) and row.backend not in why)
    for backend in recorded:
        for method, runs, hook in ((OUT, capture, DenseSingle.out_graph), (IN, within, DenseSingle.in_graph)):
            yield HookRow(
                f"{backend}.{method}",
                "sglang's draft extend graph computes its metadata, and its runner computes the same before each replay, "
                "over the whole width of the page table. The second computation is left out.",
                NOT_PROPOSED,
                "sglang's runner asks draft_extend_metadata_captured_in_graph",
                runs,
                DenseSingle,
                hook,
            )
