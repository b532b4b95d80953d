"""Every form of dequant_matmul against the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from close import assert_close, product_bound
from forms import DTYPES, compiled, forms, matmul_problem, run_python, seeded
from torch import Tensor

from epmq import reference
from epmq.quantized import dequantize, pack


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
def test_a_product_takes_no_memory_for_each_thread_and_row() -> None:
    """Beside the result and the prepared rows of x."""
    code = """
import torch, epmq.extension
from epmq.memory import peak_memory_bytes
torch.set_num_threads(2)
rows, columns, outputs = 150_000, 64, 192
packed, scales = torch.zeros(outputs, columns // 8, dtype=torch.int32), torch.ones(outputs, 1)
x = torch.zeros(rows, columns)
product = torch.ops.epmq_native.dequant_matmul
product(x[:1000], packed, scales, None, None, 4, -1)
before = peak_memory_bytes()
y = product(x, packed, scales, None, None, 4, -1)
grown = peak_memory_bytes() - before
print(grown - y.nbytes - rows * 128 * 4)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 16 * 2**20
