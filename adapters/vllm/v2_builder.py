"""FlashMLA-sparse's part in Model Runner V2's fused draft: its captured metadata, updated in place at each step."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from nsa_plugin.adapters.base import Fallback, Host
from nsa_plugin.adapters.vllm import agreement, capabilities

logger = logging.getLogger("vllm.plugins.nsa_plugin")
ENGINE = "vllm"
PATH = "draft decode"
METHOD = "update_draft_decode_metadata"


def hooks(host: Host, owner: type, live: Callable[[], bool]) -> Mapping[str, Callable[..., Any]]:
    """Replacements of the methods of `owner`, the `FlashMLASparseMetadataBuilder`, by name; none if it has its own.

    They pass their calls on to the originals when they are not `live`.
    """
    if METHOD in vars(owner):
        logger.info("nsa-plugin: this vLLM updates FlashMLA-sparse metadata in place itself; it is left as it is")
        return {}
    return MappingProxyType({"__init__": _init(host, owner.__init__, live), METHOD: _update(host)})  # type: ignore[misc]


def unsupported(builder: Any) -> str:
    """Empty, or what about the builder is not covered."""
    hisparse = getattr(builder, "use_hisparse", False)
    return capabilities.uncovered_builder(builder) or ("HiSparse is not covered" if hisparse else "")


def _init(host: Host, original: Callable[..., None], live: Callable[[], bool]) -> Callable[..., None]:
    objection = functools.cache(agreement.objection)  # one vote per process

    @functools.wraps(original)
    def init(builder: Any, *args: Any, **kwargs: Any) -> None:
        original(builder, *args, **kwargs)
        if not live():
            return
        problem = unsupported(builder) or objection()
        builder.supports_draft_decode_metadata_update = not problem
        host.using(logger, ENGINE, PATH, f"off ({problem})" if problem else "graph")

    return init


def _update(host: Host) -> Callable[[Any, Any], None]:
    from vllm.v1.attention.ops.metadata import compute_token_to_req_indices

    failed = False

    def update_draft_decode_metadata(builder: Any, metadata: Any) -> None:
        """Recompute the request map of captured decode metadata in place; capture-safe."""
        nonlocal failed
        tokens = metadata.num_decode_tokens
        if not tokens:
            return
        if not failed:
            try:
                compute_token_to_req_indices(metadata.query_start_loc, metadata.req_id_per_token, tokens, tokens)
                return
            except Exception as error:
                failed = True
                host.fell_back(logger, Fallback(ENGINE, PATH, "capture", "graph", error))
        request_map(metadata.query_start_loc, metadata.req_id_per_token, tokens)

    # Not merely True: functools.wraps copies attributes to whatever wraps this function and may do more.
    update_draft_decode_metadata.only_the_request_map = update_draft_decode_metadata  # type: ignore[attr-defined]
    return update_draft_decode_metadata


def request_map(query_start_loc: torch.Tensor, out: torch.Tensor, tokens: int) -> None:
    """The same in plain torch: request of each of the first `tokens` tokens, into `out` [>= tokens].

    `query_start_loc` [requests + 1] is ascending; tokens past its end belong to the last request.
    """
    token = torch.arange(tokens, dtype=query_start_loc.dtype, device=query_start_loc.device)
    request = torch.searchsorted(query_start_loc[1:], token, right=True)
    out[:tokens].copy_(request.clamp_(max=query_start_loc.numel() - 2))
