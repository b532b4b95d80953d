"""``y = x · dequant(W)ᵀ + bias`` with 4-bit W: the entry and its torch operators.

Numbers: a weight is ``(code - zero) · scale`` rounded once to x's dtype, sums are fp32, y is rounded once. With one
scale per row, and with groups of 128 and more for few tokens, the fused kernels sum exact integers times x and multiply
the sum by the scale. Two calls give the same bits; ``batch_invariant`` takes one form and one order of summation for
every number of tokens, without which few and many tokens may differ by half a step of a 16-bit weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from epmq.kernels import tune
from epmq.kernels.int4_check import ensure_checked
from epmq.kernels.int4_launch import dequantize_words, run
from epmq.kernels.launch import on_device
from epmq.kernels.layout import BITS, PackedWeight, grid_words, pack_rows, packed_shapes


def int4_matmul(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, batch_invariant: bool = False) -> Tensor:
    """``x · dequant(W)ᵀ + bias`` for x ``[..., K]`` fp16 or bf16; returns ``[..., N]`` in the same dtype.

    bias: ``[N]`` of any float dtype, or None. batch_invariant: a row's result does not depend on the rows beside it.
    Gradients reach x and the bias. Raises ValueError for shapes, dtypes and devices that do not fit the weight.
    """
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"x: shape {tuple(x.shape)} does not end in the weight's {weight.in_features} input features.")
    if x.dtype != weight.dtype:
        raise ValueError(f"x: {x.dtype}, but the weight was packed for {weight.dtype}; pack it again or convert x.")
    if x.device != weight.words.device:
        raise ValueError(f"x: on {x.device}, but the weight is on {weight.words.device}.")
    if bias is not None and bias.shape != (weight.out_features,):
        raise ValueError(f"bias: shape {tuple(bias.shape)}, expected ({weight.out_features},).")
    rows = x.reshape(-1, weight.in_features)
    if weight.permutation is not None:
        rows = rows.index_select(1, weight.permutation)
    y = multiply(rows, weight.words, weight.scale_words, bias, weight.out_features, weight.group_size, batch_invariant)
    return y.view(*x.shape[:-1], weight.out_features)


def dequantize(weight: PackedWeight) -> Tensor:
    """``[N, K]``: the weight that :func:`int4_matmul` multiplies by, in its dtype, columns in stored order."""
    whole: Tensor = dequantized(
        weight.words, weight.scale_words, weight.out_features, weight.in_features, weight.group_size, weight.dtype
    )
    return whole


# ---- torch operators -------------------------------------------------------------------------------------------------


def multiply(x: Tensor, words: Tensor, scale_words: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    """The operator :func:`product`, or what it computes where nothing looks at operators: what torch runs for one in
    Python takes as long as a small product."""
    y: Tensor = (_product if _unobserved(x, bias) else product)(x, words, scale_words, bias, *how)
    return y


def _unobserved(x: Tensor, bias: Tensor | None) -> bool:
    """Whether no gradient is kept, nothing is traced or transformed, and x is no subclass."""
    keeps = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if keeps or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or type(x) is not Tensor:
        return False
    return torch._C._len_torch_dispatch_stack() == 0 and torch._C._functorch.maybe_current_level() is None


def _product(
    x: Tensor,
    words: Tensor,
    scale_words: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    batch_invariant: bool,
) -> Tensor:
    """:func:`int4_matmul` on the tensors of a PackedWeight; x ``[M, K]``."""
    product_of = (x.device, out_features, x.shape[1], x.shape[0], group_size, x.dtype)
    config = tune.fixed(tune.device_key(*product_of)) if batch_invariant else tune.chosen(*product_of)
    with on_device(x):
        if x.is_cuda:
            ensure_checked(x, bias, out_features, group_size, config)
        y: Tensor = run(x, words, scale_words, bias, out_features, group_size, config)
    return y


product = torch.library.custom_op("epmq::int4_matmul", _product, mutates_args=())


@product.register_fake
def _(
    x: Tensor,
    words: Tensor,
    scale_words: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    batch_invariant: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


dequantized = torch.library.custom_op("epmq::int4_dequantize", dequantize_words, mutates_args=())


@dequantized.register_fake
def _(
    words: Tensor, scale_words: Tensor, out_features: int, in_features: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    return words.new_empty(out_features, in_features, dtype=dtype)


@torch.library.custom_op("epmq::int4_pack", mutates_args=())
def pack_tiles(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, in_features: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """words and scale_words of :func:`epmq.kernels.layout.pack_rows`, as one operator that torch.compile can keep."""
    weight = pack_rows(packed, scales, zeros, BITS, group_size, in_features, dtype)
    return weight.words, weight.scale_words


@pack_tiles.register_fake
def _(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, in_features: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    words, grid = packed_shapes(packed.shape[0], in_features, group_size)
    return packed.new_empty(words, dtype=torch.int16), packed.new_empty(grid, dtype=torch.int32)


@torch.library.custom_op("epmq::int4_grid", mutates_args=())
def pack_grid(scales: Tensor, zeros: Tensor | None, group_size: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """scale_words alone, for codes that are in the kernels' layout already."""
    words: Tensor = grid_words(scales, zeros, packed_shapes(scales.shape[0], in_features, group_size)[1], dtype)
    return words


@pack_grid.register_fake
def _(scales: Tensor, zeros: Tensor | None, group_size: int, in_features: int, dtype: torch.dtype) -> Tensor:
    return scales.new_empty(packed_shapes(scales.shape[0], in_features, group_size)[1], dtype=torch.int32)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, words, scale_words, bias, ctx.out_features, ctx.group_size, _ = inputs
    ctx.save_for_backward(words, scale_words)
    ctx.in_features, ctx.dtype = x.shape[1], x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The codes are fixed: x and the bias have a gradient."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = dequantized(*ctx.saved_tensors, ctx.out_features, ctx.in_features, ctx.group_size, ctx.dtype)
        grad_x = grad @ weight
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        grad_bias = grad.float().sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None, None, None


product.register_autograd(_backward, setup_context=_keep_for_backward)
