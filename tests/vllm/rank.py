"""One of several ranks with gloo between them, which has loaded the plugin through vLLM."""

from __future__ import annotations

import functools
import logging
from types import SimpleNamespace
from typing import Any
from unittest import mock

TOKENS = 4
BATCHES = (([100, 107, 126, 65], [1, 0, 2, 2], 1), ([63, 64, 700], [0, 0, 0], 70), ([300], [1], 140))
"""Lengths, rejected tokens and first block; smaller ones are padded to the captured size of four."""
FORWARD, LOGITS, PADDING = range(3)
"""Kinds of collectives: of the model's layers, of its logits, and vLLM's own agreement on padding across data parallel ranks."""


class Lines(logging.Filter):
    """Keeps what is logged. Not a handler: vLLM takes those off when it configures logging."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep it, and let it pass."""
        self.records.append(record)
        return True


class Rank:
    """One rank: its draft, and the sequence of collectives that it issues.

    Parameters
    ----------
    data_parallel : bool
        Whether ranks have batches of their own; else they share the tensors of one.
    stages : int
        Of the pipeline.
    """

    def __init__(self, rank: int, world: int, store: str, data_parallel: bool = False, stages: int = 1) -> None:
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.distributed import parallel_state
        from vllm.plugins import load_general_plugins
        from vllm.v1.worker.gpu import dp_utils

        self.rank, self.world, self.data_parallel, self.lines = rank, world, data_parallel, Lines()
        self.issued: list[tuple[int, int]] = []
        self.unmatched: list[Any] = []
        self.alone = False
        logging.getLogger("vllm.plugins.nsa_plugin").addFilter(self.lines)
        load_general_plugins()
        load_general_plugins()
        parallel_state.init_distributed_environment(world, rank, store, rank, "gloo")
        config = VllmConfig()
        config.parallel_config.data_parallel_size = world if data_parallel else 1
        config.parallel_config.data_parallel_rank = rank if data_parallel else 0
        with set_current_vllm_config(config):
            parallel_state.ensure_model_parallel_initialized(1 if data_parallel else world // stages, stages)
        agree = dp_utils.sync_cudagraph_and_dp_padding

        @functools.wraps(agree)
        def padding(*arguments: Any, **named: Any) -> Any:
            self.collective(PADDING, 0)
            return agree(*arguments, **named)

        dp_utils.sync_cudagraph_and_dp_padding = padding

    def collective(self, kind: int, size: int) -> None:
        """Issue one, unless alone; every rank's must be the same."""
        import torch
        import torch.distributed as dist

        self.issued.append((kind, size))
        if self.alone:
            return
        mine = torch.tensor([len(self.issued), kind, size])
        every = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(every, mine)
        if any(not torch.equal(other, mine) for other in every):
            self.unmatched.append([other.tolist() for other in every])

    def draft(self) -> Any:
        """A speculator whose model and graphs issue this rank's collectives."""
        import torch
        from vllm.config.compilation import CUDAGraphMode
        from vllm.forward_context import get_forward_context

        from nsa_plugin.rigs.vllm import v2_draft as vllm_draft

        issue, world = self.collective, self.world if self.data_parallel else 1

        class Model(vllm_draft.DraftModel):
            """With collectives; writes nothing down for a batch without metadata."""

            def forward(self, input_ids: Any, positions: Any, hidden_states: Any, inputs_embeds: Any = None) -> Any:
                context = get_forward_context()
                assert (context.dp_metadata is not None) == (world > 1)
                tokens = hidden_states.shape[0]
                if context.dp_metadata is not None:  # ranks run unequal numbers, but know the same largest one
                    tokens = int(context.dp_metadata.num_tokens_across_dp_cpu.max())
                issue(FORWARD, tokens)
                if not context.attn_metadata:
                    return hidden_states.clone(), hidden_states.clone()
                return super().forward(input_ids, positions, hidden_states, inputs_embeds)

            def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
                issue(LOGITS, 0)  # of the rank's own requests under data parallelism: no size that must match
                return super().compute_logits(hidden)

        class Graphs(vllm_draft.Graphs):
            """Replays what vLLM's `capture` was given."""

            def capture(self, body: Any, *_: Any, **__: Any) -> None:
                """The warm-up of one captured size."""
                self._body = body
                self.run_fullgraph(None)

            def run_fullgraph(self, descriptor: Any) -> None:
                """The body, with the captured tensors."""
                size = vllm_draft.CAPTURED
                across = torch.full((world,), size, dtype=torch.int32) if world > 1 else None
                self._body(size, size, self._metadata, self._slots, across, CUDAGraphMode.NONE, TOKENS)

        made = vllm_draft.Draft("auto", 4, TOKENS)
        speculator = made.speculator
        speculator.model = made.model = Model()
        speculator.dp_size, speculator.dp_rank = world, self.rank if self.data_parallel else 0
        made.config.parallel_config.data_parallel_size = world
        made.config.parallel_config.data_parallel_rank = speculator.dp_rank
        speculator.decode_cudagraph_manager = Graphs(made)
        return made

    def made(self, capture: bool = False) -> dict[str, Any]:
        """Whether one more draft is fused, what was logged meanwhile, and what its capture issued."""
        self.lines.records.clear()
        draft = self.draft()
        return {
            "fused": draft.fused, "capture": self.capture(draft) if capture else [],
            "warnings": self.said(logging.WARNING), "errors": self.said(logging.ERROR),
        }  # fmt: skip

    def capture(self, draft: Any) -> list[tuple[int, int]]:
        """Let vLLM capture; returns the collectives that this issued."""
        from vllm.config import set_current_vllm_config

        self.issued.clear()
        nothing = SimpleNamespace(use_breakable_cg=False, capture=lambda *_, **__: None)
        with (
            mock.patch.object(draft.speculator, "prefill_cudagraph_manager", nothing),
            set_current_vllm_config(draft.config),
        ):
            draft.speculator.capture()
        return list(self.issued)

    def rounds(self, draft: Any, idle: tuple[int, ...] = ()) -> dict[str, Any]:
        """Draft for every batch, or take part with a dummy one.

        Returns what each draft step saw, the collectives, those that did not match, and what was logged.
        """
        self.issued.clear()
        seen: list[Any] = []
        for lengths, rejected, first_block in BATCHES:
            if self.rank in idle:
                self.dummy(draft)
            else:
                steps = draft.propose(lengths, rejected, first_block)
                seen += [{name: value.tolist() for name, value in step.items()} for step in steps]
        return {
            "fused": draft.speculator.supports_decode_metadata_update, "seen": seen, "issued": list(self.issued),
            "unmatched": self.unmatched, "warnings": self.said(logging.WARNING), "errors": self.said(logging.ERROR),
        }  # fmt: skip

    def dummy(self, draft: Any) -> None:
        """As vLLM's runner does on a rank without requests."""
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.v1.worker.gpu.input_batch import InputBatch

        width = TOKENS + 1
        batch = InputBatch.make_dummy(1, width, draft.buffers, max_query_len=width, is_padding=True)
        state = [torch.zeros(16, dtype=dtype) for dtype in (torch.int64, torch.int32, torch.float32, torch.int64)]
        counts = torch.ones(1, dtype=torch.int32)
        with set_current_vllm_config(draft.config):
            draft.speculator.propose(
                batch, {}, {}, torch.zeros(width, 128).bfloat16(), None, counts, counts - 1, *state, dummy_run=True,
                skip_attn_for_dummy_run=True,
            )  # fmt: skip

    def said(self, level: int) -> list[str]:
        """What was logged at that level."""
        return [record.getMessage() for record in self.lines.records if record.levelno == level]
