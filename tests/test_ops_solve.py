"""Every form of the products and factors of the solve against the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from close import assert_close, product_bound
from forms import compiled, forms, placed, seeded

from epmq import extension, ops, reference


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


ON_GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
)


@pytest.mark.parametrize("shape", [(70, 256, 100), (33, 77, 45), (1, 1, 1), (5, 300, 0), (0, 8, 8)], ids=str)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "large"])
@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("form", ["reference", "pieces"])
def test_product(form: str, device: str, kind: str, shape: tuple[int, int, int]) -> None:
    function = next(found.function for found in ops.implementations("product") if found.backend == form)
    rows, depth, columns = shape
    a, b = seeded(rows, depth), seeded(depth, columns)
    if kind == "bf16":
        a = a.bfloat16().float()
    elif kind == "large":
        a, b = a * 2.0**60, b * 2.0**-70
    magnitude = a.double().abs() @ b.double().abs()
    # a cut to two bf16 numbers, b to three, and the product of the lowest ones.
    cut = 2.0**-18 + 2.0**-26 if form == "pieces" else 0.0
    found = function(a.to(device), b.to(device)).cpu()
    assert_close(found, a.double() @ b.double(), product_bound(magnitude, depth + 5) + cut * magnitude, "product")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_wide_products_on_a_gpu_are_made_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = seeded(512, 512).cuda(), seeded(512, 512).cuda()
    assert ops.choose("product", a, b).backend == "pieces"
    assert (
        ops.choose("product", a[:8], b).backend == ops.choose("product", a.double(), b.double()).backend == "reference"
    )
    monkeypatch.setenv("EPMQ_BACKEND", "reference")
    assert ops.choose("product", a, b).backend == "reference"


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


@compiled
def test_nan_with_all_bits_set_stays_nan() -> None:
    """Cut to 16 bits, it must not be rounded up into a negative zero."""
    loud = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    a, out = seeded(3, 40), torch.zeros(3, 5)
    a[1, 7] = loud
    torch.ops.epmq_native.subtract_product(out, a, seeded(40, 5))
    assert out[1].isnan().all() and out[0].isfinite().all() and out[2].isfinite().all()
