"""The real sglang as the conformance kit sees it: multi-step drafts, target verify and draft extend of its DSA backends.

On a CPU a captured graph is emulated: what `init_forward_metadata_in_graph` launches during the capture is launched
again whenever the graph would run.
"""

from __future__ import annotations

import contextlib
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from nsa_plugin.adapters.base import Strategy
from nsa_plugin.adapters.sglang import hooked, refusals, releases, reports
from nsa_plugin.adapters.sglang.pools import foreign_formulas
from nsa_plugin.adapters.sglang.preparation import Preparation
from nsa_plugin.rigs.sglang import backends
from nsa_plugin.testing.engine import Case, Engine, Obstacle, Session, Values, without

LENGTHS: dict[int, list[tuple[list[int], list[int]]]] = {
    4: [
        ([63, 64, 65, 300], [3, 1, 0, 6]),
        ([380, 20, 257, 340], [2, 5, 7, 8]),
        ([5, 7, 2, 1], [9, 1, 2, 3]),
        ([130, 255, 1, 1], [4, 2, 0, 0]),
        ([1, 1, 1, 1], [0, 0, 0, 0]),
    ],
    2: [([5, 300], [4, 2])],
    1: [([350], [2]), ([9], [3])],
}
"""By captured size, lengths and rows of the token table: page edges, the longest, a shrinking one, one padded by two
requests (length 1, row 0, as sglang's runners pad), and an idle one, which is all padding."""
DRAFT = ("decode", "padded rows", "idle batch", "int64 lengths")
STANDARD = backends.Config(width=384)
"""As wide as three blocks of sglang's kernels: an interpreter runs their programs one by one."""
FLASHMLA = replace(STANDARD, decode_impl="flashmla_kv")
SMALL_PAGES = replace(STANDARD, page_size=1)
POOLED = replace(STANDARD, index_kpool=4)
POOLED_KEYS = ", pooled index keys"
SHIPPED_DEFECTS = frozenset({"paged_mqa_schedule_metadata", "topk_v2_plan"})
"""What sglang's own multi-step code leaves stale in the first three of more than two draft backends."""


@dataclass(frozen=True)
class SglangCase(Case):
    """A multi-step draft ("DECODE") or a single backend.

    `spare` rows make the buffers that come at a replay longer than the batch; `captured` is the type of the lengths at
    the capture (sglang's own draft runners before 0.5.15: int32).
    """

    mode: str = "DECODE"
    num_steps: int = 1
    config: backends.Config = STANDARD
    lengths: torch.dtype = torch.int64
    captured: torch.dtype = torch.int64
    sizes: tuple[int, ...] = (4,)
    spare: int = 0

    @property
    def column(self) -> str:
        """What the release matrix has it under."""
        return self.path if self.config.index_kpool == 1 else "pooled index keys"

    @property
    def batches(self) -> list[tuple[list[int], list[int]]]:
        """Lengths and rows of each round. With pooled index keys sglang extends no request by more tokens than it has."""
        found = [batch for size in self.sizes for batch in LENGTHS[size]]
        if self.config.index_kpool == 1 or self.mode != "DRAFT_EXTEND_V2":
            return found
        return [([max(length, self.config.draft_tokens) for length in lengths], rows) for lengths, rows in found]


def draft(num_steps: int, *covers: str, name: str = "", sizes: tuple[int, ...] = (4,), **fields: Any) -> SglangCase:
    """A draft of `num_steps` speculative steps, which has one backend fewer."""
    rounds = sum(len(LENGTHS[size]) for size in sizes)
    return SglangCase(
        f"{num_steps} speculative steps{name}", "draft decode", rounds, frozenset({*DRAFT, *covers}),
        frozenset() if num_steps < 4 or fields.get("config") is POOLED else SHIPPED_DEFECTS, frozenset({"share", "copy"}),
        "DECODE", num_steps, sizes=sizes, **fields,
    )  # fmt: skip


