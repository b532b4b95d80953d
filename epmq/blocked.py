"""Cholesky by blocks of columns: small factors and triangular solves, all the rest in matrix products.

The form ``blocked`` of :func:`epmq.reference.cholesky`. On a CPU it takes 0.6 to 0.7 of LAPACK's time from a thousand
columns on, and is preferred there. On a GPU it runs where ``EPMQ_BACKEND=blocked`` asks for it: cuSOLVER is faster on
an H200 at 4096 and 14336 columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# The share of the arithmetic left to the small factors is 1 / (K / block)²; wider products gain nothing any more.
CPU_BLOCK, GPU_BLOCK = 256, 1024
# Columns from which this form is the faster one on a CPU.
CPU_LEAST = 1024


def cholesky(
    matrix: Tensor, subtract_gram: Callable[[Tensor, Tensor], None], block: int | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`epmq.reference.cholesky`. Right-looking: each finished panel is taken out of the columns to its right
    by ``subtract_gram``, a form of :func:`epmq.reference.subtract_gram`."""
    block = block or (CPU_BLOCK if matrix.device.type == "cpu" else GPU_BLOCK)
    lower = matrix.tril()
    size = len(lower)
    info = torch.zeros((), dtype=torch.int32, device=matrix.device)
    for start in range(0, size, block):
        stop = min(start + block, size)
        diagonal, failed = torch.linalg.cholesky_ex(lower[start:stop, start:stop])
        lower[start:stop, start:stop] = diagonal
        info = torch.where((info == 0) & (failed > 0), failed + start, info)
        if stop == size:
            break
        below = torch.linalg.solve_triangular(diagonal.T, lower[stop:, start:stop], upper=True, left=False)
        lower[stop:, start:stop] = below
        subtract_gram(lower[stop:, stop:], below)
    return lower.tril_(), info


def preferred(matrix: Tensor) -> bool:
    """Whether this is the faster form for a matrix."""
    return matrix.device.type == "cpu" and len(matrix) >= CPU_LEAST
