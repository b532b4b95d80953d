"""Which rows of a batch take part in a sum."""

from __future__ import annotations

import torch
from torch import Tensor

# A task's rows at a group of linears that the report compares outputs on.
SAMPLE_ROWS = 256


def kept_rows(
    x: Tensor, target: Tensor | None, row_weights: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows whose weight is not 0, and their weights fp32 ``[M]``, None when all of them are 1.

    x: ``[M, K]``, target: ``[M, P]`` or None, row_weights: ``[M]`` or None. What is left out need not be finite. Tells
    a GPU's kernels whether 16-bit rows may go through the tensor cores as they are, at the price of waiting for it.
    """
    if row_weights is None:
        return x, target, None
    index = torch.nonzero(row_weights).flatten()
    weights = row_weights[index].float()
    if len(index) < len(row_weights):
        x, target = x[index], None if target is None else target[index]
    return x, target, None if bool((weights == 1).all()) else weights
