"""The reference against the original code of sglang 0.5.6.post2, executed from its wheel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_plugin import (
    BatchDescriptor,
    ForwardMode,
    Geometry,
    PrecomputedMetadata,
    TokenTable,
    UnavailableError,
    precompute,
)
from nsa_plugin.rigs.sglang import original_loop
from tests.batches import POISON, assert_equal_live, poisoned


@pytest.fixture(scope="module")
def wheel(pytestconfig: pytest.Config) -> Path:
    try:
        return original_loop.fetch_wheel(pytestconfig.rootpath / ".venv-wheels")
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("mode", ForwardMode)
@settings(max_examples=40)
@given(data=st.data())
def test_every_live_entry_is_that_of_the_original(wheel: Path, mode: ForwardMode, data: st.DataObject) -> None:
    draft_tokens, width = 4, 512
    lengths = data.draw(
        st.lists(st.sampled_from([4, 5, 63, 64, 65, 128, 300, width - draft_tokens]), min_size=1, max_size=8)
    )
    accepted = torch.tensor([data.draw(st.integers(1, draft_tokens)) for _ in lengths])
    table = torch.randint(0, 1 << 20, (10, width), dtype=torch.int32)
    requests = torch.tensor([data.draw(st.integers(0, 9)) for _ in lengths])
    seq_lens = torch.tensor(lengths)
    geometry = Geometry(index_topk=100, page_size=64, table_width=width)
    batch = BatchDescriptor(
        mode, len(lengths), seq_lens, TokenTable(table, requests), draft_tokens=draft_tokens,
        extend_lens=accepted if mode is ForwardMode.DRAFT_EXTEND else None,
    )  # fmt: skip
    buffers = poisoned(batch, geometry)[0].steps[0]
    buffers.cu_seqlens_k[0] = buffers.nsa_cu_seqlens_k[0] = 0  # made so at capture, never written again
    backend = original_loop.OriginalBackend(original_loop.load_methods(wheel), buffers, table, 100, 64, draft_tokens)
    backend.replay(mode, seq_lens, requests, accepted, seq_lens)
    if mode is ForwardMode.DECODE:  # aliased at capture
        buffers.seqlens_expanded[:] = buffers.cache_seqlens
    want = PrecomputedMetadata((buffers,), batch, geometry)
    assert (want.steps[0].cache_seqlens != POISON).all()
    assert_equal_live(want, precompute(batch, geometry, impl="reference").steps[0], 0)
