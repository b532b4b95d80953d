"""The target weight of eq. (2) and the triangular factor that the sweep shares with it: one Cholesky, no inverse."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from epmq import extension, ops
from epmq.config import DAMP_LIMIT
from epmq.errors import NumericalError
from epmq.statistics import Folded

log = logging.getLogger("epmq")

FIRST_ESCALATION = 1e-3
SOLVE_BLOCK = 256
ANCHOR_GRID: tuple[float, ...] = tuple(10.0 ** (exponent / 4) for exponent in range(-12, 5))


@dataclass(frozen=True)
class Factor:
    """H' = M diag(p) Mᵀ with M unit upper triangular, columns in sweep order.

    unit_upper: M ``[K, K]``. pivots: p ``[K]``, positive. damp: relative damping that was needed in the end.
    """

    unit_upper: Tensor
    pivots: Tensor
    damp: float


def mean_diagonal(hessian: Tensor) -> float:
    """tr(H) / K."""
    mean: float = hessian.diagonal().mean().item()
    return mean


def factorize(hessian: Tensor, added: float, damp: float, where: str) -> Factor:
    """Factor ``hessian + (added + damp) * mean_diagonal * I``; damping escalates tenfold up to 1.0 when it must.

    hessian: ``[K, K]`` symmetric, columns in sweep order, destroyed. added: the anchor's lambda, relative. Each
    escalation is logged. A Hessian of zeros counts as a multiple of the identity. Raises NumericalError past 1.0.
    """
    scale = mean_diagonal(hessian)
    if not scale > 0.0:
        # No input at all: any positive multiple of the identity leaves the anchor, rounded to nearest.
        hessian.diagonal().fill_(1.0)
        scale = 1.0
    hessian.diagonal().add_(added * scale)
    # A column no input ever excited has a zero row: any positive diagonal keeps the anchor's weight there.
    hessian.diagonal().masked_fill_(hessian.diagonal() == 0.0, scale)
    diagonal = hessian.diagonal().clone()
    while True:
        hessian.diagonal().copy_(diagonal + damp * scale)
        # J H J = L Lᵀ, M diag(p)^(1/2) = J L J
        lower, info = ops.cholesky(hessian.flip(0, 1))
        if bool((info == 0) & torch.isfinite(lower.diagonal()).all()):
            break
        stronger = max(FIRST_ESCALATION, 10.0 * damp)
        if stronger > DAMP_LIMIT * 1.0001:
            raise NumericalError(
                f"{where}: the Hessian is not positive definite even with damping {damp:g}; check the calibration"
                " inputs of this layer for extreme values."
            )
        log.warning("%s: Hessian not positive definite with damping %g, raised to %g.", where, damp, stronger)
        damp = stronger
    unit_upper = lower.flip(0, 1)
    diagonal = unit_upper.diagonal().clone()
    return Factor(unit_upper.div_(diagonal), diagonal.square(), damp)


def solve_right(pull: Tensor, factor: Factor) -> Tensor:
    """``pull · H'⁻¹`` for ``[N, K]``, in place of ``pull``: the step from the anchor to the target W* of eq. (2).

    By blocks of columns, whose triangles are inverted: all but a hundredth of the work is then products, which run at
    three times the rate of triangular solves.
    """
    unit, columns = factor.unit_upper, pull.shape[1]
    parts = [slice(start, min(start + SOLVE_BLOCK, columns)) for start in range(0, columns, SOLVE_BLOCK)]
    eye = torch.eye(min(SOLVE_BLOCK, columns), dtype=unit.dtype, device=unit.device)
    inverses = [
        torch.linalg.solve_triangular(
            unit[part, part], eye[: part.stop - part.start, : part.stop - part.start], upper=True, unitriangular=True
        )
        for part in parts
    ]
    for part, inverse in zip(reversed(parts), reversed(inverses), strict=True):
        pull[:, part] = pull[:, part] @ inverse.T
        ops.subtract_product(pull[:, : part.start], pull[:, part], unit[: part.start, part].T)
        pull[:, part] /= factor.pivots[part]
    for part, inverse in zip(parts, inverses, strict=True):
        pull[:, part] = pull[:, part] @ inverse
        ops.subtract_product(pull[:, part.stop :], pull[:, part], unit[part, part.stop :])
    return pull


def is_coarse(pull: Tensor, hessian: Tensor) -> bool:
    """Whether such tensors were made, or :func:`solve_right` solves them, by products of 16 significant bits."""
    if ops.choose("product", pull, hessian).backend == "pieces":
        return True
    block, rest = slice(0, SOLVE_BLOCK), slice(SOLVE_BLOCK, None)
    form = ops.choose("subtract_product", pull[:0, rest], pull[:0, block], hessian[block, rest])
    return form.backend != "reference" and extension.rounds_products()


def choose_anchor(fit: Folded, held: Folded) -> float:
    """Relative lambda with the least error on held-out rows, from one eigendecomposition of the fitted Hessian.

    Both problems are relative to the same anchor (centred or not). With H = U diag(e) Uᵀ and V = E U the step is
    V diag(1/(e+λ)) Uᵀ; its held-out error is a quadratic form in d = 1/(e+λ), so a grid costs K² per value.
    """
    scale = mean_diagonal(fit.hessian)
    if not scale > 0.0:
        return ANCHOR_GRID[-1]
    values, vectors = torch.linalg.eigh(fit.hessian)
    projected = fit.pull @ vectors
    quadratic = (projected.T @ projected) * (vectors.T @ held.hessian @ vectors)
    linear = (projected * (held.pull @ vectors)).sum(0)
    best: float = ANCHOR_GRID[-1]
    best_error = float("inf")
    inverses = [1.0 / (values.clamp_min(0.0) + relative * scale) for relative in ANCHOR_GRID]
    # One transfer for the whole grid.
    errors = torch.stack([d @ quadratic @ d - 2.0 * (linear @ d) for d in inverses]).tolist()
    for relative, error in zip(ANCHOR_GRID, errors, strict=True):
        if error < best_error:
            best, best_error = relative, error
    return best
