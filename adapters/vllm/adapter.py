"""The vLLM adapter: probe, install, undo.

Patches, each to go when vLLM has it itself:

- `FlashMLASparseMetadataBuilder`, what Hopper gets for DSA models, has no `update_draft_decode_metadata`. Model Runner V2
  then rebuilds the metadata of every group, and replays a graph, for each draft step. With the method, which only has to
  recompute the request map of the captured metadata, the whole draft becomes one CUDA graph. Everything else in that
  metadata is a view of the runner's persistent buffers, a constant of the captured size, or depends on shapes alone.
  (Upstream report 54369 and pull request 54790, both open.)
- `TargetDependentARSpeculator._generate_fused_drafts` and `_update_draft_decode_metadata`: one kernel per step of that graph
  in place of one launch for the slots and one to six for each attention group (see `v2_step`; not proposed upstream).

Model Runner V1's draft is patched by `v1_proposer`.
"""

from __future__ import annotations

import functools
import logging
import pkgutil
from collections.abc import Callable
from typing import Any

import torch

from nsa_plugin.adapters.base import Fallback, Host
from nsa_plugin.adapters.probe import Need, installed_version, missing, warn_if_untested
from nsa_plugin.adapters.vllm import capabilities, v2_step
from nsa_plugin.adapters.vllm.lazy import WhenImported
from nsa_plugin.adapters.vllm.patches import Patches
from nsa_plugin.adapters.vllm.v1_proposer import V1Draft

logger = logging.getLogger("vllm.plugins.nsa_plugin")
ENGINE = "vllm"
PATH = "draft decode"
METHOD = "update_draft_decode_metadata"


class VllmAdapter:
    """Implements `nsa_plugin.adapters.base.Adapter` for vLLM's FlashMLA-sparse builder and its fused multi-step draft."""

    name = ENGINE

    def __init__(self) -> None:
        self._watches: list[WhenImported] = []
        self._patches = Patches()
        self._v1 = V1Draft()

    def probe(self) -> list[str]:
        """What the installed vLLM lacks; empty if it fits. Imports the FlashMLA-sparse backend and the speculator."""
        return missing((*capabilities.NEEDS, *capabilities.STEP_NEEDS))

    def install(self, host: Host) -> list[str]:
        """Patch builder and speculator as soon as vLLM imports them, before any is made; returns what is wrong already."""
        if self._watches:
            return []
        if "graph" not in host.strategies:
            return ["vLLM's draft can only be accelerated in its CUDA graph: NSA_PLUGIN_STRATEGY=graph or auto"]
        if installed_version("vllm") == "unknown":
            return ["looked for vLLM, found no such distribution; install vllm 0.32 or later"]
        problems: list[str] = []

        def patch_step() -> None:
            if not problems:  # without the builder's part vLLM is left as it is
                problems.extend(self._patch(host, capabilities.STEP_NEEDS, self._patch_step))

        self._watches = [
            WhenImported(
                capabilities.MODULE, lambda: problems.extend(self._patch(host, capabilities.NEEDS, self._patch_builder))
            ),
            WhenImported(capabilities.SPECULATOR_MODULE, patch_step),
        ]
        if not problems:
            self._v1.install(host)
        return problems

    def undo(self) -> None:
        """Put back every attribute, by identity."""
        self._v1.undo()
        for watch in self._watches:
            watch.cancel()
        self._watches = []
        self._patches.undo()

    def summary(self) -> str:
        """What is accelerated and what is left alone, for one log line."""
        return (
            f"vllm {installed_version('vllm')}: FlashMLA-sparse joins the fused multi-step draft of Model Runner V2, whose "
            "steps update their metadata in one kernel; Model Runner V1's draft steps are computed at once; other backends "
            "are left alone"
        )

    def _patch(self, host: Host, needs: tuple[Need, ...], apply: Callable[[Host], None]) -> list[str]:
        try:
            if problems := missing(needs):
                logger.warning("nsa-plugin: vLLM is left as it is: %s", "; ".join(problems))
                return problems
            apply(host)
        except Exception as error:
            logger.exception("nsa-plugin: vLLM is left as it is: %s", error)
            return [str(error)]
        return []

    def _patch_builder(self, host: Host) -> None:
        builder = pkgutil.resolve_name(capabilities.BUILDER)
        if METHOD in builder.__dict__:
            logger.info("nsa-plugin: this vLLM updates FlashMLA-sparse metadata in place itself; it is left as it is")
            return
        warn_if_untested(logger, "vllm", capabilities.TESTED)
        self._patches.set(builder, "__init__", _init(host, builder.__init__))
        self._patches.set(builder, METHOD, _update(host))

    def _patch_step(self, host: Host) -> None:
        speculator = pkgutil.resolve_name(capabilities.SPECULATOR)
        for name, replacement in v2_step.hooks(host, speculator).items():
            self._patches.set(speculator, name, replacement)


def unsupported(builder: Any) -> str:
    """Empty, or what about the builder is not covered."""
    for name, meaning in (
        ("dcp_world_size", "decode context parallelism"),
        ("pcp_world_size", "prefill context parallelism"),
    ):
        if getattr(builder, name, 1) > 1:
            return f"{meaning} is not covered"
    return "HiSparse is not covered" if getattr(builder, "use_hisparse", False) else ""


def _init(host: Host, original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(builder: Any, *args: Any, **kwargs: Any) -> None:
        original(builder, *args, **kwargs)
        problem = unsupported(builder)
        builder.supports_draft_decode_metadata_update = not problem
        host.using(logger, ENGINE, PATH, f"off ({problem})" if problem else "graph")

    return init


def _update(host: Host) -> Callable[[Any, Any], None]:
    from vllm.v1.attention.ops.metadata import compute_token_to_req_indices

    def update_draft_decode_metadata(builder: Any, metadata: Any) -> None:
        """Recompute the request map of captured decode metadata in place; capture-safe."""
        tokens = metadata.num_decode_tokens
        if not tokens:
            return
        try:
            compute_token_to_req_indices(metadata.query_start_loc, metadata.req_id_per_token, tokens, tokens)
        except Exception as error:
            request_map(metadata.query_start_loc, metadata.req_id_per_token, tokens)
            host.fell_back(logger, Fallback(ENGINE, PATH, "capture", "graph", error))

    update_draft_decode_metadata.only_the_request_map = True  # type: ignore[attr-defined]
    return update_draft_decode_metadata


def request_map(query_start_loc: torch.Tensor, out: torch.Tensor, tokens: int) -> None:
    """The same in plain torch: request of each of the first `tokens` tokens, into `out` [>= tokens].

    `query_start_loc` [requests + 1] is ascending; tokens past its end belong to the last request.
    """
    token = torch.arange(tokens, dtype=query_start_loc.dtype, device=query_start_loc.device)
    request = torch.searchsorted(query_start_loc[1:], token, right=True)
    out[:tokens].copy_(request.clamp_(max=query_start_loc.numel() - 2))
