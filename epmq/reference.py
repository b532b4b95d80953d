"""Every numeric operation in plain PyTorch: the definition that faster implementations are held to.

Shapes by letter: N output features, K input features, M rows (tokens), G groups, P target features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epmq.quantized import column_groups, dequantize, unpack

SWEEP_BLOCK = 128


def accumulate(
    x: Tensor,
    hessian: Tensor,
    sum_x: Tensor,
    target: Tensor | None = None,
    cross: Tensor | None = None,
    sum_target: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> None:
    """Add one batch of rows to running second and first moments, in place, accumulated in fp32.

    x: ``[M, K]`` fp32, fp16 or bf16. hessian: fp32 ``[K, K]``, += xᵀ diag(r) x; only its lower triangle (diagonal
    included) is defined, see :func:`symmetrize`. sum_x: fp32 ``[K]``, += xᵀ r. target: ``[M, P]``. cross: fp32
    ``[P, K]``, += targetᵀ diag(r) x. sum_target: fp32 ``[P]``, += targetᵀ r. row_weights r: fp32 ``[M]``, ones
    when None; rows of weight 0 contribute exactly nothing, whatever they hold. Sums may be fp64, all of them: fp32
    sums over parts of the batch, or finer ones, are then added to them.
    """
    work = torch.float64 if hessian.dtype == torch.float64 else torch.float32
    if row_weights is not None:
        keep = row_weights != 0
        x, row_weights = x[keep], row_weights[keep].to(work).unsqueeze(1)
        target = None if target is None else target[keep]
    rows = x.to(work)
    weighted = rows if row_weights is None else rows * row_weights
    hessian.addmm_(rows.T, weighted)
    sum_x.add_(weighted.sum(0))
    if target is not None and cross is not None and sum_target is not None:
        targets = target.to(work)
        cross.addmm_(targets.T, weighted)
        sum_target.add_((targets if row_weights is None else targets * row_weights).sum(0))


def symmetrize(hessian: Tensor) -> Tensor:
    """Full symmetric matrix from the lower triangle of ``hessian``."""
    lower = hessian.tril()
    return lower + lower.tril(-1).T


def quantize_column(column: Tensor, inverse_scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Codes (as floats) of a column ``[N]``: ``w / s`` rounded half to even, plus the zero, clamped to ``[0, top]``."""
    return torch.clamp(torch.round(column * inverse_scale) + zero, 0, top)


def gptq_sweep(
    weight: Tensor, unit_upper: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor, bits: int
) -> Tensor:
    """Blocked GPTQ without an inverse: uint8 codes ``[N, K]`` of the weight that ``tr[(Q-W) H (Q-W)ᵀ]`` prefers.

    weight: ``[N, K]`` fp32 (fp64 for checks), columns in sweep order. unit_upper: ``[K, K]``, M = R diag(R)⁻¹ of
    H = R Rᵀ with R upper triangular. scales: ``[N, G]`` positive; zeros: ``[N, G]`` whole numbers, same dtype.
    group_of: int32 ``[K]``, the group of each swept column.

    Column j quantizes ``w_j + Σ_{i<j} (w_i - q_i) M_ij`` (the LDL form of GPTQ; Chee et al. 2023, QuIP, thm. 6).
    """
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    deviation = torch.empty_like(weight)
    inverse_scales = 1.0 / scales
    groups = group_of.tolist()
    top = 2**bits - 1
    for start in range(0, columns, SWEEP_BLOCK):
        stop = min(start + SWEEP_BLOCK, columns)
        # Transposed, so that the recursion reads and writes contiguous rows.
        adjusted = (weight[:, start:stop] + deviation[:, :start] @ unit_upper[:start, start:stop]).T.contiguous()
        factor = unit_upper[start:stop, start:stop]
        for j in range(stop - start):
            g = groups[start + j]
            code = quantize_column(adjusted[j], inverse_scales[:, g], zeros[:, g], top)
            error = weight[:, start + j] - (code - zeros[:, g]) * scales[:, g]
            codes[:, start + j] = code.to(torch.uint8)
            deviation[:, start + j] = error
            adjusted[j + 1 :].addr_(factor[j, j + 1 :], error)
    return codes


def cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Lower triangular L with L Lᵀ = matrix ``[K, K]``, whose lower triangle is read, and an int32 scalar that is
    0 where the matrix is positive definite; L means nothing otherwise. Does not synchronise with the device."""
    lower, info = torch.linalg.cholesky_ex(matrix)
    return lower, info


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a · b``: ``[N, k]``, ``[k, n]``. Faster forms may take 16 significant bits of a, and sum as tensor cores do:
    this serves the target, and a is weights or their difference. On a CPU a row's bits do not depend on the others."""
    return a @ b


def subtract_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out -= a · b`` in place: ``[N, n]``, ``[N, k]``, ``[k, n]``. Faster forms may take 16 significant bits of each
    factor: this serves the target, whose output changes by no more than that, and nothing that is factored."""
    out.addmm_(a, b, alpha=-1.0)


def subtract_gram(out: Tensor, a: Tensor) -> None:
    """The lower triangle of ``out -= a · aᵀ`` in place: ``[N, N]``, ``[N, k]``. What becomes of the upper one is not
    defined: only its blocks on the diagonal are computed."""
    block = max(a.shape[1], 128)  # narrower products waste more than they save
    for start in range(0, len(out), block):
        rows = a[start:]
        out[start:, start : start + block].addmm_(rows, rows[:block].T, alpha=-1.0)


def grid_losses(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    group_size: int,
    power: float,
    importance: Tensor | None = None,
) -> Tensor:
    """``Σ h_j |q_j - w_j|^power`` of each group when the weight is rounded to each of S grids: ``[S, N, G]``.

    weight: ``[N, K]``. scales: ``[S, N, G]`` positive; zeros: ``[S, N, G]`` whole numbers, same dtype. group_size: -1
    is the whole row; the last group may be short. importance h: ``[K]``, ones when None.
    """
    groups = column_groups(weight.shape[1], group_size, weight.device).long()
    losses = torch.empty_like(scales)
    for number, (scale, zero) in enumerate(zip(scales, zeros, strict=True)):
        s, z = scale[:, groups], zero[:, groups]
        codes = torch.clamp(torch.round(weight * (1.0 / scale)[:, groups]) + z, 0, 2**bits - 1)
        cost = ((codes - z) * s - weight).abs_().pow_(power)
        cost = cost if importance is None else cost * importance
        losses[number] = torch.zeros_like(scale).index_add_(1, groups, cost)
    return losses


def dequant_matmul(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """``y = x · dequant(W)ᵀ + bias`` in fp32, returned in x's dtype.

    x: ``[M, K]``. packed: int32 ``[N, ceil(K*bits/32)]`` (:mod:`epmq.quantized`). scales: ``[N, G]``. zeros: uint8
    ``[N, G]`` or None. bias: ``[N]`` or None. Returns ``[M, N]``.
    """
    codes = unpack(packed, bits, x.shape[1])
    y = x.float() @ dequantize(codes, scales, zeros, bits, group_size).T
    return (y if bias is None else y + bias.float()).to(x.dtype)
