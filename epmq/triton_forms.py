"""Offers the Triton kernels to :mod:`epmq.ops`; Triton itself is imported when one of them first runs.

They take tensors of an NVIDIA GPU from sm_80 on. On the CPU they run in Triton's interpreter, which only serves tests:
both ``TRITON_INTERPRET=1`` and ``EPMQ_BACKEND=triton`` must ask for it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from epmq.extension import accumulates, sweeps
from epmq.gradient import in_forward_mode
from epmq.kernels.layout import BITS, kernel_group, pack_rows


def _reachable(first: Tensor, *others: Tensor | None) -> bool:
    """Whether a kernel may run on these tensors: one device that has kernels, or the interpreter if asked for."""
    device = first.device
    if any(tensor is not None and tensor.device != device for tensor in others):
        return False
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("EPMQ_BACKEND") == "triton"
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    # Of the ways to ask this, the one that torch.compile takes for a constant.
    return bool(torch.cuda.get_device_properties(device).major >= 8)


def _accumulate(*args: Any, **kwargs: Any) -> None:
    from epmq.kernels.gram import accumulate

    accumulate(*args, **kwargs)


def _gptq_sweep(*args: Any, **kwargs: Any) -> Tensor:
    from epmq.kernels.gptq_block import gptq_sweep

    codes: Tensor = gptq_sweep(*args, **kwargs)
    return codes


def _multiplies(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, group_size: int
) -> bool:
    """What epmq.kernels.int4_matmul takes: 4 bits, the kernels' groups, 16-bit inputs."""
    if x.dtype not in (torch.float16, torch.bfloat16) or bits != BITS or kernel_group(group_size, x.shape[1]) is None:
        return False
    return _reachable(x, packed, scales, zeros, bias) and not in_forward_mode()


def _dequant_matmul(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """On a checkpoint's codes; QuantLinear packs once and calls the kernel itself."""
    from epmq.kernels.int4_matmul import int4_matmul

    y: Tensor = int4_matmul(x, pack_rows(packed, scales, zeros, bits, group_size, x.shape[1], x.dtype), bias)
    return y


def offer(register: Callable[..., None]) -> None:
    """Register the Triton forms where Triton is installed; on a GPU they are preferred to the extension's
    (docs/kernels.md says why)."""
    if importlib.util.find_spec("triton") is None:
        return
    register("accumulate", "triton", _accumulate, partial(accumulates, _reachable, (torch.float32,)))
    register("gptq_sweep", "triton", _gptq_sweep, partial(sweeps, _reachable))
    register("dequant_matmul", "triton", _dequant_matmul, _multiplies)
