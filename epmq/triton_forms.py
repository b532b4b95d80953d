"""Offers the Triton kernels to :mod:`epmq.ops`; Triton itself is imported when one of them first runs.

They take tensors of a CUDA device. On the CPU they run in Triton's interpreter, which only serves tests: both
``TRITON_INTERPRET=1`` and ``EPMQ_BACKEND=triton`` must ask for it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from epmq.extension import FLOATS


@cache
def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def _reachable(*tensors: Tensor | None) -> bool:
    """Whether a kernel may run on these tensors: one CUDA device, or the interpreter where it is asked for."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) != 1 or not installed():
        return False
    if devices.pop().type == "cuda":
        return True
    return os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("EPMQ_BACKEND") == "triton"


def _accumulates(
    x: Tensor,
    hessian: Tensor,
    sum_x: Tensor,
    target: Tensor | None = None,
    cross: Tensor | None = None,
    sum_target: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> bool:
    sums = [tensor for tensor in (hessian, sum_x, cross, sum_target) if tensor is not None]
    return (
        _reachable(x, *sums, target, row_weights)
        and x.dtype in FLOATS
        and (target is None or target.dtype in FLOATS)
        and all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in sums)
    )


def _accumulate(*args: Any, **kwargs: Any) -> None:
    from epmq.kernels.gram import accumulate

    accumulate(*args, **kwargs)


def _sweeps(weight: Tensor, unit_upper: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor, bits: int) -> bool:
    floats = (weight, unit_upper, scales, zeros)
    return _reachable(*floats, group_of) and all(tensor.dtype == torch.float32 for tensor in floats)


def _gptq_sweep(*args: Any, **kwargs: Any) -> Tensor:
    from epmq.kernels.gptq_block import gptq_sweep

    codes: Tensor = gptq_sweep(*args, **kwargs)
    return codes


def offer(register: Callable[..., None]) -> None:
    """Register the Triton forms. Those of the compiled extension come after and are preferred where both apply."""
    register("accumulate", "triton", _accumulate, _accumulates)
    register("gptq_sweep", "triton", _gptq_sweep, _sweeps)
