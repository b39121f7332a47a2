"""The vLLM adapter: probe, install, undo.

One patch, to go when vLLM has it itself (upstream report 54369 and pull request 54790, both open):

- `FlashMLASparseMetadataBuilder`, what Hopper gets for DSA models, has no `update_draft_decode_metadata`. Model Runner V2
  then rebuilds the metadata of every group, and replays a graph, for each draft step. With the method, which only has to
  recompute the request map of the captured metadata, the whole draft becomes one CUDA graph. Everything else in that
  metadata is a view of the runner's persistent buffers, a constant of the captured size, or depends on shapes alone.
"""

from __future__ import annotations

import functools
import logging
import pkgutil
from collections.abc import Callable
from typing import Any

import torch

from nsa_plugin.adapters.base import Fallback, Host, PathPlan
from nsa_plugin.adapters.probe import installed_version, missing, warn_if_untested
from nsa_plugin.adapters.vllm import capabilities
from nsa_plugin.adapters.vllm.lazy import WhenImported

logger = logging.getLogger("vllm.plugins.nsa_plugin")
ENGINE = "vllm"
PATH = "draft decode"
METHOD = "update_draft_decode_metadata"


class VllmAdapter:
    """Implements `nsa_plugin.adapters.base.Adapter` for vLLM's FlashMLA-sparse metadata builder."""

    name = ENGINE
    features: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self._watch: WhenImported | None = None
        self._original_init: Callable[..., None] | None = None

    def probe(self) -> list[str]:
        """What the installed vLLM lacks; empty if it fits. Imports the FlashMLA-sparse backend."""
        return missing(capabilities.NEEDS)

    def install(self, host: Host) -> list[str]:
        """Patch the builder as soon as vLLM imports it, before any speculator asks it; returns what is wrong already."""
        if self._watch is not None:
            return []
        if "graph" not in host.strategies:
            return ["vLLM's draft can only be accelerated in its CUDA graph: NSA_PLUGIN_STRATEGY=graph or auto"]
        if installed_version("vllm") == "unknown":
            return ["looked for vLLM, found no such distribution; install vllm 0.32 or later"]
        problems: list[str] = []
        self._watch = WhenImported(capabilities.MODULE, lambda: problems.extend(self._patch(host)))
        return problems

    def undo(self) -> None:
        """Put back the builder's attributes, by identity."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._original_init is not None:
            builder = pkgutil.resolve_name(capabilities.BUILDER)
            builder.__init__ = self._original_init
            delattr(builder, METHOD)
            self._original_init = None

    def summary(self) -> str:
        """What is accelerated and what is left alone, for one log line."""
        return (
            f"vllm {installed_version('vllm')}: FlashMLA-sparse joins the fused multi-step draft of Model Runner V2; "
            "Model Runner V1 and other backends are left alone"
        )

    def switch(self, on: bool) -> list[str]:
        """Nothing can be switched: the work is recorded in the draft's CUDA graph."""
        return (
            []
            if on or self._original_init is None
            else [f"{ENGINE}: {PATH} keeps what its CUDA graph recorded; restart"]
        )

    def paths(self, host: Host) -> list[PathPlan]:
        """What would be done with the host's settings."""
        if problems := self.probe():
            return [PathPlan(PATH, "off", problems[0])]
        if "graph" not in host.strategies:
            return [PathPlan(PATH, "off", "it can only be accelerated in its CUDA graph")]
        return [PathPlan(PATH, "graph", "")]

    def _patch(self, host: Host) -> list[str]:
        try:
            if problems := self.probe():
                logger.warning("nsa-plugin: vLLM is left as it is: %s", "; ".join(problems))
                return problems
            builder = pkgutil.resolve_name(capabilities.BUILDER)
            if METHOD in builder.__dict__:
                logger.info(
                    "nsa-plugin: this vLLM updates FlashMLA-sparse metadata in place itself; it is left as it is"
                )
                return []
            warn_if_untested(logger, "vllm", capabilities.TESTED)
            self._original_init = builder.__init__
            builder.__init__ = _init(host, builder.__init__)
            setattr(builder, METHOD, _update(host))
        except Exception as error:
            logger.exception("nsa-plugin: vLLM is left as it is: %s", error)
            return [str(error)]
        return []


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

    return update_draft_decode_metadata


def request_map(query_start_loc: torch.Tensor, out: torch.Tensor, tokens: int) -> None:
    """The same in plain torch: request of each of the first `tokens` tokens, into `out` [>= tokens].

    `query_start_loc` [requests + 1] is ascending; tokens past its end belong to the last request.
    """
    token = torch.arange(tokens, dtype=query_start_loc.dtype, device=query_start_loc.device)
    request = torch.searchsorted(query_start_loc[1:], token, right=True)
    out[:tokens].copy_(request.clamp_(max=query_start_loc.numel() - 2))
