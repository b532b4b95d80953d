"""The inverse-free sweep against GPTQ as published, code by code in fp64; scale refit; order and short groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from textbook import gptq, make_layer, min_max_grid, spans
from torch import Tensor

from epmq import QuantConfig
from epmq.grids import Grid, fit_grid, refit_scales
from epmq.solve import factorize
from epmq.sweep import column_order, quantize_to_nearest, quantize_weight

STORED = torch.float32


def hessian_and_weight(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A damped Hessian with uneven diagonal, and a weight with a few wild columns; fp64."""
    layer = make_layer(rows, columns, tasks=2, seed=seed)
    size = torch.linspace(0.2, 3.0, columns).double()[torch.randperm(columns)]
    hessian = layer.hessian() * size * size.unsqueeze(1)
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    weight = layer.merged.clone()
    weight[:, :: max(1, columns // 5)] *= 4
    return hessian, weight


def swept(weight: Tensor, hessian: Tensor, **settings: Any) -> Any:
    config = QuantConfig(method="gptq", **{"clip": "none", "act_order": False, **settings})
    order = column_order(hessian, config.act_order)
    factor = factorize(hessian[order][:, order], 0.0, 0.0, "layer")
    return quantize_weight(weight, hessian, factor, order, config, STORED)


def loss(q: Tensor, weight: Tensor, hessian: Tensor) -> float:
    return float(((q - weight) @ hessian * (q - weight)).sum())


@pytest.mark.parametrize("group_size", [32, 64, 128, -1, 5, 1], ids="group={}".format)
@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8], ids="bits={}".format)
def test_codes_are_the_textbook_loops(bits: int, sym: bool, group_size: int) -> None:
    hessian, weight = hessian_and_weight(9, 150)  # 150: past a block of the sweep, and no multiple of a group
    for act_order, static_groups in ((False, True), (True, True), (False, False)):
        settings = {"bits": bits, "sym": sym, "group_size": group_size}
        ours = swept(weight, hessian, act_order=act_order, static_groups=static_groups, **settings)
        codes, scales, zeros = gptq(weight, hessian, bits, group_size, sym, act_order, static_groups)
        what = f"act_order={act_order} static_groups={static_groups}"
        assert torch.equal(ours.codes, codes), f"{what}: {int((ours.codes != codes).sum())} codes differ"
        assert torch.equal(ours.scales, scales.float()), what
        assert ours.zeros is None if sym else torch.equal(ours.zeros, zeros.to(torch.uint8)), what


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 127), (3, 128), (2, 129), (17, 257), (4, 300)])
@pytest.mark.parametrize("act_order", [False, True])
def test_codes_are_the_textbook_loops_at_odd_shapes(rows: int, columns: int, act_order: bool) -> None:
    hessian, weight = hessian_and_weight(rows, columns, seed=rows)
    ours = swept(weight, hessian, bits=4, group_size=64, act_order=act_order)
    assert torch.equal(ours.codes, gptq(weight, hessian, 4, 64, False, act_order)[0])


@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_in_fp32_the_error_is_the_same(bits: int, static_groups: bool) -> None:
    hessian, weight = hessian_and_weight(24, 200)
    settings = {"bits": bits, "group_size": 64, "static_groups": static_groups}
    exact, single = (swept(weight.to(d), hessian.to(d), **settings) for d in (torch.float64, torch.float32))
    errors = [loss(q.dequantize().double(), weight, hessian) for q in (exact, single)]
    # Codes drift after a rounding tie; the error may not: 0.1 percent.
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_beats_rounding_to_nearest(bits: int) -> None:
    hessian, weight = hessian_and_weight(16, 128)
    config = QuantConfig(method="rtn", bits=bits, group_size=32, clip="none")
    nearest = loss(quantize_to_nearest(weight, config, STORED).dequantize().double(), weight, hessian)
    for act_order in (False, True):
        ours = swept(weight, hessian, bits=bits, group_size=32, act_order=act_order)
        assert loss(ours.dequantize().double(), weight, hessian) < 0.8 * nearest


def test_act_order_takes_the_largest_diagonal_first_and_keeps_ties_in_place() -> None:
    hessian = torch.diag(torch.tensor([1.0, 3.0, 1.0, 3.0, 2.0]))
    assert column_order(hessian, True).tolist() == [1, 3, 4, 0, 2]
    assert column_order(hessian, False).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("clip", ["mse", "hessian"])
@pytest.mark.parametrize("act_order", [False, True])
def test_clipped_grids_are_those_of_the_target(clip: str, act_order: bool) -> None:
    hessian, weight = hessian_and_weight(6, 70)
    ours = swept(weight, hessian, bits=2, group_size=32, clip=clip, act_order=act_order)
    grid = fit_grid(weight, 2, 32, False, STORED, clip, hessian.diagonal())  # type: ignore[arg-type]
    assert torch.equal(ours.scales.double(), grid.scales)


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scale_refit_never_raises_the_objective(bits: int, sym: bool, group_size: int) -> None:
    hessian, weight = hessian_and_weight(8, 150)
    settings = {"bits": bits, "sym": sym, "group_size": group_size}
    plain, refit = swept(weight, hessian, **settings), swept(weight, hessian, scale_refit=True, **settings)
    assert torch.equal(plain.codes, refit.codes)
    before, after = (
        torch.einsum("nk,kj,nj->n", d, hessian, d) for d in (q.dequantize().double() - weight for q in (plain, refit))
    )
    assert bool((after <= before * (1 + 1e-6)).all())
    assert float(after.sum()) < float(before.sum())


def test_scale_refit_finds_the_scales_that_made_the_weight() -> None:
    hessian, _ = hessian_and_weight(5, 64)
    codes = torch.randint(0, 16, (5, 64), dtype=torch.uint8)
    true = torch.rand(5, 2).double() + 0.5
    weight = (codes.double() - 8) * true.repeat_interleave(32, 1)
    start = Grid(torch.ones(5, 2).double(), torch.full((5, 2), 8.0).double(), 4, 32, True, torch.float64)
    refit = refit_scales(codes, start, weight, hessian)
    # The ridge of 1e-6 keeps a millionth of the starting scales.
    assert float((refit.scales - true).abs().max()) < 1e-4


def test_scale_refit_of_a_row_of_zeros_keeps_it() -> None:
    hessian, weight = hessian_and_weight(4, 64)
    weight[1] = 0.0
    ours = swept(weight.float(), hessian.float(), bits=4, group_size=32, scale_refit=True)
    assert torch.equal(ours.dequantize()[1], torch.zeros(64))
    assert bool((ours.scales > 0).all())


def test_the_last_group_may_be_short() -> None:
    hessian, weight = hessian_and_weight(3, 70)
    # Whatever the 6 columns of the last group hold, they have a scale of their own.
    weight[:, 64:] *= 1e-3
    ours = swept(weight, hessian, bits=4, group_size=32)
    assert ours.scales.shape == (3, 3)
    assert float(ours.scales[:, 2].max()) < 0.1 * float(ours.scales[:, :2].min())


def test_late_grids_see_what_earlier_columns_left_behind() -> None:
    hessian, weight = hessian_and_weight(3, 64)
    late = swept(weight, hessian, bits=2, group_size=32, static_groups=False)
    groups = list(spans(64, 32))
    first, _ = min_max_grid(weight[:, slice(*groups[0])], 2, False, STORED)
    second, _ = min_max_grid(weight[:, slice(*groups[1])], 2, False, STORED)
    assert torch.equal(late.scales[:, 0].double(), first)
    assert not torch.equal(late.scales[:, 1].double(), second)
