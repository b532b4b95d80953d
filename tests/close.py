"""How far a sum of K rounded products may be from the exact one: element by element, never one number for all."""

from __future__ import annotations

import torch
from torch import Tensor

# Unit roundoffs. fp32 accumulates; the rest is what a result is stored in.
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


def product_bound(magnitude: Tensor, terms: int, factor: float = 2.0) -> Tensor:
    """Bound on the error of sums of ``terms`` fp32 products: ``factor * terms * (eps * Σ|a||b| + smallest / 2)``."""
    return factor * max(terms, 1) * (ROUNDOFF[torch.float32] * magnitude + SMALLEST[torch.float32] / 2)


def assert_close(actual: Tensor, exact: Tensor, bound: Tensor, what: str) -> None:
    """Every element of ``actual`` within ``bound`` of ``exact`` (fp64), plus the rounding to its own dtype."""
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    stored = ROUNDOFF[actual.dtype] * exact.abs() + SMALLEST[actual.dtype]
    finite = exact.isfinite()
    found = actual.double()
    same_kind = torch.where(finite, found.isfinite(), (found == exact) | (found.isnan() & exact.isnan()))
    assert same_kind.all(), f"{what}: {int((~same_kind).sum())} elements differ in being finite, infinite or NaN"
    allowed = bound.nan_to_num(0, 0, 0) + stored  # a bound means nothing where the exact value is not finite
    excess = torch.where(finite, (found - exact).abs() / allowed, torch.zeros(()).double())
    worst = int(excess.argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), exact.shape))
    message = f"{what}: worst element {place}: {found[place]:.9g}, exact {exact[place]:.9g}, {excess.max():.3g} x bound"
    print(message)
    assert float(excess.max()) <= 1, message
