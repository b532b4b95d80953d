"""Grids: formulas, scales as they are stored, clip search, rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from textbook import min_max_grid, spans
from torch import Tensor

from epmq.errors import NumericalError
from epmq.grids import CLIP_POWER, Grid, fit_grid, round_to_nearest

GROUP_SIZES = [32, 64, 128, -1, 7]
STORED = [torch.float32, torch.float16, torch.bfloat16]


def weights(rows: int = 6, columns: int = 150) -> Tensor:
    weight = torch.randn(rows, columns, dtype=torch.float64)
    weight[:, ::20] *= 5
    weight[1] = weight[1].abs()
    weight[2] = -weight[2].abs()
    weight[3, :40] = 0.0
    return weight


def dequantized(weight: Tensor, grid: Grid) -> Tensor:
    codes = round_to_nearest(weight, grid)
    out = torch.empty_like(weight)
    for g, (start, stop) in enumerate(spans(weight.shape[1], grid.group_size)):
        units = codes[:, start:stop].double() - grid.zeros[:, g : g + 1]
        out[:, start:stop] = units * grid.scales[:, g : g + 1]
    return out


@pytest.mark.parametrize("stored", STORED, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scales_and_zeros_are_the_formulas(bits: int, sym: bool, group_size: int, stored: torch.dtype) -> None:
    weight = weights()
    grid = fit_grid(weight, bits, group_size, sym, stored)
    for g, (start, stop) in enumerate(spans(150, group_size)):
        scale, zero = min_max_grid(weight[:, start:stop], bits, sym, stored)
        empty = weight[:, start:stop].abs().amax(1) == 0
        assert torch.equal(grid.scales[~empty, g], scale[~empty])
        assert torch.equal(grid.zeros[~empty, g], zero[~empty])
        assert bool((grid.scales[empty, g] == 1.0).all())
    assert torch.equal(grid.scales.to(stored).double(), grid.scales)
    assert bool(((grid.zeros >= 0) & (grid.zeros <= 2**bits - 1) & (grid.zeros == grid.zeros.round())).all())


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_asymmetric_rounding_is_within_half_a_step(bits: int, group_size: int) -> None:
    weight = weights()
    grid = fit_grid(weight, bits, group_size, False, torch.float32)
    size = 150 if group_size == -1 else group_size
    steps = grid.scales.repeat_interleave(size, 1)[:, :150]
    # The zero point is rounded: where that shifts the range outwards, an end is clamped by up to another half step.
    assert bool(((dequantized(weight, grid) - weight).abs() <= steps * (1 + 1e-6)).all())
    inner = weight.abs() < 0.4 * 3 * steps
    assert bool(((dequantized(weight, grid) - weight).abs() <= 0.5 * steps * (1 + 1e-6))[inner].all())


@pytest.mark.parametrize("sym", [False, True])
def test_zeros_stay_exactly_zero(sym: bool) -> None:
    weight = weights()
    weight[:, 5] = 0.0
    grid = fit_grid(weight, 3, 32, sym, torch.float16)
    assert bool((dequantized(weight, grid)[:, 5] == 0.0).all())
    assert bool((dequantized(weight, grid)[3, :32] == 0.0).all())


@pytest.mark.parametrize("sym", [False, True])
def test_scales_below_fp16_take_its_smallest_normal_number(sym: bool) -> None:
    weight = weights() * 1e-9
    grid = fit_grid(weight, 4, 32, sym, torch.float16)
    tiny = torch.finfo(torch.float16).tiny
    assert float(grid.scales.min()) == tiny
    assert torch.equal(grid.scales.half().double(), grid.scales)
    assert float(dequantized(weight, grid).abs().max()) <= tiny


def test_scales_above_fp16_are_refused_with_a_way_out() -> None:
    with pytest.raises(NumericalError, match=r'does not fit float16; set scale_dtype: "float32"'):
        fit_grid(weights() * 1e6, 4, 32, False, torch.float16)
    fit_grid(weights() * 1e6, 4, 32, False, torch.bfloat16)


def loss(weight: Tensor, grid: Grid, clip: str, importance: Tensor) -> Tensor:
    """``[N, G]``: what the clip search minimises, over the columns of each group."""
    error = (dequantized(weight, grid) - weight).abs()
    each = error**CLIP_POWER if clip == "mse" else error**2 * importance
    return torch.stack([each[:, a:b].sum(1) for a, b in spans(weight.shape[1], grid.group_size)], 1)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("clip", ["mse", "hessian"])
def test_clip_search_never_raises_its_own_loss(clip: Any, bits: int, sym: bool, group_size: int) -> None:
    weight, importance = weights(), torch.rand(150).double()
    importance[-1] = 40.0  # the last column of a short group must count once
    plain = loss(weight, fit_grid(weight, bits, group_size, sym, torch.float16), clip, importance)
    clipped = fit_grid(weight, bits, group_size, sym, torch.float16, clip, importance)
    ours = loss(weight, clipped, clip, importance)
    assert bool((ours <= plain * (1 + 1e-12)).all())
    assert float(ours.sum()) < float(plain.sum())
    assert torch.equal(clipped.scales.half().double(), clipped.scales)


@pytest.mark.parametrize("clip", ["mse", "hessian"])
def test_clip_search_finds_the_best_range_of_a_short_group(clip: Any) -> None:
    weight, importance = weights(6, 39), torch.rand(39).double()
    importance[-1] = 40.0
    whole = fit_grid(weight, 2, 32, False, torch.float32, clip, importance)
    alone = fit_grid(weight[:, 32:], 2, -1, False, torch.float32, clip, importance[32:])
    assert torch.equal(whole.scales[:, 1:], alone.scales)
    assert torch.equal(whole.zeros[:, 1:], alone.zeros)


def test_hessian_clip_search_without_weights_counts_all_columns_alike() -> None:
    weight = weights()
    ones = fit_grid(weight, 2, 32, False, torch.float32, "hessian", torch.ones(150).double())
    assert torch.equal(fit_grid(weight, 2, 32, False, torch.float32, "hessian").scales, ones.scales)


@pytest.mark.parametrize("clip", ["none", "mse", "hessian"])
def test_a_group_beyond_the_row_is_the_whole_row(clip: Any) -> None:
    weight = torch.randn(4, 6)
    ours, wanted = (fit_grid(weight, 4, size, False, torch.float32, clip) for size in (2**31 - 1, -1))
    assert torch.equal(ours.scales, wanted.scales)
    assert torch.equal(ours.zeros, wanted.zeros)