def single(mode: str, *covers: str, name: str = "", **fields: Any) -> SglangCase:
    """Target verify or draft extend."""
    path = reports.PATHS[reports.MODES[mode]]
    return SglangCase(
        path + name, path, len(LENGTHS[4]), frozenset(covers), frozenset(), frozenset({"share", "copy"}), mode, **fields
    )


CASES = (
    draft(4, "several steps"),
    single("TARGET_VERIFY", "target verify"),
    single("DRAFT_EXTEND_V2", "draft extend"),
    draft(2, "one step"),
    draft(3),
    draft(6),
    draft(9),
    draft(2, name=", flashmla_kv", config=FLASHMLA),
    draft(4, name=", flashmla_kv", config=FLASHMLA),
    draft(9, name=", flashmla_kv", config=FLASHMLA),
    single("TARGET_VERIFY", name=", flashmla_kv", config=FLASHMLA),
    single("DRAFT_EXTEND_V2", name=", flashmla_kv", config=FLASHMLA),
    draft(4, "several captured sizes", name=", several sizes", sizes=(4, 2, 1)),
    draft(4, "int32 lengths", name=", int32, longer buffers", lengths=torch.int32, captured=torch.int32, spare=3),
    draft(4, name=", captured with int32", captured=torch.int32),
    draft(4, name=", page size 1", config=SMALL_PAGES),
    draft(4, name=POOLED_KEYS, config=POOLED),
    single("TARGET_VERIFY", name=POOLED_KEYS, config=POOLED),
    single("DRAFT_EXTEND_V2", name=POOLED_KEYS, config=POOLED),
    draft(
        4,
        name=", page size 1, int32, longer buffers",
        config=SMALL_PAGES,
        lengths=torch.int32,
        captured=torch.int32,
        spare=3,
    ),
)
"""The first of each path is the one in which errors are planted."""


class SglangSession(Session):
    """A draft's, or one, backend of the real sglang with its captured sizes."""

    def __init__(self, case: SglangCase, device: torch.device) -> None:
        self._case = case
        table = backends.req_to_token(case.config, device)
        draft = case.mode == "DECODE"
        self._owner: Any = (
            backends.make_multi_step(case.config, table, case.num_steps)
            if draft
            else backends.make_backend(case.config, table)
        )
        self._backends = self._owner.attn_backends if draft else [self._owner]
        self._live = [make_batch(case, lengths, rows, device) for lengths, rows in case.batches]
        self._static: dict[int, Any] = {}
        self._preparations = [backends.preparation(self._owner, live) for live in self._live]
        self._captured: dict[int, list[Any]] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._batch: Any = None
        self._device = device
        for size in case.sizes:
            self._capture(size, device)

    def capture_again(self) -> None:
        """As when weights change and sglang is told to capture anew: new runners on the same backends."""
        config = self._case.config
        self._graphs.clear()
        self._owner.init_cuda_graph_state(
            config.max_batch_size, config.max_batch_size * (1 if self._case.mode == "DECODE" else config.draft_tokens)
        )
        for size in self._case.sizes:
            self._capture(size, self._device)

    def objects(self) -> Sequence[object]:
        """The draft's, and every backend."""
        return list({id(part): part for part in (self._owner, *self._backends)}.values())

    def _capture(self, size: int, device: torch.device) -> None:
        """As sglang's runners: with every request at the fill length 1, row 0; once without a graph, then with it."""
        static = self._static[size] = make_batch(
            replace(self._case, spare=0, lengths=self._case.captured), [1] * size, [0] * size, device
        )
        backends.before_capture(self._owner, static)
        # the captured kernels read what the backends hold now, whatever they hold later
        self._captured[size] = [backend.forward_metadata for backend in self._backends]
        backends.in_graph(self._owner, static)
        if device.type == "cuda":
            graph = self._graphs[size] = torch.cuda.CUDAGraph()
            spare = torch.zeros(1, device=device)
            with torch.cuda.graph(graph):
                spare.add_(1)  # a graph may not be empty
                backends.in_graph(self._owner, static)
        else:
            with mock.patch.object(hooked, "capturing", lambda: True):
                backends.in_graph(self._owner, static)

    def prepare(self, round: int) -> None:
        """As sglang's runners: the live batch goes into the static buffers, and a namespace stands for the batch."""
        self._batch = self._live[round]
        static = self._static[self._batch.batch_size]
        static.seq_lens.copy_(self._batch.seq_lens[: self._batch.batch_size])
        static.req_pool_indices.copy_(self._batch.req_pool_indices[: self._batch.batch_size])
        if self._batch.spec_info is not None:
            static.spec_info.num_accept_tokens.copy_(self._batch.spec_info.num_accept_tokens)
        self._preparations[round]()

    def read(self) -> list[Values]:
        """Run the graph; then the defined values of every backend's metadata.

        A graph runs what it has recorded, whatever the host says by then. So does what stands for one.
        """
        size = self._batch.batch_size
        if size in self._graphs:
            self._graphs[size].replay()
        else:
            with mock.patch.object(Preparation, "native", False):
                backends.in_graph(self._owner, self._static[size])
        return [
            read_values(self._case, metadata, backend, self._batch)
            for backend, metadata in zip(self._backends, self._captured[size], strict=True)
        ]

    def buffers(self) -> list[Values]:
        """All tensors of the metadata that was captured."""
        return [
            {name: value for name, value in _members(metadata).items() if isinstance(value, torch.Tensor)}
            for captured in self._captured.values()
            for metadata in captured
        ]


