"""Runs at every draft of a backend that plans on the host: one plan serves all steps of a fused draft.

FlashInfer's sparse MLA for Hopper bakes the lengths of all rows into work items on the host, which no CUDA graph can record.
vLLM plans from upper bounds, and clamps each work item on the device to what the batch really has. In a fused draft the
clamp is recorded at each step, and the plan is made before the draft, for the longest lengths that its steps can reach. vLLM's
own `plan` does it, and keeps a plan that still fits. It has the row count of the captured batch, as the recorded clamp has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nsa_plugin.adapters.attached import Attached
from nsa_plugin.adapters.side_by_side import capturing
from nsa_plugin.adapters.vllm import releases
from nsa_plugin.adapters.vllm.builders import FLASHINFER_SPARSE_SM90, row_of


@dataclass(frozen=True)
class Recorded:
    """The clamp that a graph of one captured size may hold.

    Attributes
    ----------
    metadata : FlashInferMLASparseSM90Metadata
        Of the captured batch.
    places : tuple
        What the recorded clamp goes by: where the plan is.
    """

    metadata: Any
    places: tuple[Any, ...]


recorded: Attached[dict[int, Recorded]] = Attached("recorded_plans")
"""By builder and rows."""


def clamp(builder: Any, metadata: Any) -> None:
    """Clamp the plan to the lengths that are there; capture-safe."""
    rows, known = metadata.num_decode_tokens, recorded.setdefault(builder, {})
    if capturing() or rows not in known:  # a draft that no graph runs says nothing of where a graph reads
        known[rows] = Recorded(metadata, _places(builder.state))
    builder.state._clamp_kv_end(metadata, metadata.req_id_per_token)


def around(original: Callable[..., Any], leave: Callable[..., Any]) -> Callable[..., Any]:
    """In place of a speculator's method that begins a fused draft: it plans first.

    Parameters
    ----------
    original : callable
        The method.
    leave : callable
        `leave(speculator, error, ...)`: drafts without the graph, whose plan can't be made.
    """

    @functools.wraps(original)
    def fused_multi_step_decode(
        speculator: Any, num_reqs: int, skip_attn: bool, batch_desc: Any, num_tokens_across_dp: Any,
        seq_lens_cpu_upper_bound: torch.Tensor, num_speculative_steps: int, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        planned = planning(speculator)
        bound = seq_lens_cpu_upper_bound
        if planned:
            captured = batch_desc.cg_mode.name == "FULL"
            tokens = releases.captured_steps(speculator, batch_desc) if captured else num_speculative_steps
            if captured:
                try:
                    for builder in planned:
                        _plan(builder, num_reqs, batch_desc.num_reqs, bound + tokens - 1, speculator.max_model_len)
                except Exception as error:
                    return leave(
                        speculator, error, num_reqs, skip_attn, batch_desc, num_tokens_across_dp, bound,
                        num_speculative_steps, *args, **kwargs,
                    )  # fmt: skip
            else:  # vLLM builds, and plans, for the first step alone
                bound = bound + (tokens - 2)
        return original(
            speculator, num_reqs, skip_attn, batch_desc, num_tokens_across_dp, bound, num_speculative_steps, *args, **kwargs
        )  # fmt: skip

    return fused_multi_step_decode


def planning(speculator: Any) -> list[Any]:
    """The builders of a draft that plan on the host."""
    builders = [group.get_metadata_builder() for group in releases.groups_of(speculator)]
    return [builder for builder in builders if row_of(builder) is FLASHINFER_SPARSE_SM90]


def _plan(builder: Any, num_reqs: int, rows: int, bound: torch.Tensor, longest: int) -> None:
    """Plan for `rows` requests of which `num_reqs` are no padding, each with at most `bound` [>= num_reqs] tokens."""
    captured, state = (recorded.get(builder) or {}).get(rows), builder.state
    if captured is None:
        return  # this adapter's steps are not in the graph
    lengths = torch.zeros(rows, dtype=torch.int64)
    lengths[:num_reqs] = bound[:num_reqs].clamp(max=min(longest, state.max_valid))
    state.plan(rows, lengths, captured.metadata, captured.metadata.req_id_per_token)
    if (found := _places(state)) != captured.places:
        raise RuntimeError(f"expected the plan where it was captured, {captured.places}, got {found}")


def _places(state: Any) -> tuple[Any, ...]:
    return (state._plan_offsets, state._int_ws.data_ptr(), state._saved_kv_end.data_ptr())
