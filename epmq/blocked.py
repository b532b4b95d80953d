"""Cholesky by blocks of columns: small factors and triangular solves, all the rest in matrix products.

The form ``blocked`` of :func:`epmq.reference.cholesky`, for Hessians of ten thousand columns and more on a GPU, where
nearly all the arithmetic then runs at the rate of a matrix product. It is asked for with ``EPMQ_BACKEND=blocked``; it
is not preferred anywhere until it has been measured beside cuSOLVER.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The share of the arithmetic left to the small factors is 1 / (K / 1024)²; wider products gain nothing any more.
BLOCK = 1024


def cholesky(matrix: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """See :func:`epmq.reference.cholesky`. Right-looking: each finished panel is taken out of the columns to its right,
    block column by block column, so that nothing above the diagonal blocks is computed."""
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
        for column in range(stop, size, block):
            end = min(column + block, size)
            rows = below[column - stop :]
            lower[column:, column:end].addmm_(rows, rows[: end - column].T, alpha=-1.0)
    return lower.tril_(), info
