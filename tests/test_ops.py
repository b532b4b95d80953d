"""Every registered form of every operation against the definition in float64.

EPMQ_CPU=plain|avx2|avx512|avx512bf16|amx runs the same tests through one instruction set, ``make test-levels`` through
each.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from close import assert_close, product_bound
from torch import Tensor

from epmq import extension, ops, reference
from epmq.quantized import column_groups, dequantize, group_count, pack, packed_words
from epmq.rows import kept_rows
from epmq.statistics import ROUNDING, Folded

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ON_GPU = ("cuda", "triton")
compiled = pytest.mark.skipif(extension.module is None, reason="the extension is not built")


def forms(op: str) -> list[Any]:
    """The registered implementations of an operation that this machine can run, by backend.

    The Triton forms run in the interpreter without a GPU, slowly: test_gptq_block.py and test_gram.py choose shapes.
    """
    found = [form for form in ops.implementations(op) if form.backend not in ON_GPU or torch.cuda.is_available()]
    if op == "dequant_matmul":  # Triton's form multiplies 16-bit weights: tests/test_int4_matmul.py
        found = [form for form in found if form.backend != "triton"]
    return [
        pytest.param(form, id=form.backend, marks=[pytest.mark.gpu] if form.backend in ON_GPU else []) for form in found
    ]


def placed(form: Any, *tensors: Any) -> list[Any]:
    """The tensors (or None) where a form runs."""
    device = "cuda" if form.backend in ON_GPU and torch.cuda.is_available() else "cpu"
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + 1))


# ---- accumulate ------------------------------------------------------------------------------------------------------


def moments(columns: int, targets: int | None) -> list[Tensor | None]:
    """Running sums that are not zero at the start: hessian, sum_x, cross, sum_target."""
    hessian = seeded(columns, columns)
    sums: list[Tensor | None] = [hessian @ hessian.T, seeded(columns)]
    return sums + ([None, None] if targets is None else [seeded(targets, columns), seeded(targets)])


def run_accumulate(function: Any, x: Tensor, target: Tensor | None, sums: list[Tensor | None], rows: Any) -> None:
    hessian, sum_x, cross, sum_target = sums
    function(x, hessian, sum_x, target, cross, sum_target, rows)


def check_accumulate(form: Any, x: Tensor, target: Tensor | None, rows: Tensor | None) -> None:
    """Both moments of one call against float64."""
    before = moments(x.shape[1], None if target is None else target.shape[1])
    actual = placed(form, *[None if t is None else t.clone() for t in before])
    given, given_target, given_rows = placed(form, x, target, rows)
    run_accumulate(form.function, given, given_target, actual, given_rows)
    exact = [None if t is None else t.double() for t in before]
    size = [None if t is None else t.double().abs() for t in before]
    wide, wide_target = x.double(), None if target is None else target.double()
    run_accumulate(reference.accumulate, wide, wide_target, exact, rows)
    run_accumulate(reference.accumulate, wide.abs(), None if wide_target is None else wide_target.abs(), size,
                   None if rows is None else rows.abs())  # fmt: skip
    for name, found, wanted, magnitude in zip(("hessian", "sum_x", "cross", "sum_target"), actual, exact, size,
                                              strict=True):  # fmt: skip
        if found is None or wanted is None or magnitude is None:
            continue
        found = found.cpu()
        if name == "hessian":
            found, wanted = found.tril(), wanted.tril()
        assert_close(found, wanted, product_bound(magnitude, x.shape[0] + 2), name)


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


# ---- gptq_sweep ------------------------------------------------------------------------------------------------------


def sweep_problem(rows: int, columns: int, group: int, bits: int, symmetric: bool) -> tuple[Tensor, ...]:
    """Weight, unit upper factor, scales, zeros and groups of a problem with correlated inputs."""
    x = seeded(2 * columns + 8, columns) @ (torch.eye(columns) + 0.2 * seeded(columns, columns) / columns**0.5)
    hessian = x.T @ x
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    weight = seeded(rows, columns)
    groups = group_count(columns, group)
    levels = 2**bits - 1
    scales = 5.0 / levels * (1 + 0.1 * torch.rand(rows, groups))
    zeros = torch.full((rows, groups), 2.0 ** (bits - 1))
    if not symmetric:
        zeros = (zeros + torch.arange(groups) % 3 - 1).clamp(0, levels)
    return weight, upper / upper.diagonal(), scales, zeros, column_groups(columns, group)


def pre_rounding(
    codes: Tensor, weight: Tensor, unit_upper: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor
) -> tuple[Tensor, Tensor]:
    """In float64, what each code was rounded from given the codes before it, and the bound on its fp32 error."""
    groups = group_of.long()
    grid, origin = scales.double()[:, groups], zeros.double()[:, groups]
    strict = unit_upper.double().triu(1)
    deviation = weight.double() - (codes.double() - origin) * grid
    adjusted = weight.double() + deviation @ strict
    size = weight.double().abs() + deviation.abs() @ strict.abs()
    # K products, and a few roundings around the division by the scale.
    bound = product_bound(size, weight.shape[1] + 8) / grid
    return adjusted / grid + origin, bound + 4 * 2.0**-24 * (adjusted / grid).abs()


SWEEPS = [(64, 256, 128), (30, 200, 32), (1, 130, -1), (49, 127, 48), (25, 384, 64), (3, 1, -1), (7, 5, 2)]


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SWEEPS, ids=str)
@pytest.mark.parametrize("form", forms("gptq_sweep"))
def test_gptq_sweep(form: Any, shape: tuple[int, int, int], bits: int, symmetric: bool) -> None:
    check_sweep(form, sweep_problem(*shape, bits, symmetric), bits)


def check_sweep(form: Any, problem: tuple[Tensor, ...], bits: int) -> Tensor:
    """Each code is the rounding of its float64 value, except within the fp32 error of a tie."""
    codes: Tensor = form.function(*placed(form, *problem), bits).cpu()
    assert codes.dtype == torch.uint8 and codes.shape == problem[0].shape
    value, bound = pre_rounding(codes, *problem)
    top = 2**bits - 1
    excess = ((value - codes.double()).abs() - 0.5 - bound).clamp(min=0)
    inside = (codes > 0) & (codes < top)
    below = (codes == 0) & (value > 0.5 + bound)
    above = (codes == top) & (value < top - 0.5 - bound)
    wrong = (inside & (excess > 0)) | below | above
    assert not wrong.any(), f"{int(wrong.sum())} codes are not the nearest; first at {wrong.nonzero()[0].tolist()}"
    return codes


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


# ---- subtract_product ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(70, 256, 100), (33, 77, 45), (1, 1, 1), (5, 300, 0), (0, 8, 8), (64, 32, 64)], ids=str
)
@pytest.mark.parametrize("strides", ["rows", "columns", "neither"])
@pytest.mark.parametrize("form", forms("subtract_product"))
def test_subtract_product(form: Any, strides: str, shape: tuple[int, int, int]) -> None:
    rows, depth, columns = shape
    a, b = seeded(rows, depth), seeded(depth, columns)
    if strides == "columns":
        a, b = a.T.contiguous().T, b.T.contiguous().T
    elif strides == "neither":
        a, b = seeded(rows, 2 * depth)[:, ::2], seeded(3 * depth, 2 * columns)[::3, ::2]
    before = seeded(rows, columns + 3)
    whole, given_a, given_b = placed(form, before.clone(), a, b)
    form.function(whole[:, :columns], given_a, given_b)
    exact = before.double()
    exact[:, :columns] -= a.double() @ b.double()
    magnitude = before.double().abs()
    magnitude[:, :columns] += a.double().abs() @ b.double().abs()
    # Two factors cut to 16 bits each, and the product of what is left of them.
    cut = 3 * 2.0**-16 if extension.rounds_products() else 0.0
    assert_close(whole.cpu(), exact, product_bound(magnitude, depth + 1) + cut * magnitude, "out")
    assert torch.equal(whole.cpu()[:, columns:], before[:, columns:])


@compiled
def test_a_row_has_the_same_bits_whatever_is_subtracted_with_it() -> None:
    function = torch.ops.epmq_native.subtract_product
    a, b, before = seeded(90, 256), seeded(256, 1600), seeded(90, 1600)
    threads = torch.get_num_threads()
    whole = before.clone()
    function(whole, a, b)
    for count in (1, 2):
        torch.set_num_threads(count)
        for first, last in [(0, 1), (7, 30), (31, 64), (89, 90)]:
            part = before[first:last].clone()
            function(part, a[first:last], b)
            assert torch.equal(part, whole[first:last]), f"rows {first}..{last}"
    torch.set_num_threads(threads)


# ---- subtract_gram ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 70), (129, 5), (48, 161), (1, 1), (7, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("form", forms("subtract_gram"))
def test_subtract_gram(form: Any, strided: bool, shape: tuple[int, int]) -> None:
    rows, depth = shape
    a = seeded(depth, rows).T if strided else seeded(rows, depth)
    before = seeded(rows, rows + 5)
    whole, given = placed(form, before.clone(), a)
    form.function(whole[:, :rows], given)
    exact = before[:, :rows].double() - a.double() @ a.double().T
    magnitude = before[:, :rows].double().abs() + a.double().abs() @ a.double().abs().T
    bound = product_bound(magnitude, depth + 1)
    assert_close(whole.cpu()[:, :rows].tril(), exact.tril(), bound, "out")
    assert torch.equal(whole.cpu()[:, rows:], before[:, rows:])


# ---- grid_losses ----------------------------------------------------------------------------------------------------


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


# ---- cholesky --------------------------------------------------------------------------------------------------------


FACTORS = [pytest.param(form, {}, id=form.backend) for form in ops.implementations("cholesky")]
FACTORS += [
    pytest.param(ops.implementations("cholesky")[0], {"block": size}, id=f"blocks-of-{size}") for size in (16, 32)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("size", [1, 5, 32, 33, 100])
@pytest.mark.parametrize("form, more", FACTORS)
def test_cholesky(form: Any, more: dict[str, int], size: int, dtype: torch.dtype) -> None:
    """L Lᵀ is the matrix, within the backward error of K products and roundings; only the lower triangle is read."""
    x = seeded(size, 2 * size + 1).to(dtype)
    matrix = reference.symmetrize(x @ x.T)
    lower, info = form.function(matrix.tril() + 9.0 * torch.ones_like(matrix).triu(1), **more)
    assert int(info) == 0 and info.dtype == torch.int32 and torch.equal(lower, lower.tril())
    bound = product_bound(lower.double().abs() @ lower.double().abs().T, size + 1)
    if dtype == torch.float64:
        bound *= 2.0**-29
    assert ((lower.double() @ lower.double().T - matrix.double()).abs() <= bound).all()


@pytest.mark.parametrize("place", [0, 20, 39])
@pytest.mark.parametrize("form, more", FACTORS)
def test_cholesky_tells_where_a_matrix_is_not_positive_definite(form: Any, more: dict[str, int], place: int) -> None:
    matrix = torch.eye(40)
    matrix[place, place] = -1.0
    assert int(form.function(matrix, **more)[1]) == place + 1


def test_the_blocked_cholesky_runs_when_asked_and_for_large_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.choose("cholesky", torch.eye(3)).backend == "reference"
    assert ops.choose("cholesky", torch.eye(1024)).backend == "blocked"
    assert ops.choose("cholesky", torch.eye(1024, device="meta")).backend == "reference"
    monkeypatch.setenv("EPMQ_BACKEND", "blocked")
    assert ops.choose("cholesky", torch.eye(3)).backend == "blocked"


# ---- dequant_matmul --------------------------------------------------------------------------------------------------


def matmul_problem(rows: int, columns: int, group: int, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Any]:
    generator = torch.Generator().manual_seed(rows + columns)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    groups = group_count(columns, group)
    scales = 0.01 + 0.1 * torch.rand(rows, groups, generator=generator)
    zeros = torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8, generator=generator)
    return codes, scales, None if symmetric else zeros


def check_matmul(
    form: Any,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    packed = pack(codes, bits)
    y: Tensor = form.function(x, packed, scales, zeros, bias, bits, group)
    assert y.dtype == x.dtype
    weight = dequantize(codes, scales, zeros, bits, group).double()
    offset = torch.zeros(codes.shape[0]).double() if bias is None else bias.double()
    exact = x.double() @ weight.T + offset
    bound = product_bound(x.double().abs() @ weight.abs().T + offset.abs(), x.shape[1] + 2)
    assert_close(y, exact, bound, "y")
    return y


MATMULS = [
    (64, 256, 128),
    (67, 200, 32),
    (5, 96, -1),
    (30, 1000, 64),
    (33, 130, 48),
    (1, 1, -1),
    (50, 513, 96),
    (9, 31, 7),
]
# What compiled forms for bf16 tell apart: segments of a group, rows at the end of a panel, few rows of x and many.
WORD_MATMULS = [(97, 1200, 128), (13, 1100, -1), (11, 320, 160), (23, 192, 96), (35, 416, 32)]


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 18, 515])
@pytest.mark.parametrize("shape", WORD_MATMULS, ids=str)
@pytest.mark.parametrize("form", forms("dequant_matmul"))
def test_dequant_matmul_of_bf16(form: Any, shape: tuple[int, int, int], rows: int, symmetric: bool) -> None:
    codes, scales, zeros = matmul_problem(*shape, 4, symmetric)
    if zeros is not None:
        zeros[0, 0] = 200  # beyond the codes
    check_matmul(form, seeded(rows, shape[1]).bfloat16(), codes, scales, zeros, seeded(shape[0]), 4, shape[2])


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 33, 70])
@pytest.mark.parametrize("shape", MATMULS, ids=str)
@pytest.mark.parametrize("form", forms("dequant_matmul"))
def test_dequant_matmul(form: Any, shape: tuple[int, int, int], rows: int, bits: int, symmetric: bool) -> None:
    codes, scales, zeros = matmul_problem(*shape, bits, symmetric)
    check_matmul(form, seeded(rows, shape[1]), codes, scales, zeros, seeded(shape[0]), bits, shape[2])


@pytest.mark.parametrize("scale_dtype", DTYPES.values(), ids=[f"scales-{name}" for name in DTYPES])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("form", forms("dequant_matmul"))
def test_dequant_matmul_of_every_dtype(form: Any, rows: int, dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    codes, scales, zeros = matmul_problem(40, 360, 32, 4, False)
    x, bias = seeded(rows, 360).to(dtype), seeded(40).to(dtype)
    check_matmul(form, x, codes, scales.to(scale_dtype), zeros, bias, 4, 32)


@pytest.mark.parametrize("form", forms("dequant_matmul"))
def test_dequant_matmul_of_strided_denormal_and_non_finite_activations(form: Any) -> None:
    codes, scales, zeros = matmul_problem(20, 128, 64, 4, False)
    check_matmul(form, seeded(12, 400)[::3, 100:228], codes, scales, zeros, None, 4, 64)
    check_matmul(form, seeded(256, 6).T[:, ::2], codes, scales, zeros, None, 4, 64)
    check_matmul(form, torch.full((3, 128), 1e-41), codes, scales, zeros, None, 4, 64)
    x = seeded(4, 128)
    x[1, 5], x[2, 9] = float("nan"), float("-inf")
    y = form.function(x, pack(codes, 4), scales, zeros, None, 4, 64)
    wanted = reference.dequant_matmul(x, pack(codes, 4), scales, zeros, None, 4, 64)
    assert torch.equal(y.isnan(), wanted.isnan()) and torch.equal(y.isinf(), wanted.isinf())
    assert torch.equal(y[y.isinf()], wanted[wanted.isinf()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN in the same places."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0, 1e4, -1e4), b.nan_to_num(0, 1e4, -1e4))


@compiled
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits, group", [(4, 128), (4, 64), (4, 32), (4, -1), (4, 48), (3, 64), (8, 128), (2, -1)])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(
    bits: int, group: int, symmetric: bool, dtype: torch.dtype
) -> None:
    function = torch.ops.epmq_native.dequant_matmul
    columns = 1184  # three passes, the last one short
    codes, scales, zeros = matmul_problem(107, columns, group, bits, symmetric)
    packed = pack(codes, bits)
    x = seeded(530, columns).to(dtype)
    x[3, 5], x[40, 7], x[41, 8], x[149, 9] = float("inf"), 1e-39, float("nan"), 3e38
    whole = function(x, packed, scales, zeros, None, bits, group)
    for first, last in [(0, 1), (7, 8), (3, 5), (10, 13), (20, 24), (31, 64), (100, 150), (149, 150), (505, 530)]:
        part = function(x[first:last], packed, scales, zeros, None, bits, group)
        assert same_bits(part, whole[first:last]), f"rows {first}..{last}"


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
def test_matmul_is_the_same_for_any_number_of_threads() -> None:
    codes, scales, _ = matmul_problem(500, 512, 128, 4, True)
    threads = torch.get_num_threads()
    for rows in (1, 3, 80):
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(
                torch.ops.epmq_native.dequant_matmul(seeded(rows, 512), pack(codes, 4), scales, None, None, 4, 128)
            )
        torch.set_num_threads(threads)
        assert torch.equal(*results)


# ---- registration ----------------------------------------------------------------------------------------------------


@compiled
def test_operators_pass_opcheck() -> None:
    native = torch.ops.epmq_native
    codes, scales, zeros = matmul_problem(20, 96, 32, 4, False)
    packed = pack(codes, 4)
    for x in (seeded(3, 96), seeded(3, 96).requires_grad_()):
        torch.library.opcheck(native.dequant_matmul.default, (x, packed, scales, zeros, seeded(20), 4, 32))
    torch.library.opcheck(native.gptq_sweep.default, (*sweep_problem(20, 60, 32, 4, True), 4))
    torch.library.opcheck(native.subtract_product.default, (seeded(9, 7), seeded(9, 5), seeded(5, 7)))
    torch.library.opcheck(native.subtract_gram.default, (seeded(9, 9), seeded(9, 5)))
    target = seeded(9, 5)
    hessian, sum_x, cross, sum_target = moments(16, 5)
    torch.library.opcheck(
        native.accumulate.default, (seeded(9, 16), hessian, sum_x, target, cross, sum_target, torch.ones(9))
    )


@compiled
def test_what_is_written_to_counts_as_changed() -> None:
    native = torch.ops.epmq_native
    sums = [torch.zeros(4, 4), torch.zeros(4), torch.zeros(2, 4), torch.zeros(2)]
    native.accumulate(seeded(3, 4), sums[0], sums[1], seeded(3, 2), sums[2], sums[3])
    assert [tensor._version for tensor in sums] == [1, 1, 1, 1]
    out, kept = torch.zeros(8, 8), torch.ones(8, 8, requires_grad=True)
    y = (kept * out).sum()
    native.subtract_product(out, seeded(8, 4), seeded(4, 8))
    native.subtract_gram(out, seeded(8, 4))
    assert out._version == 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with pytest.raises(RuntimeError, match="subtract_product: a tensor that requires a gradient"):
        native.subtract_product(kept, seeded(8, 4), seeded(4, 8))
    with torch.no_grad():
        native.subtract_product(kept, seeded(8, 4), seeded(4, 8))
    with torch.inference_mode():
        native.subtract_gram(torch.zeros(8, 8), seeded(8, 4))


@compiled
def test_matmul_has_the_gradient_of_the_dense_product() -> None:
    codes, scales, zeros = matmul_problem(20, 96, 32, 4, False)
    x, bias, pull = seeded(3, 96).requires_grad_(), seeded(20).requires_grad_(), seeded(3, 20)
    y = torch.ops.epmq_native.dequant_matmul(x, pack(codes, 4), scales, zeros, bias, 4, 32)
    grad_x, grad_bias = torch.autograd.grad(y, (x, bias), pull)
    weight = dequantize(codes, scales, zeros, 4, 32)
    torch.testing.assert_close(grad_x, pull @ weight)
    torch.testing.assert_close(grad_bias, pull.sum(0))


@compiled
def test_bad_arguments_are_refused_by_name() -> None:
    native = torch.ops.epmq_native
    codes, scales, zeros = matmul_problem(20, 96, 32, 4, False)
    packed = pack(codes, 4)
    for wanted, arguments in {
        "packed": (seeded(3, 97), packed, scales, zeros, None, 4, 32),
        "scales": (seeded(3, 96), packed, scales[:, :2], zeros, None, 4, 32),
        "zeros": (seeded(3, 96), packed, scales, zeros.int(), None, 4, 32),
        "bias": (seeded(3, 96), packed, scales, zeros, seeded(19), 4, 32),
        "bits": (seeded(3, 96), packed, scales, zeros, None, 5, 32),
    }.items():
        with pytest.raises(ValueError, match=wanted):
            native.dequant_matmul(*arguments)
    weight, upper, scales, zeros, groups = sweep_problem(20, 60, 32, 4, True)
    with pytest.raises(ValueError, match="group_of"):
        native.gptq_sweep(weight, upper, scales, zeros, groups + 2, 4)
    with pytest.raises(ValueError, match="out"):
        native.subtract_product(seeded(9, 6), seeded(9, 5), seeded(5, 7))
    with pytest.raises(ValueError, match="rows without gaps"):
        native.subtract_product(seeded(9, 14)[:, ::2], seeded(9, 5), seeded(5, 7))
    with pytest.raises(ValueError, match="out"):
        native.subtract_gram(seeded(9, 8), seeded(9, 5))
    with pytest.raises(ValueError, match="hessian"):
        native.accumulate(seeded(3, 4), torch.zeros(5, 5), torch.zeros(4))
    with pytest.raises(ValueError, match="sum_x"):
        native.accumulate(seeded(3, 4), torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4))
    with pytest.raises(ValueError, match="hessian"):
        native.accumulate(seeded(3, 4), torch.zeros(4, 4, dtype=torch.int32), torch.zeros(4))
    with pytest.raises(ValueError, match="target: expected"):
        native.accumulate(seeded(3, 4), torch.zeros(4, 4), torch.zeros(4), seeded(3), torch.zeros(3, 4), torch.zeros(3))
    with pytest.raises(RuntimeError, match="refers to a single memory location"):
        native.subtract_product(torch.zeros(1, 8).expand(8, 8), seeded(8, 4), seeded(4, 8))
    with pytest.raises(RuntimeError, match="refers to a single memory location"):
        native.subtract_gram(torch.zeros(1, 8).expand(8, 8), seeded(8, 4))


@compiled
def test_one_meta_tensor_among_real_ones_is_refused() -> None:
    native = torch.ops.epmq_native
    x, (codes, scales, _) = seeded(2, 96), matmul_problem(20, 96, 32, 4, True)
    packed = pack(codes, 4)
    with pytest.raises(ValueError, match="one device, got cpu and meta"):
        native.dequant_matmul(x, packed, scales, None, torch.zeros(20, device="meta"), 4, 32)
    with pytest.raises(ValueError, match="one device, got meta and cpu"):
        native.dequant_matmul(x.to("meta"), packed, scales, None, None, 4, 32)
    with pytest.raises(ValueError, match="one device, got cpu and meta"):
        native.accumulate(x, torch.zeros(96, 96, device="meta"), torch.zeros(96))


@compiled
@pytest.mark.parametrize("size", [97, 2**31, 2**62, 2**63 - 1])
def test_a_group_may_be_larger_than_the_row(size: int) -> None:
    codes, scales, zeros = matmul_problem(20, 96, -1, 4, False)
    for bits, dtype in ((4, torch.float32), (4, torch.bfloat16), (2, torch.float32)):
        call = (seeded(3, 96).to(dtype), pack(codes & (2**bits - 1), bits), scales, zeros, None, bits)
        assert torch.equal(
            torch.ops.epmq_native.dequant_matmul(*call, size), torch.ops.epmq_native.dequant_matmul(*call, -1)
        )
    grids = (seeded(20, 96), scales[None], zeros.float()[None], 4)
    assert torch.equal(
        torch.ops.epmq_native.grid_losses(*grids, size, 2.4), torch.ops.epmq_native.grid_losses(*grids, -1, 2.4)
    )


@compiled
def test_nan_with_all_bits_set_stays_nan() -> None:
    """Cut to 16 bits, it must not be rounded up into a negative zero."""
    loud = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    a, out = seeded(3, 40), torch.zeros(3, 5)
    a[1, 7] = loud
    torch.ops.epmq_native.subtract_product(out, a, seeded(40, 5))
    assert out[1].isnan().all() and out[0].isfinite().all() and out[2].isfinite().all()


@compiled
def test_a_product_takes_no_memory_for_each_thread_and_row() -> None:
    """Beside the result and the prepared rows of x."""
    code = """
