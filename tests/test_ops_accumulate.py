"""Every form of accumulate against the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from close import assert_close, product_bound
from forms import DTYPES, ON_GPU, check_accumulate, compiled, forms, moments, placed, run_accumulate, seeded
from torch import Tensor

from epmq import extension, reference
from epmq.rows import kept_rows
from epmq.statistics import ROUNDING, Folded


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("weights", ["ones", "mask", "weighted"])
@pytest.mark.parametrize(
    "shape", [(300, 64, 40), (1, 24, 8), (0, 16, 8), (257, 100, None), (70, 129, 131), (513, 33, 5), (5, 1, 1)], ids=str
)
@pytest.mark.parametrize("form", forms("accumulate"))
def test_accumulate(form: Any, shape: tuple[int, int, int | None], weights: str, dtype: torch.dtype) -> None:
    count, columns, targets = shape
    x = seeded(count, columns).to(dtype)
    target = None if targets is None else seeded(count, targets).to(dtype)
    rows = None
    if weights != "ones":
        rows = (torch.arange(count) % 3 != 1).float()
        if weights == "weighted":
            rows = rows * torch.linspace(0.5, 2.0, count)
    check_accumulate(form, x, target, rows)


@pytest.mark.parametrize("form", forms("accumulate"))
def test_accumulate_reads_strided_rows_and_columns(form: Any) -> None:
    base = seeded(90, 200)
    check_accumulate(form, base[::2, 10:70], base[::2, 100:150], None)
    check_accumulate(form, base.T[:100, ::3], None, None)


@pytest.mark.parametrize("form", forms("accumulate"))
def test_accumulate_ignores_what_masked_rows_hold(form: Any) -> None:
    x = seeded(40, 30)
    rows = torch.ones(40)
    rows[7] = rows[31] = 0
    x[7], x[31, 3] = float("nan"), float("inf")
    check_accumulate(form, x, x[:, :10].clone(), rows)


@pytest.mark.parametrize("form", forms("accumulate"))
def test_accumulate_keeps_denormals_and_non_finite_numbers(form: Any) -> None:
    check_accumulate(form, torch.full((9, 20), 1e-41), None, None)
    x = seeded(20, 10)
    x[3, 2], x[5, 4] = float("inf"), float("nan")
    check_accumulate(form, x, None, None)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("sums_in", [torch.float32, torch.float64], ids=["fp32-sums", "fp64-sums"])
@pytest.mark.parametrize("shape", [(300, 500), (4096, 384), (10000, 40)], ids=str)
@pytest.mark.parametrize("form", forms("accumulate"))
def test_a_column_that_never_varies_has_no_variance(
    form: Any, shape: tuple[int, int], sums_in: torch.dtype, dtype: torch.dtype
) -> None:
    """The others keep theirs, down to a hundredth of their mean."""
    if sums_in == torch.float64 and form.backend in ON_GPU:
        pytest.skip("its sums are fp32")
    rows, columns = shape
    x = (0.1 + 4 * seeded(columns).abs()).to(dtype).repeat(rows, 1)
    x[:, ::4] = (30 + 0.3 * seeded(rows, len(x[0, ::4]))).to(dtype)
    varies = (x != x[0]).any(0)
    folded = Folded.empty(1, columns, sums_in)
    given, *sums = placed(form, x, folded.hessian, folded.sum_x)
    form.function(given, *sums)
    folded.hessian, folded.sum_x = reference.symmetrize(sums[0].cpu()), sums[1].cpu()
    folded.weight = float(rows)
    found = folded.centred().hessian
    assert varies.sum() == len(x[0, ::4])
    assert torch.equal(found.diagonal() != 0, varies)
    assert not found[~varies].any() and not found[:, ~varies].any()
    wide = x.double()
    variance = (wide - wide.mean(0)).square().sum(0)
    noise = ROUNDING * wide.square().sum(0)
    assert_close(found.diagonal()[varies].float(), variance[varies], noise[varies], "variance")


@compiled
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("weighted", [False, True], ids=["ones", "weighted"])
def test_no_fp32_sum_is_longer_than_a_part(weighted: bool, dtype: torch.dtype) -> None:
    """A sum of d nearly equal terms is off by d/3 roundings at most: of 160 rows, then of the parts of the batch."""
    count, columns, targets = 8192, 40, 24
    x, target = ((30 + 0.1 * seeded(count, width)).to(dtype) for width in (columns, targets))
    rows = 1 + 0.001 * seeded(count) if weighted else None
    shapes = ((columns, columns), (columns,), (targets, columns), (targets,))
    found: list[Tensor | None] = [torch.zeros(shape) for shape in shapes]
    exact: list[Tensor | None] = [torch.zeros(shape).double() for shape in shapes]
    run_accumulate(torch.ops.epmq_native.accumulate, x, target, found, rows)
    run_accumulate(reference.accumulate, x.double(), target.double(), exact, rows)
    longest = 160 + -(-count // 160)
    for name, sums, wanted in zip(("hessian", "sum_x", "cross", "sum_target"), found, exact, strict=True):
        assert sums is not None and wanted is not None
        # Terms differ by 2 %; weighted ones, and those cut to bf16 parts, are rounded before.
        bound = (1.02 * longest / 3 + 4) * 2.0**-24 * wanted.abs()
        pair = (sums.tril(), wanted.tril(), bound.tril()) if name == "hessian" else (sums, wanted, bound)
        assert_close(*pair, name)


@compiled
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("weighted", [False, True], ids=["ones", "weighted"])
@pytest.mark.parametrize("shape", [(160, 64, 40), (1, 24, 8), (97, 129, 131), (5, 1, 1), (0, 16, 8)], ids=str)
def test_accumulate_adds_its_fp32_sums_to_fp64_ones(
    shape: tuple[int, int, int], weighted: bool, dtype: torch.dtype
) -> None:
    """So few rows are one part of a batch, whose sums are added without rounding."""
    count, columns, targets = shape
    x, target = seeded(count, columns).to(dtype), seeded(count, targets).to(dtype)
    rows = (torch.arange(count) % 3).float() if weighted else None
    narrow = [None if t is None else torch.zeros_like(t) for t in moments(columns, targets)]
    before = [None if t is None else t.double() * 2.0**20 for t in moments(columns, targets)]
    wide = [None if t is None else t.clone() for t in before]
    for sums in (narrow, wide):
        run_accumulate(torch.ops.epmq_native.accumulate, x, target, sums, rows)
    for name, found, start, added in zip(
        ("hessian", "sum_x", "cross", "sum_target"), wide, before, narrow, strict=True
    ):
        assert found is not None and start is not None and added is not None
        pair = (found, start + added.double())
        assert torch.equal(*((t.tril() for t in pair) if name == "hessian" else pair)), name


@pytest.mark.parametrize("kind", ["none", "ones", "mask", "weighted", "zeros"])
def test_kept_rows_are_those_that_weigh_something(kind: str) -> None:
    x, target = seeded(6, 3), seeded(6, 2)
    mask = torch.tensor([1.0, 0, 1, 1, 0, 1])
    given = {"none": None, "ones": torch.ones(6), "mask": mask, "weighted": 2 * mask, "zeros": torch.zeros(6)}[kind]
    found, found_target, weights = kept_rows(x, target, given)
    keep = torch.ones(6, dtype=torch.bool) if given is None else given != 0
    assert torch.equal(found, x[keep]) and found_target is not None and torch.equal(found_target, target[keep])
    assert kept_rows(x, None, given)[1] is None
    if kind == "weighted":
        assert weights is not None and torch.equal(weights, torch.full((4,), 2.0))
    else:
        assert weights is None


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_below_the_normal_numbers_may_count_as_zero(dtype: torch.dtype) -> None:
    """Products of bf16 numbers below 2^-126 are flushed; the sums of x keep everything."""
    x, hessian, sum_x = (seeded(40, 30) * 2.0**-64).to(dtype), torch.zeros(30, 30), torch.zeros(30)
    torch.ops.epmq_native.accumulate(x, hessian, sum_x)
    exact = x.double().T @ x.double()
    flushed = 6 * x.shape[0] * 2.0**-126
    bound = product_bound(x.double().abs().T @ x.double().abs(), x.shape[0] + 2) + flushed
    assert_close(hessian.tril(), exact.tril(), bound.tril(), "hessian")
    assert_close(sum_x, x.double().sum(0), product_bound(x.double().abs().sum(0), x.shape[0] + 2), "sum_x")


@compiled
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_statistics_are_the_same_for_any_number_of_threads(dtype: torch.dtype) -> None:
    x, target = seeded(600, 300).to(dtype), seeded(600, 170).to(dtype)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        sums = [torch.zeros(300, 300), torch.zeros(300), torch.zeros(170, 300), torch.zeros(170)]
        torch.ops.epmq_native.accumulate(x, sums[0], sums[1], target, sums[2], sums[3])
        results.append([sums[0].tril(), *sums[1:]])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@compiled
@pytest.mark.parametrize("h_tiles, cross_tiles", [(1, 0), (1, 3), (2, 1), (7, 5), (40, 3)])
def test_tiles_of_the_cuda_launch_cover_the_triangle_and_the_cross_covariance_once(
    h_tiles: int, cross_tiles: int
) -> None:
    assert extension.module is not None
    wanted = [(row, column, False) for row in range(h_tiles) for column in range(row + 1)]
    wanted += [(row, column, True) for row in range(cross_tiles) for column in range(h_tiles)]
    assert extension.module.statistics_tiles(h_tiles, cross_tiles) == wanted
