"""The two backend classes: which backends and batches their hooks are about, and what is shared beyond the metadata."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from nsa_plugin.adapters.attached import Attached
from nsa_plugin.adapters.base import Host
from nsa_plugin.adapters.sglang.describe import batch_to_capture, batch_to_replay
from nsa_plugin.adapters.sglang.glue import GlueGraphs
from nsa_plugin.adapters.sglang.paths import Path, argument, unsupported
from nsa_plugin.adapters.sglang.releases import lacking
from nsa_plugin.adapters.sglang.reports import logger, report
from nsa_plugin.core.metadata import same_buffer

ALLOCATION = "init_cuda_graph_state"


class MultiStepDraft(Path):
    """`DeepseekSparseAttnMultiStepBackend`: all draft backends at once, always as DECODE."""

    batch_to_capture = staticmethod(lambda forward_batch, *others, **more: forward_batch)
    batch_to_replay = staticmethod(lambda forward_batch, bs, *others, **more: forward_batch)  # its batch_size is bs

    def __init__(self, host: Host, glue: GlueGraphs) -> None:
        super().__init__(host, glue)
        from sglang.srt.model_executor.forward_batch_info import ForwardMode as NativeMode

        self._decode = NativeMode.DECODE
        self._shares_topk: Attached[bool] = Attached("shares_topk")

    def hooks(self) -> dict[str, Callable[..., None]]:
        """Also the allocation of the CUDA-graph buffers, and what the draft model says of its drafts."""
        more = {"init_cuda_graph_state": self.cuda_graph_state}
        if not lacking("exact step lengths"):
            more["__init__"] = self.made
        return super().hooks() | more

    def backends(self, owner: Any) -> Sequence[Any]:
        """The draft backends."""
        backends: Sequence[Any] = owner.attn_backends
        return backends

    def native_mode(self, owner: Any, batch: Any) -> Any:
        """DECODE, if there is a draft backend at all."""
        return self._decode if owner.attn_backends else None

    def wide_table_is_unread(self, backend: Any) -> bool:
        """What sglang's own `init_cuda_graph_state` decides for a decode without speculation.

        Its attention then reads top-k indices and its indexer the real page table; what sglang keeps the wide table for
        in a speculative run is its own multi-step preparation, and verify and extend, which other backends do.
        """
        probe: Any = object.__new__(type(backend))
        vars(probe).update(vars(backend), speculative_num_draft_tokens=None)
        probe.init_cuda_graph_state(1, 1)
        return bool(getattr(probe, "dsa_drop_wide_page_table", False))

    def exact(self, owner: Any, batch: Any) -> bool:
        """If it was asked for, and every step has tokens of its own to see: a chain, with an indexer run per step.

        sglang has reserved the slots of the draft tokens, and its token table has their columns, before it drafts
        (`speculative.eagle_worker_common.prepare_for_draft` reads them there).
        """
        if not self._host.exact_step_lengths:
            return False
        problem = ""
        if getattr(owner, "topk", 1) != 1:
            problem = "the draft is a tree (--speculative-eagle-topk above 1)"
        elif getattr(batch.spec_info, "dsa_topk_indices", None) is not None or (known := self._shares_topk.get(owner)):
            problem = "all steps use the top-k indices of one (index_share_for_mtp_iteration)"
        elif known is None:
            problem = (
                "whether its steps share top-k indices is not known: the draft was made before the plugin was installed"
            )
        elif any(same_buffer(lengths, batch.seq_lens) for lengths in self._lengths(owner, batch.batch_size)):
            problem = "all steps read the lengths of the batch itself, of which there is one set"
        if problem:
            report(self._host, self._decode).using(f"with sglang's own step lengths: {problem}")
        return not problem

    def _lengths(self, owner: Any, batch_size: int) -> list[torch.Tensor]:
        """The lengths that each backend reads. Up to 0.5.14 they are the runner's own where those are int32."""
        held = [backend.decode_cuda_graph_metadata[batch_size] for backend in self.backends(owner)]
        return [metadata.cache_seqlens_int32 for metadata in held]

    def made(self, original: Callable[..., None], owner: Any, *arguments: Any, **keywords: Any) -> None:
        """Stand in for `__init__`: keep what the draft model's configuration says.

        sglang's draft workers decide by the same attribute. A batch shows it in some releases and for some workers only.
        """
        original(owner, *arguments, **keywords)
        model_runner = argument("model_runner", 0, arguments, keywords)
        try:
            config = model_runner.model_config.hf_config
        except AttributeError:
            return
        self._shares_topk.setdefault(owner, bool(getattr(config, "index_share_for_mtp_iteration", False)))

    def undo(self) -> list[str]:
        """Forget what drafts there are, too."""
        self._shares_topk.clear()
        return super().undo()

    def cuda_graph_state(self, original: Callable[..., None], owner: Any, *arguments: Any, **keywords: Any) -> None:
        """Stand in for `init_cuda_graph_state`: one page table for all draft backends, which hold equal values always.

        sglang's own code runs for each backend in turn; the page table of each but the first is dropped before the next
        one's is made.
        """
        backends = self.backends(owner)
        if self._undone or "share" not in self._host.strategies or not backends or unsupported(backends[0]):
            original(owner, *arguments, **keywords)
            return
        first, *others = backends
        given_back = [0]
        for backend in others:
            vars(backend)[ALLOCATION] = _allocation_over(backend, first, given_back)
        try:
            original(owner, *arguments, **keywords)
        finally:
            for backend in others:
                vars(backend).pop(ALLOCATION, None)
        if given_back[0]:
            logger.info(
                "nsa-plugin: draft decode: %d draft backends share one page table; %.1f MiB given back",
                len(backends),
                given_back[0] / 2**20,
            )


class SingleBackend(Path):
    """`DeepseekSparseAttnBackend`: target verify and draft extend. Its decode belongs to no draft and is left alone."""

    batch_to_capture = staticmethod(batch_to_capture)
    batch_to_replay = staticmethod(batch_to_replay)

    def __init__(self, host: Host, glue: GlueGraphs) -> None:
        super().__init__(host, glue)
        from sglang.srt.model_executor.forward_batch_info import ForwardMode as NativeMode

        self._modes = {NativeMode.TARGET_VERIFY}
        if not lacking("draft extend"):
            self._modes.add(NativeMode.DRAFT_EXTEND_V2)

    def backends(self, owner: Any) -> Sequence[Any]:
        """The backend itself."""
        return (owner,)

    def native_mode(self, owner: Any, batch: Any) -> Any:
        """The batch's mode, if it is one of the two."""
        mode = batch.forward_mode
        return mode if mode in self._modes else None


def _allocation_over(backend: Any, first: Any, given_back: list[int]) -> Callable[..., None]:
    """The backend's `init_cuda_graph_state`, which then drops its page tables for those of `first`."""
    own = getattr(backend, ALLOCATION)

    def allocate(*arguments: Any, **keywords: Any) -> None:
        own(*arguments, **keywords)
        theirs, shared = backend.decode_cuda_graph_metadata, first.decode_cuda_graph_metadata
        for name in ("page_table", "real_page_table"):
            table, other = theirs.get(name), shared.get(name)
            if isinstance(table, torch.Tensor) and isinstance(other, torch.Tensor) and table.shape == other.shape:
                given_back[0] += table.numel() * table.element_size()
                theirs[name] = other

    return allocate
