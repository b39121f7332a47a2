"""The kernels against the reference, bit for bit (in Triton's interpreter where there is no GPU)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_plugin import ForwardMode, fast_copy, precompute
from nsa_plugin.core import triton_binding
from tests.batches import Case, assert_equal_live, cases, interpreted, poisoned
from tests.examples import examples

pytest.importorskip("triton")


@pytest.mark.parametrize("mode", ForwardMode)
@settings(max_examples=examples(30))
@given(data=st.data(), stride=st.sampled_from([1, 3]))
def test_metadata_kernel_equals_the_reference(mode: ForwardMode, data: st.DataObject, stride: int) -> None:
    case = data.draw(interpreted(modes=(mode,)))
    batch, geometry = case.batch, case.geometry
    want = precompute(batch, geometry, impl="reference")
    got = precompute(batch, geometry, impl="triton", out=poisoned(batch, geometry, stride=stride)[0])
    for index in range(len(want.steps)):
        assert_equal_live(want, got.step(index), index)


@settings(max_examples=examples(60))
@given(interpreted(), st.integers(1, 4), st.sampled_from([1, 3]))
def test_copy_kernel_equals_the_source(case: Case, count: int, stride: int) -> None:
    source = precompute(case.batch, case.geometry, impl="reference")
    count = len(source.steps) if len(source.steps) > 1 else count
    destinations = [made.steps[0] for made in poisoned(case.batch, case.geometry, count, stride)]
    fast_copy(source, destinations, impl="triton")
    for index, destination in enumerate(destinations):
        assert_equal_live(source, destination, index)


@settings(max_examples=examples(12))
@given(cases(min_batch_size=36, max_batch_size=48, max_width=80, max_steps=4))
def test_large_batches_and_several_tiles(case: Case) -> None:
    """Blocks of 16 requests and tiles of 16 columns: every loop of the kernels runs several times."""
    batch, geometry = case.batch, case.geometry
    saved = triton_binding.BLOCK, triton_binding.TILE, triton_binding.TILE_OF_SEVERAL_ROWS
    triton_binding.BLOCK, triton_binding.TILE, triton_binding.TILE_OF_SEVERAL_ROWS = 16, 16, 16
    try:
        want = precompute(batch, geometry, impl="reference")
        got = precompute(batch, geometry, impl="triton", out=poisoned(batch, geometry)[0])
        copies = [made.steps[0] for made in poisoned(batch, geometry, len(want.steps))]
        fast_copy(got, copies, impl="triton")
    finally:
        triton_binding.BLOCK, triton_binding.TILE, triton_binding.TILE_OF_SEVERAL_ROWS = saved
    for index in range(len(want.steps)):
        assert_equal_live(want, got.step(index), index)
        assert_equal_live(want, copies[index], index)
