"""At capture and at every replay: sglang's batches and buffers in this package's words. Copies no tensor."""

from __future__ import annotations

from typing import Any

from nsa_plugin.adapters.sglang.pools import accepted_rows, keys_per_index_key, pools_of
from nsa_plugin.adapters.sglang.releases import derived_planes, generation
from nsa_plugin.core.batch import BatchDescriptor, ForwardMode, Geometry, TokenTable, multiprocessors
from nsa_plugin.core.metadata import StepMetadata, same_buffer

FIELDS = {
    "cache_seqlens": "cache_seqlens_int32",
    "cu_seqlens_k": "cu_seqlens_k",
    "seqlens_expanded": "{prefix}_seqlens_expanded",
    "nsa_cache_seqlens": "{prefix}_cache_seqlens_int32",
    "nsa_cu_seqlens_k": "{prefix}_cu_seqlens_k",
    "page_table_1": "page_table_1",
    "real_page_table": "real_page_table",
}
"""Field of `StepMetadata` to field of sglang's `DSAMetadata` or `NSAMetadata`."""


def describe(
    batch: Any, *, backend: Any, mode: ForwardMode, num_steps: int = 1, step_offsets: tuple[int, ...] = ()
) -> BatchDescriptor:
    """Describe a `ForwardBatch`, or the namespace that sglang passes at replay, for a DSA backend.

    Parameters
    ----------
    batch : has batch_size, seq_lens [>= batch_size] and req_pool_indices [>= batch_size]
        With pooled index keys also spec_info, in a draft extend.
    backend : DeepseekSparseAttnBackend
        Its token table and draft width count.
    mode : ForwardMode
        A draft is DECODE whatever mode its batch says.
    num_steps : int
        Draft backends.
    step_offsets : tuple of num_steps ints, or ()
        Tokens that each sees beyond the batch's lengths; sglang's own draft backends see none.
    """
    return BatchDescriptor(
        mode,
        batch.batch_size,
        batch.seq_lens,
        TokenTable(backend.req_to_token, batch.req_pool_indices),
        num_steps,
        step_offsets,
        1 if mode is ForwardMode.DECODE else backend.speculative_num_draft_tokens,
        accepted=accepted_rows(batch, backend, mode),
    )


def geometry(backend: Any, metadata: Any) -> Geometry:
    """The constants of a backend and of a `DSAMetadata` that it has captured."""
    table, width = metadata.page_table_1, backend.req_to_token.shape[1]
    return Geometry(
        index_topk=getattr(backend, generation().of("_index_topk")),
        page_size=metadata.page_size,
        table_width=width if table is None else min(width, table.shape[1]),
        num_sms=multiprocessors(backend.req_to_token.device),
        wide_page_table=table is not None,
        index_kpool=keys_per_index_key(backend),
    )


def consumer(metadata: Any) -> StepMetadata:
    """The buffers of a captured `DSAMetadata`, derived planes included."""
    derived, planes = derived_planes(metadata), vectors_and_tables(metadata)
    lengths = derived.get("paged_mqa_ctx_lens_2d")
    if lengths is not None and any(
        same_buffer(lengths, planes[name]) for name in ("cache_seqlens", "seqlens_expanded")
    ):
        del derived["paged_mqa_ctx_lens_2d"]
    if metadata.flashmla_metadata is not None:
        derived["flashmla_metadata"] = metadata.flashmla_metadata.flashmla_metadata
        derived["num_splits"] = metadata.flashmla_metadata.num_splits
    return StepMetadata(**planes, derived=derived, pools=pools_of(metadata))


def vectors_and_tables(metadata: Any) -> dict[str, Any]:
    """The planes of a `DSAMetadata` by the name of their field in `StepMetadata`."""
    prefix = generation().prefix
    return {ours: getattr(metadata, theirs.format(prefix=prefix)) for ours, theirs in FIELDS.items()}
