"""``y = x · dequant(W)ᵀ + bias`` with 4-bit W: the entry, its torch operators, and the choice of path.

Numbers: a weight is ``(code - zero) · scale`` rounded once to x's dtype, sums are fp32, y is rounded once. With one
scale per row, and with groups of 128 and more for few tokens, the fused kernels sum exact integers times x and multiply
the sum by the scale. Two calls give the same bits; ``batch_invariant`` takes one form and one order of summation for
every number of tokens, without which few and many tokens may differ by half a step of a 16-bit weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from epmq.errors import NumericalError
from epmq.kernels import tune
from epmq.kernels.int4_programs import dequantize_tiles, product_tiles, sum_parts
from epmq.kernels.launch import interpreted, on_device, readable, row_stride
from epmq.kernels.layout import BITS, TILE_COLUMNS, PackedWeight, grid_words, pack_rows, pack_weight, packed_shapes
from epmq.kernels.tune import Config
from epmq.quantized import QuantizedTensor

SWIZZLED_FROM = 256  # tokens; fewer see each weight once, and their order does not matter
SUM_BLOCK = 1024
_checked: set[tuple[int | None, Config, int, torch.dtype]] = set()


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
    y: Tensor = product(
        rows, weight.words, weight.scale_words, bias, weight.out_features, weight.group_size, batch_invariant
    )
    return y.view(*x.shape[:-1], weight.out_features)


def dequantize(weight: PackedWeight) -> Tensor:
    """``[N, K]``: the weight that :func:`int4_matmul` multiplies by, in its dtype, columns in stored order."""
    whole: Tensor = dequantized(
        weight.words, weight.scale_words, weight.out_features, weight.in_features, weight.group_size, weight.dtype
    )
    return whole


# ---- torch operators -------------------------------------------------------------------------------------------------


@torch.library.custom_op("epmq::int4_matmul", mutates_args=())
def product(
    x: Tensor,
    words: Tensor,
    scale_words: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    batch_invariant: bool,
) -> Tensor:
    """:func:`int4_matmul` on the tensors of a PackedWeight; x ``[M, K]``."""
    key = tune.device_key(x.device, out_features, x.shape[1], x.shape[0], group_size, x.dtype)
    config = tune.fixed(key) if batch_invariant else tune.choose(key)
    with on_device(x):
        if x.is_cuda:
            ensure_checked(x, config, group_size)
        return run(x, words, scale_words, bias, out_features, group_size, config)


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


@torch.library.custom_op("epmq::int4_dequantize", mutates_args=())
def dequantized(
    words: Tensor, scale_words: Tensor, out_features: int, in_features: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """:func:`dequantize` on the tensors of a PackedWeight."""
    out = torch.empty(out_features, in_features, dtype=dtype, device=words.device)
    blocks = words.shape[1]
    with on_device(words):
        dequantize_tiles[(blocks, words.shape[0])](
            words, scale_words, out, out_features, scale_words.shape[1], in_features, blocks,
            GROUP=group_size, ASM=not interpreted(), WIDE=interpreted() and dtype == torch.bfloat16,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


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


# ---- launching -------------------------------------------------------------------------------------------------------


def run(
    x: Tensor,
    words: Tensor,
    scale_words: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    config: Config,
    assembly: bool | None = None,
) -> Tensor:
    """One product in one configuration; assembly None is inline assembly wherever it can run."""
    tokens = x.shape[0]
    if tokens == 0 or out_features == 0:
        return x.new_empty(tokens, out_features)
    if config.two_stages:
        weight = dequantized(words, scale_words, out_features, x.shape[1], group_size, x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    x = readable(x, TILE_COLUMNS)
    blocks = words.shape[1]
    per_part = -(-blocks // config.split_k)
    parts = -(-blocks // per_part)
    # sm_90 can launch the sum before the product has ended, which hides most of what a launch costs.
    early = parts > 1 and not interpreted() and tune.device_facts(x.device)[0] >= 90
    out = x.new_empty(tokens, out_features)
    sums = torch.empty(parts, tokens, out_features, dtype=torch.float32, device=x.device) if parts > 1 else out
    grid = (-(-tokens // config.block_m) * -(-out_features // config.block_n), parts)
    product_tiles[grid](
        x, words, scale_words, bias, sums, tokens, out_features, scale_words.shape[1], blocks,
        row_stride(x), per_part,
        BM=config.block_m, BN=config.block_n, GROUP=group_size, SPLIT=parts > 1,
        BIAS=bias is not None and parts == 1, JOINED=config.joined, SWIZZLE=8 if tokens >= SWIZZLED_FROM else 1,
        EARLY=early, ASM=not interpreted() if assembly is None else assembly,
        WIDE=interpreted() and x.dtype == torch.bfloat16,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
    )  # fmt: skip
    if parts > 1:
        count = tokens * out_features
        sum_parts[(-(-count // SUM_BLOCK),)](
            sums, bias, out, count, out_features,
            SPLITS=parts, BIAS=bias is not None, EARLY=early, WIDE=interpreted() and x.dtype == torch.bfloat16,
            BLOCK=SUM_BLOCK, enable_fp_fusion=False, **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
    return out


# ---- the check before first use --------------------------------------------------------------------------------------


def ensure_checked(x: Tensor, config: Config, group_size: int) -> None:
    """Check a configuration once per device before its first product. Raises NumericalError for wrong results.

    While a CUDA graph is captured nothing can be checked: run the product once before.
    """
    what = (x.device.index, config, group_size, x.dtype)
    if what in _checked:
        return
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("int4_matmul: run it once on this device before a CUDA graph is captured, to check it.")
    check(x.device, config, group_size, x.dtype)
    _checked.add(what)


def check(device: torch.device, config: Config, group_size: int, dtype: torch.dtype) -> None:
    """Multiply small integers whose product is exact in every step and compare. Raises NumericalError."""
    generator = torch.Generator().manual_seed(0)
    group = group_size or -1
    columns = TILE_COLUMNS * max(2 * config.split_k, 3 * group // TILE_COLUMNS)
    rows, tokens = max(config.block_n, 64) + 41, config.block_m + 3
    groups = 1 if group == -1 else columns // group
    codes, zeros = (torch.randint(0, 16, (rows, n), dtype=torch.uint8, generator=generator) for n in (columns, groups))
    scales = 2.0 ** torch.randint(-1, 2, (rows, groups), generator=generator)
    x = torch.zeros(tokens, columns)
    # Four tokens of every row are not zero, so that no sum leaves the integers (and halves) that 8 bits hold.
    places = torch.randint(0, columns, (tokens, 4), generator=generator)
    x.scatter_(1, places, torch.randint(0, 2, (tokens, 4), generator=generator) * 2.0 - 1.0)
    exact = QuantizedTensor(codes, scales, zeros, BITS, group)
    weight = pack_weight(exact, dtype)
    words, scale_words = weight.words.to(device), weight.scale_words.to(device)
    y = run(x.to(device, dtype), words, scale_words, None, rows, group_size, config)
    wanted = x @ exact.dequantize().T
    wrong = y.float().cpu() != wanted
    if bool(wrong.any()):
        raise NumericalError(
            f"int4_matmul: {int(wrong.sum())} of {wrong.numel()} products of small integers are wrong on {device} "
            f"with {config}, group {group}, {dtype}; this GPU, driver or Triton {triton.__version__} computes wrongly, "
            "set EPMQ_BACKEND=reference."
        )
