"""Grids: scales and zero points of a weight's groups, clip search, and the refit of scales after the sweep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from epmq import ops
from epmq.errors import NumericalError
from epmq.quantized import column_groups, group_count

CLIP_STEPS = tuple(1.0 - 0.02 * step for step in range(26))
CLIP_POWER = 2.4
TRIED_AT_ONCE = 2**22  # scales of all shrunken ranges, to bound their memory


@dataclass(frozen=True)
class Grid:
    """scales: ``[N, G]`` positive, in the working dtype but exactly representable in ``stored``. zeros: ``[N, G]``
    whole numbers in ``[0, 2^bits - 1]``."""

    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int
    sym: bool
    stored: torch.dtype


def fit_grid(
    weight: Tensor,
    bits: int,
    group_size: int,
    sym: bool,
    stored: torch.dtype,
    clip: Literal["none", "mse", "hessian"] = "none",
    column_weight: Tensor | None = None,
) -> Grid:
    """Grid of a weight ``[N, K]``: min and max of each group, shrunk by the clip search where that helps.

    Asymmetric: s = (max - min) / (2^b - 1) over a range that includes 0, z = round(-min / s). Symmetric: z = 2^(b-1),
    s = absmax / ((2^b - 1) / 2) (compressed-tensors' convention). Scales are rounded to ``stored`` first. clip
    ``mse`` minimises Σ |q - w|^2.4, ``hessian`` Σ h_j (q - w)² with h = column_weight ``[K]``.
    """
    grouped = _grouped(weight, group_size)
    low, high = grouped.amin(-1).clamp_max(0.0), grouped.amax(-1).clamp_min(0.0)
    scales, zeros = _range_to_grid(low, high, bits, sym, stored)
    _check_storable(low, high, bits, sym, stored)
    if clip != "none":
        power = CLIP_POWER if clip == "mse" else 2.0
        importance = column_weight if clip == "hessian" else None
        count = max(1, TRIED_AT_ONCE // (len(CLIP_STEPS) * scales.shape[1]))
        for start in range(0, len(weight), count):
            part = slice(start, start + count)
            tried = [_range_to_grid(low[part] * keep, high[part] * keep, bits, sym, stored) for keep in CLIP_STEPS]
            some_scales, some_zeros = (torch.stack(each) for each in zip(*tried, strict=True))
            losses = ops.grid_losses(weight[part], some_scales, some_zeros, bits, group_size, power, importance)
            # The first of equals: the widest range.
            best = losses.argmin(0, keepdim=True)
            scales[part], zeros[part] = some_scales.gather(0, best)[0], some_zeros.gather(0, best)[0]
    return Grid(scales, zeros, bits, group_size, sym, stored)


def round_to_nearest(weight: Tensor, grid: Grid) -> Tensor:
    """uint8 codes ``[N, K]`` nearest to the weight."""
    groups = column_groups(weight.shape[1], grid.group_size, weight.device).long()
    inverse = (1.0 / grid.scales)[:, groups]
    codes = torch.round(weight * inverse) + grid.zeros[:, groups]
    return codes.clamp_(0, 2**grid.bits - 1).to(torch.uint8)


def refit_scales(codes: Tensor, grid: Grid, weight: Tensor, hessian: Tensor) -> Grid:
    """Scales ``[N, G]`` that minimise ``tr[(Q - W) H (Q - W)ᵀ]`` for fixed codes, one G × G system per row.

    codes: ``[N, K]``, hessian: ``[K, K]``, all in checkpoint column order. A group whose solution is not positive or
    does not fit the stored dtype, and a row that the rounding to that dtype makes worse, keep their scales.
    """
    rows, columns = weight.shape
    count = grid.scales.shape[1]
    groups = column_groups(columns, grid.group_size, weight.device).long()
    units = codes.to(weight.dtype) - grid.zeros[:, groups]
    member = torch.nn.functional.one_hot(groups, count).to(weight.dtype)
    normal = torch.empty(rows, count, count, dtype=weight.dtype, device=weight.device)
    size = columns if grid.group_size == -1 else grid.group_size
    for g in range(count):
        columns_of = slice(g * size, (g + 1) * size)
        normal[:, g] = (units[:, columns_of] @ hessian[columns_of] * units) @ member
    right = ((weight @ hessian) * units) @ member
    ridge = 1e-6 * normal.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    ridge.masked_fill_(ridge == 0.0, 1.0)  # a row of zeros: its scales are as good as any others
    damped = normal + torch.diag_embed(ridge.expand(rows, count))
    solved = torch.linalg.solve(damped, right + ridge * grid.scales)
    solved = torch.where((solved > 0.0) & (solved <= torch.finfo(grid.stored).max), solved, grid.scales)
    rounded = _storable(solved, grid.stored)

    def loss(scales: Tensor) -> Tensor:
        return torch.einsum("ng,ngh,nh->n", scales, normal, scales) - 2.0 * (scales * right).sum(1)

    better = (loss(rounded) < loss(grid.scales)).unsqueeze(1)
    return Grid(
        torch.where(better, rounded, grid.scales), grid.zeros, grid.bits, grid.group_size, grid.sym, grid.stored
    )


def _grouped(weight: Tensor, group_size: int) -> Tensor:
    """``[N, G, size]``; a short last group is filled with its own last column, which changes no minimum or maximum."""
    rows, columns = weight.shape
    count = group_count(columns, group_size)
    size = columns if group_size == -1 else min(group_size, columns)
    missing = count * size - columns
    if missing:
        weight = torch.cat([weight, weight[:, -1:].expand(rows, missing)], dim=1)
    return weight.view(rows, count, size)


def _range_to_grid(low: Tensor, high: Tensor, bits: int, sym: bool, stored: torch.dtype) -> tuple[Tensor, Tensor]:
    scales = _storable(_exact_scales(low, high, bits, sym), stored)
    if sym:
        return scales, torch.full_like(scales, 2 ** (bits - 1))
    return scales, torch.round(-low / scales).clamp_(0, 2**bits - 1)


def _exact_scales(low: Tensor, high: Tensor, bits: int, sym: bool) -> Tensor:
    top = 2**bits - 1
    scales: Tensor = torch.maximum(-low, high) / (top / 2) if sym else (high - low) / top
    return scales


def _check_storable(low: Tensor, high: Tensor, bits: int, sym: bool, stored: torch.dtype) -> None:
    """Raise NumericalError for scales that the stored dtype cannot hold. Ranges only shrink afterwards."""
    largest = float(_exact_scales(low, high, bits, sym).amax()) if low.numel() else 0.0
    if largest > torch.finfo(stored).max:
        raise NumericalError(
            f'a scale of {largest:.3g} does not fit {str(stored).removeprefix("torch.")}; set scale_dtype: "float32".'
        )


def _storable(scales: Tensor, stored: torch.dtype) -> Tensor:
    """Round to the stored dtype; a group of zeros gets scale 1, an underflow the smallest normal number."""
    positive = scales.clamp_min(torch.finfo(stored).tiny).to(stored).to(scales.dtype)
    return torch.where(scales > 0.0, positive, torch.ones_like(scales))
