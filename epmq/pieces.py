"""Products of fp32 matrices on the tensor cores of a GPU, each factor cut into two bf16 pieces.

The form ``pieces`` of :func:`epmq.reference.product`. A factor is its nearest bf16 and the nearest one of what is left,
16 significant bits in all; three of the four products of pieces count, the fourth lies below them. On sm_90 that takes
about a quarter of fp32's time.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 2**27  # multiply-adds from which three launches and the cutting cost less than they save


def cut(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(bf16 nearest to fp32 ``matrix``, bf16 nearest to the rest)."""
    high = matrix.bfloat16()
    return high, (matrix - high.float()).bfloat16()


def product(a: Tensor, b: Tensor) -> Tensor:
    """See :func:`epmq.reference.product`; sums of each two pieces are fp32, as are the sums over pieces."""
    out = a.new_zeros(a.shape[0], b.shape[1])
    if out.numel() == 0 or a.shape[1] == 0:
        return out
    (a_high, a_low), (b_high, b_low) = cut(a), cut(b)
    # The smaller ones first. A checkpoint in bf16 has no lower piece.
    if bool(a_low.any()):
        out = _add(out, a_low, b_high)
    return _add(_add(out, a_high, b_low), a_high, b_high)


def _add(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if out.is_cuda:
        return torch.addmm(out, a, b, out_dtype=torch.float32)
    return torch.addmm(out, a.float(), b.float())


def accepts(a: Tensor, b: Tensor) -> bool:
    """Whether this form runs for a product."""
    if not (a.is_cuda and a.dtype == b.dtype == torch.float32):
        return False
    return a.shape[0] * a.shape[1] * b.shape[1] >= LEAST and torch.cuda.get_device_capability(a.device) >= (8, 0)
