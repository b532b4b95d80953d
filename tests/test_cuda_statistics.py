"""The CUDA kernels of second moments, compiled by nvcc and run as PTX: results, bounds of memory, races."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest
import torch
from close import assert_close, product_bound
from ptx import cuda
from ptx.machine import Program, Watch
from torch import Tensor

SOURCE = Path(__file__).parents[1] / "csrc" / "cuda" / "statistics.cu"
TYPES = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
TILE, THREADS = 128, 256

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not here to compile the CUDA sources")


@pytest.fixture(scope="module", params=["80", "90"])
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Program]:
    return cuda.programs(SOURCE, request.param, tmp_path_factory.mktemp("ptx"))


def operand(rows: Tensor | None) -> bytes:
    """``Operand`` of statistics.cu."""
    if rows is None:
        return bytes(32)
    size = rows.element_size()
    wide = rows.stride(1) == 1 and rows.stride(0) * size % 16 == 0 and rows.data_ptr() % 16 == 0
    return struct.pack("<QqqiB3x", rows.data_ptr(), rows.stride(0), rows.stride(1), rows.shape[1], wide)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def accumulate(program: Program, x: Tensor, target: Tensor | None, weights: Tensor | None) -> list[Tensor]:
    """H, C and the sums of one launch, added to ones so that what is not written is seen."""
    columns, targets = x.shape[1], 0 if target is None else target.shape[1]
    out = [torch.ones(shape) for shape in ((columns, columns), (targets, columns), (columns,), (targets,))]
    tiles, crossed = -(-columns // TILE), -(-targets // TILE)
    arguments = operand(x) + operand(target)
    arguments += struct.pack("<QqQQQQi4x", address(weights), len(x), *map(address, out), tiles)
    used = [t.untyped_storage() for t in (x, target, weights, *out) if t is not None]
    regions = [(storage.data_ptr(), storage.nbytes()) for storage in used]
    program.run((tiles * (tiles + 1) // 2 + crossed * tiles,), THREADS, [arguments], regions, 0, Watch(hazards=True))
    return [tensor - 1 for tensor in out]


@pytest.mark.parametrize("dtype", list(TYPES), ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "columns", "targets"), [(75, 272, 140), (32, 128, 0), (1, 3, 1), (17, 129, 8)])
def test_moments(
    programs: dict[str, Program], rows: int, columns: int, targets: int, weighted: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, columns + 5, generator=generator).to(dtype)[:, :columns]
    target = torch.randn(rows, targets, generator=generator).to(dtype) if targets else None
    weights = torch.rand(rows, generator=generator) if weighted else None
    factor = torch.ones(rows, 1).double()
    if weights is not None:
        weights[::7] = 0
        x[::7] = torch.nan  # rows of weight 0 may hold anything
        factor = weights.double()[:, None]
    kind = "fp32_kernel" if weighted or dtype == torch.float32 else "tensor_core_kernel"
    hessian, cross, sum_x, sum_target = accumulate(programs[f"{kind}<{TYPES[dtype]}>"], x, target, weights)
    wide = torch.where(factor == 0, torch.zeros(()).double(), x.double())
    wide_target = torch.empty(rows, 0).double() if target is None else target.double()
    for found, left, right in (
        (hessian.tril(), wide, wide),
        (cross, wide_target, wide),
        (sum_x[:, None], wide, torch.ones(rows, 1).double()),
        (sum_target[:, None], wide_target, torch.ones(rows, 1).double()),
    ):
        exact, size = (left * factor).T @ right, (left * factor).abs().T @ right.abs()
        if found is hessian or found.shape == hessian.shape:
            exact, size = exact.tril(), size.tril()
        assert_close(found, exact, product_bound(size + 2, rows + 3), "moment")
