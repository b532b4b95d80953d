"""The gradient of a product with packed weights, for every operator that forms one, and when to form none."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import forward_ad

from epmq.quantized import dequantize, unpack


def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what :func:`gradient` needs of a call ``(x, packed, scales, zeros, bias, bits, group_size)``."""
    x, packed, scales, zeros, bias, ctx.bits, ctx.group_size = inputs
    ctx.save_for_backward(packed, scales, zeros)
    ctx.in_features, ctx.bias_dtype = x.shape[1], None if bias is None else bias.dtype


def gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The packed weight is fixed: only the activations and the bias have a gradient."""
    packed, scales, zeros = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        codes = unpack(packed, ctx.bits, ctx.in_features)
        grad_x = (grad.float() @ dequantize(codes, scales, zeros, ctx.bits, ctx.group_size)).to(grad.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
        grad_bias = grad.float().sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None, None


def in_forward_mode() -> bool:
    """Whether derivatives are being carried forward (``torch.func.jvp``, ``jacfwd``): operators that are one piece to
    autograd would drop them, so products are then composed of torch's own."""
    return bool(forward_ad._current_level >= 0)