def make_batch(case: SglangCase, lengths: list[int], rows: list[int], device: torch.device) -> Any:
    """A `ForwardBatch`, with spare rows behind it."""
    size, spare = len(lengths), case.spare
    batch = backends.make_batch(
        case.mode,
        torch.tensor(lengths + [5] * spare, dtype=case.lengths, device=device),
        torch.tensor(rows + [2] * spare, device=device),
        size * (1 if case.mode == "DECODE" else case.config.draft_tokens),
    )
    batch.batch_size = size
    if case.config.index_kpool > 1 and case.mode == "DRAFT_EXTEND_V2":
        batch.spec_info = accepted(lengths, case.config, device)
    return batch


def accepted(lengths: Sequence[int], config: backends.Config, device: torch.device) -> SimpleNamespace:
    """The `spec_info` of a draft extend: of each request some of the drafts were accepted, one at least."""
    counts = [1 + length * 7 % config.draft_tokens for length in lengths]
    return SimpleNamespace(num_accept_tokens=torch.tensor(counts, dtype=torch.int32, device=device))


def _members(metadata: Any) -> dict[str, Any]:
    """The fields of a `DSAMetadata`, and those of its plan of writes with pooled index keys."""
    return {**vars(metadata), **vars(getattr(metadata, "kpool_write_plan", None) or SimpleNamespace())}


def read_values(case: SglangCase, metadata: Any, backend: Any, batch: Any) -> Values:
    """What kernels read: in a draft not the wide page table (tests/sglang/test_wide_table.py), unless it is the only one.

    With pooled index keys the top-k reads it.
    """
    values = backends.defined_values(metadata, backend, batch, reports.MODES[case.mode])
    if case.mode == "DECODE" and case.config.page_size > 1 and case.config.index_kpool == 1:
        values.pop("page_table_1", None)
    return values


