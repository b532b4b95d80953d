"""Every form of gptq_sweep and grid_losses against the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from close import assert_close
from forms import check_sweep, forms, placed, seeded, sweep_problem

from epmq import reference
from epmq.quantized import column_groups, group_count

SWEEPS = [(64, 256, 128), (30, 200, 32), (1, 130, -1), (49, 127, 48), (25, 384, 64), (3, 1, -1), (7, 5, 2)]


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SWEEPS, ids=str)
@pytest.mark.parametrize("form", forms("gptq_sweep"))
def test_gptq_sweep(form: Any, shape: tuple[int, int, int], bits: int, symmetric: bool) -> None:
    check_sweep(form, sweep_problem(*shape, bits, symmetric), bits)


@pytest.mark.parametrize("form", forms("gptq_sweep"))
def test_gptq_sweep_is_the_same_for_any_number_of_threads_and_rows(form: Any) -> None:
    weight, upper, scales, zeros, groups = placed(form, *sweep_problem(200, 300, 64, 4, True))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = form.function(weight, upper, scales, zeros, groups, 4)
        torch.set_num_threads(2)
        two = form.function(weight, upper, scales, zeros, groups, 4)
    finally:
        torch.set_num_threads(threads)
    if form.backend in ("reference", "triton"):  # their products are torch's, whose bits depend on the shape
        assert (one != two).float().mean() < 1e-3
        return
    assert torch.equal(one, two)
    part = form.function(weight[37:90], upper, scales[37:90], zeros[37:90], groups, 4)
    assert torch.equal(part, one[37:90])


@pytest.mark.parametrize("form", forms("gptq_sweep"))
def test_gptq_sweep_of_no_rows_and_of_a_row_with_nan(form: Any) -> None:
    weight, upper, scales, zeros, groups = placed(form, *sweep_problem(30, 140, 64, 4, True))
    assert form.function(weight[:0], upper, scales[:0], zeros[:0], groups, 4).shape == (0, 140)
    clean = form.function(weight, upper, scales, zeros, groups, 4)
    weight[5, 60] = float("nan")
    dirty = form.function(weight, upper, scales, zeros, groups, 4)
    others = torch.arange(30) != 5
    assert torch.equal(dirty[others], clean[others]) and torch.equal(dirty[5, :60], clean[5, :60])
    assert torch.equal(dirty, reference.gptq_sweep(weight, upper, scales, zeros, groups, 4))


@pytest.mark.parametrize("power", [2.0, 2.4])
@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
@pytest.mark.parametrize(
    "shape", [(5, 40, 16), (3, 33, 8), (1, 1, -1), (2, 1300, -1), (0, 16, 8), (7, 1100, 700)], ids=str
)
@pytest.mark.parametrize("form", forms("grid_losses"))
def test_grid_losses(form: Any, shape: tuple[int, int, int], weighted: bool, power: float) -> None:
    rows, columns, group_size = shape
    weight, groups = seeded(rows, columns), group_count(columns, group_size)
    weight[: rows // 2, ::3] = 0.0
    scales = 0.05 + 0.2 * seeded(4, rows, groups).abs()
    zeros = torch.tensor([0.0, 3.0, 8.0, 15.0]).view(4, 1, 1).expand(4, rows, groups)
    importance = seeded(columns).abs() if weighted else None
    placed_weight, *grid = placed(form, weight, scales, zeros)
    (counts,) = placed(form, importance)
    found = form.function(placed_weight, *grid, 4, group_size, power, counts).cpu()
    # The same roundings in fp32, everything after them in fp64.
    of = column_groups(columns, group_size).long()
    codes = (torch.round(weight * (1.0 / scales)[..., of]) + zeros[..., of]).clamp(0, 15).double()
    error = ((codes - zeros[..., of].double()) * scales[..., of].double() - weight.double()).abs()
    cost = error.pow(power) * (1.0 if importance is None else importance.double())
    exact = torch.zeros(4, rows, groups, dtype=torch.float64).index_add_(2, of, cost)
    # An error is a difference of numbers of the size of the weight; its power is within 2 powers of that, and 1e-5.
    size = weight.double().abs() + scales[..., of].double() * 15
    slack = power * size * torch.finfo(torch.float32).eps * error.pow(power - 1.0)
    slack = (4.0 * slack + 1e-5 * error.pow(power)) * (1.0 if importance is None else importance.double())
    bound = torch.zeros_like(exact).index_add_(2, of, slack) + (columns + 2) * torch.finfo(torch.float32).eps * exact
    assert_close(found, exact, bound + 2.0**-100, "losses")


@pytest.mark.parametrize("power", [2.0, 2.4, 0.5])
@pytest.mark.parametrize("form", forms("grid_losses"))
def test_grid_losses_of_what_is_not_finite(form: Any, power: float) -> None:
    weight, scales = seeded(5, 32), torch.full((1, 5, 1), 0.25)
    weight[0, 3], weight[1, 4], weight[2, 5] = float("nan"), float("inf"), -float("inf")
    weight[3, 6] = scales[0, 3] = 0.0
    given = placed(form, weight, scales, torch.full((1, 5, 1), 8.0))
    found = form.function(*given, 4, -1, power).cpu().flatten()
    assert found[0].isnan() and found[3].isnan() and found[1] == found[2] == float("inf") and found[4].isfinite()
