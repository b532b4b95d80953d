"""Products of fp32 matrices on the tensor cores of a GPU, each factor cut into bf16 pieces of 8 significant bits.

The form ``pieces`` of :func:`epmq.reference.product`. The weight's side is cut into two, 16 bits: what is left out
moves a target by as little, because the solve undoes the product. A Hessian is cut into three, all of its 24 bits: the
solve takes an error of it for a pull, the more so where inputs are weak. Of the six products of pieces five count.
Their sums are fp32 as tensor cores keep it, cut off and not rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 2**27  # multiply-adds from which the launches and the cutting cost less than they save


def cut(matrix: Tensor, pieces: int) -> list[Tensor]:
    """bf16 pieces of an fp32 matrix: the nearest to it, the nearest to what is left, and so on."""
    found, rest = [], matrix
    for _ in range(pieces):
        found.append(rest.bfloat16())
        rest = rest - found[-1].float()
    return found


def product(a: Tensor, b: Tensor) -> Tensor:
    """See :func:`epmq.reference.product`; sums over columns and pieces are fp32."""
    out = a.new_zeros(a.shape[0], b.shape[1])
    if out.numel() == 0 or a.shape[1] == 0:
        return out
    high, low = cut(a, 2)
    # One above the other, the smallest first: a product with all of them is one product.
    pieces = torch.cat(cut(b, 3)[::-1])
    if bool(low.any()):  # none of a checkpoint in bf16
        out = _add(out, low.repeat(1, 2), pieces[a.shape[1] :])
    return _add(out, high.repeat(1, 3), pieces)


def _add(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if out.is_cuda:
        return torch.addmm(out, a, b, out_dtype=torch.float32)
    return torch.addmm(out, a.float(), b.float())


def accepts(a: Tensor, b: Tensor) -> bool:
    """Whether this form runs for a product."""
    if torch.version.cuda is None or not (a.is_cuda and a.dtype == b.dtype == torch.float32):
        return False
    return a.shape[0] * a.shape[1] * b.shape[1] >= LEAST and torch.cuda.get_device_capability(a.device) >= (8, 0)
