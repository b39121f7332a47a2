"""Bad input: an error that names the field, what was expected and what came; nothing is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nsa_plugin import (
    BatchDescriptor,
    BlockTable,
    ForwardMode,
    Geometry,
    InvalidTypeError,
    InvalidValueError,
    PrecomputedMetadata,
    ReplayPlan,
    TokenTable,
    UnavailableError,
    fast_copy,
    precompute,
)
from tests.batches import POISON, poisoned

TABLE = TokenTable(torch.arange(256, dtype=torch.int32).view(2, 128), torch.tensor([1, 0]))
BATCH = BatchDescriptor(ForwardMode.DECODE, 2, torch.tensor([5, 70]), TABLE)
GEOMETRY = Geometry(index_topk=32, page_size=64, table_width=128, num_sms=2)

BAD_BATCHES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"mode": "decode"}, TypeError, "mode: expected a ForwardMode, got 'decode'"),
    ({"batch_size": -1}, ValueError, "batch_size: expected an int >= 0, got -1"),
    ({"batch_size": 3}, ValueError, "seq_lens: expected at least 3 entries, got 2"),
    ({"batch_size": 2.0}, TypeError, "batch_size: expected an int >= 0, got 2.0"),
    ({"num_steps": 0}, ValueError, "num_steps: expected an int >= 1, got 0"),
    ({"num_steps": 2, "step_offsets": (1,)}, ValueError, "step_offsets: expected 2 offsets .*, got 1"),
    ({"step_offsets": (-1,)}, ValueError, "step_offsets: expected an int >= 0, got -1"),
    ({"mode": ForwardMode.TARGET_VERIFY, "num_steps": 2}, ValueError, "num_steps: expected 1 in TARGET_VERIFY, got 2"),
    ({"draft_tokens": 0}, ValueError, "draft_tokens: expected an int >= 1, got 0"),
    ({"seq_lens": torch.ones(2)}, TypeError, r"seq_lens: expected int32 or int64, got float32; convert with"),
    (
        {"seq_lens": torch.ones(2, 1, dtype=torch.int64)},
        ValueError,
        r"seq_lens: expected 1 dimension\(s\), got shape \(2, 1\)",
    ),
    ({"seq_lens": torch.ones(1, dtype=torch.int64).expand(2)}, ValueError, "seq_lens: expected a stride other than 0"),
    ({"extend_lens": torch.ones(2, dtype=torch.int64)}, ValueError, "extend_lens: expected None outside DRAFT_EXTEND"),
    ({"slots": None}, TypeError, "slots: expected a TokenTable or a BlockTable, got NoneType"),
    (
        {"slots": replace(TABLE, req_to_token=TABLE.req_to_token[:, :100])},
        ValueError,
        "req_to_token: expected rows that name at least 128",
    ),
    (
        {"slots": replace(TABLE, req_to_token=TABLE.req_to_token.to(torch.int16))},
        TypeError,
        "req_to_token: expected int32 or int64, got int16",
    ),
    (
        {"slots": replace(TABLE, req_to_token=TABLE.req_to_token.to("meta"))},
        ValueError,
        "req_to_token: expected device cpu .*, got device meta",
    ),
    (
        {"slots": replace(TABLE, req_pool_indices=torch.tensor([0]))},
        ValueError,
        "req_pool_indices: expected at least 2 entries, got 1",
    ),
    ({"slots": TokenTable(TABLE.req_to_token, [0, 1])}, TypeError, "req_pool_indices: expected a tensor, got list"),  # type: ignore[arg-type]
    (
        {"slots": BlockTable(torch.zeros(1, 8, dtype=torch.int32), 16)},
        ValueError,
        "block_table: expected at least 2 rows",
    ),
    (
        {"slots": BlockTable(torch.zeros(2, 8, dtype=torch.int32), 0)},
        ValueError,
        "block_size: expected an int >= 1, got 0",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_BATCHES, ids=lambda value: str(value)[:40])
def test_bad_batches_are_refused_and_nothing_is_written(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    out = poisoned(BATCH, GEOMETRY)[0]
    with pytest.raises(error, match=message):
        precompute(replace(BATCH, **change), GEOMETRY, out=out)
    assert (out.steps[0].cache_seqlens == POISON).all()


@pytest.mark.parametrize("field", ["index_topk", "page_size", "table_width", "num_sms"])
def test_bad_geometry_is_refused(field: str) -> None:
    with pytest.raises(InvalidValueError, match=rf"geometry.{field}: expected an int >= 1, got 0"):
        precompute(BATCH, replace(GEOMETRY, **{field: 0}))  # type: ignore[arg-type]


def test_page_sizes_are_powers_of_two() -> None:
    with pytest.raises(InvalidValueError, match=r"geometry.page_size: expected a power of two, got 48"):
        precompute(BATCH, replace(GEOMETRY, page_size=48))


BAD_BUFFERS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"cache_seqlens": torch.zeros(1, dtype=torch.int32)},
        ValueError,
        "cache_seqlens: expected at least 2 entries, got 1; make the buffers for the largest batch",
    ),
    ({"cu_seqlens_k": torch.zeros(2, dtype=torch.int32)}, ValueError, "cu_seqlens_k: expected at least 3 entries"),
    (
        {"nsa_cache_seqlens": torch.zeros(2, dtype=torch.int64)},
        TypeError,
        "nsa_cache_seqlens: expected int32, got int64",
    ),
    (
        {"page_table_1": torch.zeros(1, 128, dtype=torch.int32)},
        ValueError,
        "page_table_1: expected at least 2 rows, got 1",
    ),
    (
        {"page_table_1": torch.zeros(2, 127, dtype=torch.int32)},
        ValueError,
        "page_table_1: expected at least 128 columns, got 127",
    ),
    (
        {"real_page_table": torch.zeros(1, 2, dtype=torch.int32).expand(2, 2)},
        ValueError,
        "real_page_table: expected strides without overlap",
    ),
    ({"real_page_table": None}, TypeError, "real_page_table: expected a tensor, got NoneType"),
    (
        {"derived": {"plan": torch.zeros(4, 4, dtype=torch.int32).t()}},
        ValueError,
        r"derived\['plan'\]: expected a contiguous",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_BUFFERS, ids=lambda value: str(value)[:40])
def test_bad_buffers_are_refused_as_out_as_destination_and_in_a_plan(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    source = precompute(BATCH, GEOMETRY)
    step = replace(poisoned(BATCH, GEOMETRY)[0].steps[0], **change)
    with pytest.raises(error, match=r"out.steps\[0\]." + message):
        precompute(BATCH, GEOMETRY, out=PrecomputedMetadata((step,), BATCH, GEOMETRY))
    good = poisoned(BATCH, GEOMETRY)[0].steps[0]
    with pytest.raises(error, match=r"destinations\[1\]." + message):
        fast_copy(source, [good, step])
    assert (good.cache_seqlens == POISON).all()
    with pytest.raises(error, match=message):
        ReplayPlan(BATCH, GEOMETRY, [step], strategy="share")


def test_destinations_must_fit_the_steps_and_derived_planes_of_the_source() -> None:
    grown = replace(BATCH, num_steps=3, step_offsets=(1, 2, 3))
    source = precompute(grown, GEOMETRY)
    with pytest.raises(InvalidValueError, match=r"destinations: expected 3 \(one per step of the source\), got 2"):
        fast_copy(source, [made.steps[0] for made in poisoned(BATCH, GEOMETRY, 2)])
    plane = {"plan": torch.zeros(4, dtype=torch.int32)}
    wants_plan = replace(poisoned(BATCH, GEOMETRY)[0].steps[0], derived=plane)
    with pytest.raises(InvalidValueError, match=r"derived\['plan'\]: .* got missing in the source"):
        fast_copy(precompute(BATCH, GEOMETRY), [wants_plan])
    with pytest.raises(
        InvalidValueError, match=r"destinations\[1\].derived: expected the planes of destinations\[0\], \[\]"
    ):
        fast_copy(precompute(BATCH, GEOMETRY), [poisoned(BATCH, GEOMETRY)[0].steps[0], wants_plan])
    narrow = precompute(BATCH, replace(GEOMETRY, wide_page_table=False))
    with pytest.raises(InvalidValueError, match="page_table_1: expected None, as in the source"):
        fast_copy(narrow, [poisoned(BATCH, GEOMETRY)[0].steps[0]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_lens": torch.tensor([5, -1])}, r"seq_lens\[1\]: expected 0 to 128 .*, got -1"),
        ({"seq_lens": torch.tensor([129, 3])}, r"seq_lens\[0\]: expected 0 to 128 .*, got 129"),
        (
            {"slots": replace(TABLE, req_pool_indices=torch.tensor([0, 2]))},
            r"req_pool_indices\[1\]: expected 0 to 1 .*, got 2",
        ),
        (
            {"mode": ForwardMode.DRAFT_EXTEND, "draft_tokens": 2, "extend_lens": torch.tensor([1, 3])},
            r"extend_lens\[1\]: expected 0 to 2 \(draft_tokens\), got 3",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_checked_mode_refuses_values_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        precompute(replace(BATCH, **change), GEOMETRY, checked=True)


def test_unchecked_over_long_lengths_do_not_write_past_the_table() -> None:
    for impl in ("reference", "triton"):
        out = poisoned(BATCH, GEOMETRY)[0]
        wider = torch.full((2, 160), POISON, dtype=torch.int32)
        step = replace(out.steps[0], page_table_1=wider)
        precompute(
            replace(BATCH, seq_lens=torch.tensor([5000, 3])),
            GEOMETRY,
            impl=impl,
            out=replace(out, steps=(step,)),
        )
        assert torch.equal(wider[0, :128], TABLE.req_to_token[1])
        assert (wider[:, 128:] == POISON).all()


def test_unknown_or_unusable_implementations_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidValueError, match="impl: expected 'auto' or 'reference' or 'triton', got 'cuda'"):
        precompute(BATCH, GEOMETRY, impl="cuda")  # type: ignore[arg-type]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UnavailableError, match="needs a CUDA device, not cpu"):
        precompute(BATCH, GEOMETRY, impl="triton")


def test_a_plan_refuses_unknown_strategies_and_too_few_consumers() -> None:
    step = poisoned(BATCH, GEOMETRY)[0].steps[0]
    with pytest.raises(InvalidValueError, match="strategy: expected 'copy' or 'share', got 'fast'"):
        ReplayPlan(BATCH, GEOMETRY, [step], strategy="fast")  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match=r"consumers: expected 3 \(num_steps\), got 2"):
        ReplayPlan(replace(BATCH, num_steps=3), GEOMETRY, [step, step], strategy="copy")


def test_sharing_consumers_must_be_the_same_buffers() -> None:
    two = replace(BATCH, num_steps=2)
    steps = [made.steps[0] for made in poisoned(two, GEOMETRY, 2)]
    with pytest.raises(InvalidValueError, match=r"consumers\[1\].cache_seqlens: expected the buffer of consumers\[0\]"):
        ReplayPlan(two, GEOMETRY, steps, strategy="share")


def test_errors_are_also_the_builtin_kind() -> None:
    assert issubclass(InvalidValueError, ValueError)
    assert issubclass(InvalidTypeError, TypeError)
    assert issubclass(UnavailableError, RuntimeError)
