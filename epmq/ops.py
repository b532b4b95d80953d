"""The table that chooses an implementation for each numeric operation, before the call.

Each operation exists once in :mod:`epmq.reference`; faster forms are registered here under the same name and
signature. The choice is made from device, dtype and shape, never by catching an exception.
``EPMQ_BACKEND=reference|cpp|cuda|triton|blocked|pieces`` asks for one backend; an operation without such a form for the
tensors at hand runs as reference, which is logged once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from epmq import blocked, extension, pieces, reference, triton_forms
from epmq.errors import ConfigError

log = logging.getLogger("epmq")

BACKENDS = ("reference", "cpp", "cuda", "triton", "blocked", "pieces")


@dataclass(frozen=True)
class Implementation:
    """One form of an operation: where it may run, and whether it is preferred there."""

    backend: str
    function: Callable[..., Any]
    accepts: Callable[..., bool]


_TABLE: dict[str, list[Implementation]] = {}
_told: set[tuple[str, str]] = set()


def register(
    op: str, backend: str, function: Callable[..., Any], accepts: Callable[..., bool] = lambda *a, **k: True
) -> None:
    """Add an implementation; later registrations are preferred over earlier ones where both accept the call."""
    _TABLE.setdefault(op, []).insert(0, Implementation(backend, function, accepts))


def operations() -> list[str]:
    """Names of all operations."""
    return sorted(_TABLE)


def implementations(op: str) -> list[Implementation]:
    """All registered forms of ``op``, preferred first; the reference is last."""
    return list(_TABLE[op])


def wanted_backend() -> str | None:
    """The backend asked for by ``EPMQ_BACKEND``, or None."""
    wanted = os.environ.get("EPMQ_BACKEND") or None
    if wanted is not None and wanted not in BACKENDS:
        raise ConfigError(f"EPMQ_BACKEND={wanted!r} is not a backend; use one of {', '.join(BACKENDS)}.")
    return wanted


def choose(op: str, *args: Any, **kwargs: Any) -> Implementation:
    """The implementation that will run this call."""
    extension.check()
    wanted = wanted_backend()
    for candidate in _TABLE[op]:
        if (wanted is None or candidate.backend == wanted) and candidate.accepts(*args, **kwargs):
            return candidate
    if wanted is not None and (op, wanted) not in _told:
        _told.add((op, wanted))
        log.warning("%s has no %s form for these tensors: the reference runs instead.", op, wanted)
    return _TABLE[op][-1]


def _call(op: str, *args: Any, **kwargs: Any) -> Any:
    return choose(op, *args, **kwargs).function(*args, **kwargs)


register("accumulate", "reference", reference.accumulate)
register("gptq_sweep", "reference", reference.gptq_sweep)
register("grid_losses", "reference", reference.grid_losses)
register("dequant_matmul", "reference", reference.dequant_matmul)
register("product", "reference", reference.product)
register("product", "pieces", pieces.product, pieces.accepts)
register("subtract_product", "reference", reference.subtract_product)
register("subtract_gram", "reference", reference.subtract_gram)
register("cholesky", "reference", reference.cholesky)
register(
    "cholesky",
    "blocked",
    lambda matrix, block=None: blocked.cholesky(matrix, subtract_gram, block),
    lambda matrix: wanted_backend() == "blocked" or blocked.preferred(matrix),
)
extension.offer(register)
triton_forms.offer(register)


def accumulate(
    x: Tensor,
    hessian: Tensor,
    sum_x: Tensor,
    target: Tensor | None = None,
    cross: Tensor | None = None,
    sum_target: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> None:
    """See :func:`epmq.reference.accumulate`."""
    _call("accumulate", x, hessian, sum_x, target, cross, sum_target, row_weights)


def gptq_sweep(
    weight: Tensor, unit_upper: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor, bits: int
) -> Tensor:
    """See :func:`epmq.reference.gptq_sweep`."""
    codes: Tensor = _call("gptq_sweep", weight, unit_upper, scales, zeros, group_of, bits)
    return codes


def cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`epmq.reference.cholesky`."""
    factor: tuple[Tensor, Tensor] = _call("cholesky", matrix)
    return factor


def product(a: Tensor, b: Tensor) -> Tensor:
    """See :func:`epmq.reference.product`."""
    out: Tensor = _call("product", a, b)
    return out


def subtract_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """See :func:`epmq.reference.subtract_product`."""
    _call("subtract_product", out, a, b)


def subtract_gram(out: Tensor, a: Tensor) -> None:
    """See :func:`epmq.reference.subtract_gram`."""
    _call("subtract_gram", out, a)


def grid_losses(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    group_size: int,
    power: float,
    importance: Tensor | None = None,
) -> Tensor:
    """See :func:`epmq.reference.grid_losses`."""
    losses: Tensor = _call("grid_losses", weight, scales, zeros, bits, group_size, power, importance)
    return losses


def dequant_matmul(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """See :func:`epmq.reference.dequant_matmul`."""
    y: Tensor = _call("dequant_matmul", x, packed, scales, zeros, bias, bits, group_size)
    return y
