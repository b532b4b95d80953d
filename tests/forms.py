"""What the tests of the operations share: the forms that run here, problems, and checks against float64."""

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
from epmq.quantized import column_groups, group_count

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


def matmul_problem(rows: int, columns: int, group: int, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Any]:
    generator = torch.Generator().manual_seed(rows + columns)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    groups = group_count(columns, group)
    scales = 0.01 + 0.1 * torch.rand(rows, groups, generator=generator)
    zeros = torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8, generator=generator)
    return codes, scales, None if symmetric else zeros


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)


# Binary places behind the last one of the largest addend that tensor cores keep, and the rows they take at a time.
CUT_OFF = {80: (1, 8), 90: (2, 16)}


def cut_off_sums(left: Tensor, right: Tensor, places: int, step: int, pairs: bool = True) -> Tensor:
    """leftᵀ right of float64 rows as tensor cores sum it, or its diagonal: addends cut off ``places`` binary places
    behind the last one of the largest, then their sum."""
    sums = torch.zeros((left.shape[1], right.shape[1]) if pairs else left.shape[1], dtype=torch.float64)
    for first in range(0, len(left), step):
        rows = slice(first, first + step)
        products = left[rows, :, None] * right[rows, None, :] if pairs else left[rows] * right[rows]
        addends = torch.cat([sums[None], products])
        unit = torch.exp2(addends.abs().amax(0).clamp_min(2.0**-60).log2().floor() - 23)
        cut = (torch.trunc(addends / unit * 2**places) * unit / 2**places).sum(0)
        unit = torch.exp2(cut.abs().clamp_min(2.0**-60).log2().floor() - 23)
        sums = torch.trunc(cut / unit) * unit
    return sums