import resource, torch, epmq.extension
torch.set_num_threads(2)
rows, columns, outputs = 150_000, 64, 192
packed, scales = torch.zeros(outputs, columns // 8, dtype=torch.int32), torch.ones(outputs, 1)
x = torch.zeros(rows, columns)
product = torch.ops.epmq_native.dequant_matmul
product(x[:1000], packed, scales, None, None, 4, -1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y = product(x, packed, scales, None, None, 4, -1)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(grown - y.nbytes - rows * 128 * 4)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 16 * 2**20


@compiled
@pytest.mark.parametrize("h_tiles, cross_tiles", [(1, 0), (1, 3), (2, 1), (7, 5), (40, 3)])
def test_tiles_of_the_cuda_launch_cover_the_triangle_and_the_cross_covariance_once(
    h_tiles: int, cross_tiles: int
) -> None:
    assert extension.module is not None
    wanted = [(row, column, False) for row in range(h_tiles) for column in range(row + 1)]
    wanted += [(row, column, True) for row in range(cross_tiles) for column in range(h_tiles)]
    assert extension.module.statistics_tiles(h_tiles, cross_tiles) == wanted


def test_the_packed_layout_is_a_little_endian_stream() -> None:
    codes = torch.arange(40, dtype=torch.uint8).remainder(16).unsqueeze(0)
    packed = pack(codes, 4)
    assert packed.shape == (1, packed_words(40, 4))
    assert packed.view(torch.uint8)[0, :4].tolist() == [0x10, 0x32, 0x54, 0x76]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)


def test_the_package_works_without_the_extension() -> None:
    code = "from epmq import extension, ops; print(extension.module, ops.implementations('gptq_sweep')[-1].backend)"
    result = run_python(code, EPMQ_EXTENSION="0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "None reference"


@compiled
def test_an_extension_of_another_torch_is_refused() -> None:
    use = "from epmq import ops; ops.subtract_gram(torch.eye(2), torch.ones(2, 1))"
    result = run_python(f"import torch; torch.__version__ = '2.99.1'; {use}")
    assert result.returncode != 0
    assert "and this is torch 2.99.1; rebuild it, or set EPMQ_EXTENSION=0" in result.stderr
    extension.check_torch("2.13.0", "2.13.1+cpu")


@pytest.mark.parametrize(
    "capability, runs", [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 0), False)]
)
def test_cuda_code_runs_on_its_own_generation_alone(capability: tuple[int, int], runs: bool) -> None:
    assert extension.has_code("sm_80 sm_90", capability) == runs
    assert not extension.has_code("", capability) and not extension.has_code("sm_86", (8, 0))


@compiled
def test_an_unknown_instruction_set_is_refused() -> None:
    use = "import torch; from epmq import ops; ops.subtract_gram(torch.eye(2), torch.ones(2, 1))"
    result = run_python(use, EPMQ_CPU="sse9")
    assert result.returncode != 0
    assert "EPMQ_CPU=sse9 is not an instruction set of this build" in result.stderr


@compiled
@pytest.mark.parametrize("level", extension.module.cpu_levels() if extension.module else [])
def test_each_instruction_set_of_this_cpu_can_be_chosen(level: str) -> None:
    result = run_python("from epmq import extension; print(extension.build_report()['cpu_level'])", EPMQ_CPU=level)
    assert result.stdout.strip() == level, result.stderr