class SglangEngine(Engine):
    """The installed sglang.

    Parameters
    ----------
    cases : sequence of SglangCase
    plugins : objects with hooks to use besides the built-in ones
    """

    name = "sglang"
    package = "sglang"
    logger = "sglang.srt.plugins.nsa_plugin"
    entry_point = "nsa_plugin.entry:register_sglang"
    strategies: tuple[Strategy, ...] = ("graph", "share", "copy")
    never: Mapping[str, str] = {
        "batch size 0": "graphs are captured for one request or more; an idle rank replays a batch that is all padding",
        "strided inputs": "sglang's runners pass contiguous buffers",
    }

    def __init__(self, cases: Sequence[SglangCase] = CASES, plugins: Sequence[object] = ()) -> None:
        self._cases = cases
        self._plugins = plugins
        if refusals.not_graph():  # 0.5.11, 0.5.12
            self.strategies = ("share", "copy")
        if problem := releases.lacking("draft extend"):  # before 0.5.15
            self._cases = [case for case in cases if case.mode != "DRAFT_EXTEND_V2"]
            self.never = {**self.never, "draft extend": problem}
        self.left_out: dict[str, str] = {}
        if problem := foreign_formulas(POOLED.index_kpool):  # before 0.5.22
            self.left_out["pooled index keys"] = problem
            self._cases = [case for case in self._cases if case.config.index_kpool == 1]
        forward_batch = pkgutil.resolve_name("sglang.srt.model_executor.forward_batch_info.ForwardBatch")
        self.batch_types = (forward_batch, SimpleNamespace)

    def plugins(self) -> Sequence[object]:
        """Nothing is needed besides the built-in adapter."""
        return self._plugins

    def cases(self) -> Sequence[SglangCase]:
        """Drafts of 2 to 9 speculative steps, target verify, draft extend."""
        return self._cases

    def expected(self, case: Case) -> list[list[Values]]:
        """What sglang's per-backend code computes: the same for every draft backend."""
        assert isinstance(case, SglangCase)
        backend = backends.make_backend(case.config, backends.req_to_token(case.config, self.device))
        consumers = max(case.num_steps - 1, 1)
        rounds = []
        for lengths, rows in case.batches:
            batch = make_batch(case, lengths, rows, self.device)
            exact = backends.make_batch(
                case.mode,
                batch.seq_lens[: len(lengths)],
                batch.req_pool_indices[: len(lengths)],
                batch.input_ids.numel(),
            )
            exact.spec_info = batch.spec_info
            metadata = backends.engine_metadata(backend, exact, case.mode)
            rounds.append([read_values(case, metadata, backend, exact)] * consumers)
        return rounds

    def start(self, case: Case) -> Session:
        """Real backends with captured sizes."""
        assert isinstance(case, SglangCase)
        return SglangSession(case, self.device)

    def patched(self) -> Sequence[object]:
        """The two backend classes."""
        return [
            pkgutil.resolve_name(path) for path in (releases.generation().multi_step, releases.generation().backend)
        ]

    def state(self) -> object:
        """sglang's own books on hooks."""
        registry = pkgutil.resolve_name("sglang.srt.plugins.hook_registry.HookRegistry")
        hooks: dict[str, list[object]] = getattr(registry, "_hooks", {})
        return {target: list(entries) for target, entries in hooks.items()}, set(getattr(registry, "_patched", ()))

    def obstacles(self) -> Sequence[Obstacle]:
        """Each need in turn, and an installation that breaks off half-way."""
        # members of an Enum can't be taken out
        removable = [
            need for need in releases.generation().needs() if not re.search(r"\.(ForwardMode|HookType)\.", need.path)
        ]
        absent = [Obstacle(need.path.rpartition(".")[2], without(need.path)) for need in removable]
        return [*absent, Obstacle("the third hook fails", _third_hook_fails(), probed=False)]

    def running(self) -> AbstractContextManager[object]:
        """With stand-ins for compiled kernels on a CPU."""
        return backends.stand_ins()


@contextlib.contextmanager
def _third_hook_fails() -> Iterator[None]:
    from sglang.srt.plugins.hook_registry import HookRegistry

    register, calls = HookRegistry.register, []

    def failing(target: str, hook: Any, hook_type: Any = None, *arguments: Any, **keywords: Any) -> None:
        calls.append(target)
        if len(calls) > 2:
            raise RuntimeError("planted")
        register(target, hook, hook_type, *arguments, **keywords)

    with mock.patch.object(HookRegistry, "register", failing):
        yield
