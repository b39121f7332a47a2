"""What a batch is, whichever engine it comes from: `BatchDescriptor`, its slot sources, and `Geometry`."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

PAD_SLOT = -1
"""KV slot of a token that is not written to the cache."""
NO_LIMIT = torch.iinfo(torch.int32).max
"""`Geometry.max_length` of lengths that do not stop."""


class ForwardMode(enum.Enum):
    """The three forward passes of a speculative round that need sparse-attention metadata."""

    DECODE = "decode"
    """One query row per request: a draft step (or plain decoding)."""
    TARGET_VERIFY = "target_verify"
    """`draft_tokens` query rows per request, appended to the sequence: row j sees `seq_len + j + 1` tokens."""
    DRAFT_EXTEND = "draft_extend"
    """The last rows of a sequence that already includes them: row j of q sees `seq_len - q + j + 1` tokens."""


@dataclass(frozen=True, slots=True)
class TokenTable:
    """KV slots of a batch whose table has one entry per token (sglang).

    Parameters
    ----------
    req_to_token : int32 or int64 tensor [num_requests, >= Geometry.table_width], any strides
        Entry [r, t] is the slot of token t of pooled request r.
    req_pool_indices : int32 or int64 tensor [>= batch_size], any stride
        Row of `req_to_token` of each request of the batch.
    """

    req_to_token: torch.Tensor
    req_pool_indices: torch.Tensor

    def lookup(self, batch_size: int, width: int, unit: int = 1) -> torch.Tensor:
        """Slots of tokens 0, unit, 2 * unit … below `width` of the first `batch_size` requests, one row each."""
        return self.req_to_token[:, :width:unit][self.req_pool_indices[:batch_size]]

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """Slot of one token of each request: `positions` [batch_size], int64."""
        return self.req_to_token[self.req_pool_indices[: positions.shape[0]], positions]

    def width(self) -> int:
        """Number of token positions that a row of the table can name."""
        return self.req_to_token.shape[1]


@dataclass(frozen=True, slots=True)
class BlockTable:
    """KV slots of a batch whose table has one entry per block of tokens (vLLM).

    Parameters
    ----------
    block_table : int32 or int64 tensor [>= batch_size, max_blocks], any strides
        Entry [r, i] is the block of tokens i * block_size to (i + 1) * block_size - 1 of request r.
    block_size : int
        Tokens per block.
    """

    block_table: torch.Tensor
    block_size: int

    def lookup(self, batch_size: int, width: int, unit: int = 1) -> torch.Tensor:
        """Slots of tokens 0, unit, 2 * unit … below `width` of the first `batch_size` requests, one row each."""
        tokens = torch.arange(0, width, unit, device=self.block_table.device)
        blocks = self.block_table[:batch_size, tokens // self.block_size]
        return blocks * self.block_size + tokens % self.block_size

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """Slot of one token of each request: `positions` [batch_size], int64."""
        request = torch.arange(positions.shape[0], device=positions.device)
        return self.block_table[request, positions // self.block_size] * self.block_size + positions % self.block_size

    def width(self) -> int:
        """Number of token positions that a row of the table can name."""
        return self.block_table.shape[1] * self.block_size


@dataclass(frozen=True, slots=True)
class BatchDescriptor:
    """One batch, as the core sees it. It holds tensors by reference and copies nothing.

    Parameters
    ----------
    mode : ForwardMode
    batch_size : int >= 0
        Requests, padding included. Per-request tensors may be longer: their first `batch_size` entries count.
    seq_lens : int32 or int64 tensor [>= batch_size], any stride
        Tokens in the KV cache. TARGET_VERIFY: without the draft tokens. DRAFT_EXTEND: with them.
    slots : TokenTable or BlockTable
    num_steps : int >= 1
        Consumers of this metadata: draft steps in DECODE, else 1.
    step_offsets : tuple of num_steps ints >= 0, or ()
        What each step adds to `seq_lens`. () means 0 for all steps (sglang); vLLM's step i adds i. With offsets,
        lengths stop at `Geometry.table_width`, as vLLM's Model Runner V2 clamps them to the model's length, unless
        `Geometry.max_length` says otherwise.
    draft_tokens : int >= 1
        Query rows per request in TARGET_VERIFY and DRAFT_EXTEND. With `extend_lens`, the largest number of them.
    extend_lens : int32 or int64 tensor [>= batch_size], or None
        DRAFT_EXTEND only: query rows of each request, 0 to `draft_tokens`. Requests' rows follow each other without
        gaps. None means `draft_tokens` rows for every request.
    query_start_loc : int32 or int64 tensor [>= batch_size + 1], contiguous, or None
        DRAFT_EXTEND without `extend_lens` only: 0, then the running sum of the rows that requests really have. Rows at or
        past its entry `batch_size` are padding, which only `GroupRows` tell apart. None means that all rows exist.
    accepted : int32 or int64 tensor [>= batch_size], any stride, or None
        DRAFT_EXTEND only: of each request's rows the number of first ones whose tokens were accepted. Only these complete
        pools of index keys (`PoolMetadata`). None means all rows.
    """

    mode: ForwardMode
    batch_size: int
    seq_lens: torch.Tensor
    slots: TokenTable | BlockTable
    num_steps: int = 1
    step_offsets: tuple[int, ...] = ()
    draft_tokens: int = 1
    extend_lens: torch.Tensor | None = None
    query_start_loc: torch.Tensor | None = None
    accepted: torch.Tensor | None = None

    @property
    def rows_per_request(self) -> int:
        """Query rows of each request; with `extend_lens`, the largest number of them."""
        return 1 if self.mode is ForwardMode.DECODE else self.draft_tokens

    @property
    def num_rows(self) -> int:
        """Rows that the expanded planes need: `batch_size * rows_per_request`."""
        return self.batch_size * self.rows_per_request

    @property
    def added_tokens(self) -> int:
        """Tokens that the mode adds to `seq_lens`: their sum is what the request's last row sees."""
        return self.draft_tokens if self.mode is ForwardMode.TARGET_VERIFY else 0

    @property
    def offsets(self) -> tuple[int, ...]:
        """Length offsets, one per distinct set of planes: a single one where all steps see the same lengths."""
        offsets = self.step_offsets or (0,)
        return offsets if len(set(offsets)) > 1 else offsets[:1]


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 for any other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@dataclass(frozen=True, slots=True)
class Geometry:
    """Constants of the model and its cache.

    Parameters
    ----------
    index_topk : int
        Tokens that sparse attention keeps per query row.
    page_size : int
        Tokens per page of the real page table, a power of two. With 1 that table is `page_table_1`.
    table_width : int
        Token positions per row of `page_table_1`.
    num_sms : int
        Streaming multiprocessors to spread the work over.
    wide_page_table : bool
        Whether a kernel reads `page_table_1`. If not, only the real page table is written.
    index_kpool : int
        Tokens that share an index key, a power of two that divides `page_size` and `index_topk`. Above 1 a row keeps its
        `index_topk` tokens in whole pools, and the tokens of its incomplete pool besides; see `PoolMetadata`.
    max_length : int from 1 to `NO_LIMIT`, or None
        Tokens at which the lengths that a step sees stop, in every batch. None means `table_width` for a batch with step
        offsets, and no limit without them. Page tables end at `table_width` in any case. `NO_LIMIT` is right where several
        rows of a request share one length and a kernel counts back from it (dense verification): a length that stops would
        hide tokens from all of these rows, those before the end of the context too.
    """

    index_topk: int
    page_size: int
    table_width: int
    num_sms: int = 132
    wide_page_table: bool = True
    index_kpool: int = 1
    max_length: int | None = None

    def length_limit(self, batch: BatchDescriptor) -> int:
        """Tokens at which `cache_seqlens` of a batch stop."""
        if self.max_length is not None:
            return self.max_length
        return self.table_width if batch.step_offsets else NO_LIMIT

    @property
    def real_width(self) -> int:
        """Pages per row of the real page table."""
        return -(-self.table_width // self.page_size)

    @property
    def pooled_width(self) -> int:
        """Pages per row of the page table of pooled index keys."""
        return -(-self.real_width // self.index_kpool)
