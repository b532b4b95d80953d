"""The parts of TIES that choose entries: exact on ties, zeros and denormals, streamed or not."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from epmq import ties


def test_equal_magnitudes_at_the_limit_keep_the_lowest_index() -> None:
    delta = torch.tensor([[1.0, -2.0, 2.0], [2.0, -2.0, 3.0]])
    assert ties.keep_largest(delta, 3).tolist() == [[0, -2, 2], [0, 0, 3]]


@pytest.mark.parametrize("norm", [0.0, 5e-8, 5e-7], ids=["frozen", "hardly moved", "hardly anything kept"])
def test_what_is_almost_nothing_is_not_rescaled(norm: float) -> None:
    """As mergekit, whose limit of 1e-7 holds before the trim and after it; a frozen layer would be 0 / 0."""
    delta = torch.full((10,), norm / 10)
    assert ties.trim_mergekit(delta, 0.1, rescale=True).equal(ties.trim_mergekit(delta, 0.1, rescale=False))


def test_a_trimmed_delta_is_rescaled_to_its_norm() -> None:
    assert ties.trim_mergekit(torch.tensor([2.0, -8.0, 1.0, 5.0]), 0.25, rescale=True).tolist() == [0, -16, 0, 0]


# Few distinct magnitudes, so that ties are the rule: zeros of both signs, denormals, the largest float32.
POOL = [0.0, -0.0, 1.5, -1.5, 2.0, 1e-45, -1e-45, 2e-45, 1e-39, 3.4028235e38, 0.1]
ENTRIES = st.one_of(st.sampled_from(POOL), st.floats(width=32, allow_nan=False, allow_infinity=False))
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


@st.composite
def streams(draw: st.DrawFn) -> list[Tensor]:
    parts = draw(st.lists(st.tuples(st.lists(ENTRIES, max_size=9), DTYPES), min_size=1, max_size=5))
    tensors = [torch.tensor(values, dtype=torch.float64).to(dtype) for values, dtype in parts]
    tensors = [torch.where(tensor.isfinite(), tensor, torch.ones_like(tensor)) for tensor in tensors]
    return [*tensors, torch.tensor([draw(ENTRIES)])]


@hypothesis.settings(deadline=None)
@given(streams(), st.sampled_from([torch.float32, torch.float64]), st.data())
def test_streamed_magnitude_is_kthvalue_of_the_concatenation(
    stream: list[Tensor], dtype: torch.dtype, data: st.DataObject
) -> None:
    whole = torch.cat([tensor.to(dtype) for tensor in stream]).abs()
    rank = data.draw(st.integers(1, whole.numel()))
    search = ties.StreamedMagnitude(rank, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ties, "CHUNK", 4)
        passes = 0
        while not search.done:
            for tensor in data.draw(st.permutations(stream)):
                search.count(tensor)
            search.next_digit()
            passes += 1
    assert search.value.dtype == dtype
    assert search.value.equal(whole.kthvalue(rank).values)
    assert passes == (4 if dtype == torch.float64 else 2)


def test_streamed_magnitude_refuses_a_rank_beyond_the_stream() -> None:
    for rank in (0, 4):
        search = ties.StreamedMagnitude(rank, torch.float32)
        search.count(torch.ones(3))
        with pytest.raises(ValueError, match="outside the 3 entries"):
            search.next_digit()


@hypothesis.settings(deadline=None)
@given(st.lists(ENTRIES, min_size=1, max_size=30), st.integers(0, 31))
def test_keep_largest_keeps_the_largest(values: list[float], count: int) -> None:
    delta = torch.tensor(values)
    kept = ties.keep_largest(delta, count)
    # A stable descending sort leaves equal magnitudes in order of their index.
    order = sorted(range(len(values)), key=lambda i: (-abs(delta[i].item()), i))
    expected = torch.zeros_like(delta)
    expected[order[:count]] = delta[order[:count]]
    assert kept.equal(expected)
