"""``y = x · dequant(W)ᵀ + bias`` with 4-bit W: the entry, its torch operators, and the choice of path.

Numbers: a weight is ``(code - zero) · scale`` rounded once to x's dtype, sums are fp32, y is rounded once. With one
scale per row, and with groups of 128 and more for few tokens, the fused kernels sum exact integers times x and multiply
the sum by the scale. Two calls give the same bits; ``batch_invariant`` takes one form and one order of summation for
every number of tokens, without which few and many tokens may differ by half a step of a 16-bit weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
from epmq.quantized import QuantizedTensor, group_count

SWIZZLED_FROM = 256  # tokens; fewer see each weight once, and their order does not matter
SUM_BLOCK = 1024


@dataclass(frozen=True)
class Case:
    """All that decides which compiled programs a product runs. ``parts`` are those that are really summed.

    out_features and in_features: 1, or 16 for its multiples, or 0 for others, as Triton tells them apart.
    """

    config: Config
    parts: int
    group_size: int
    dtype: torch.dtype
    bias: torch.dtype | None
    out_features: int
    in_features: int
    swizzled: bool


_checked: set[tuple[Any, ...]] = set()  # by device, calls and the cases that they are


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
        return run(x, words, scale_words, bias, out_features, group_size, config)


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
    simulated = interpreted()
    wide = simulated and x.dtype == torch.bfloat16
    blocks = words.shape[1]
    per_part, parts = cut(blocks, config)
    # A bias of x's dtype is added by the product, any other by the sum, so that none compiles the product anew.
    split = parts > 1 or (bias is not None and bias.dtype != x.dtype)
    # sm_90 can launch the sum before the product has ended, which hides most of what a launch costs. The product itself
    # gains nothing by that: on an H200 it took longer, whether or not it fetched weights meanwhile.
    early = split and not simulated and tune.device_facts(x.device)[0] >= 90
    out = x.new_empty(tokens, out_features)
    sums = torch.empty(parts, tokens, out_features, dtype=torch.float32, device=x.device) if split else out
    grid = (-(-tokens // config.block_m) * -(-out_features // config.block_n), parts)
    product_tiles[grid](
        x, words, scale_words, None if split else bias, sums, tokens, out_features, scale_words.shape[1], blocks,
        row_stride(x), per_part,
        BM=config.block_m, BN=config.block_n, GROUP=group_size, SPLIT=split,
        BIAS=bias is not None and not split, JOINED=config.joined, SWIZZLE=8 if tokens >= SWIZZLED_FROM else 1,
        EARLY=early, ASM=not simulated if assembly is None else assembly, WIDE=wide,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
    )  # fmt: skip
    if split:
        sum_parts[(-(-tokens * out_features // SUM_BLOCK),)](
            sums, bias, out, tokens, out_features,
            SPLITS=parts, BIAS=bias is not None, EARLY=early, WIDE=wide,
            BLOCK=SUM_BLOCK, enable_fp_fusion=False, **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
    return out


def cut(blocks: int, config: Config) -> tuple[int, int]:
    """(blocks of 128 columns in a part, parts): the parts asked for, less where that leaves some without a block."""
    per_part = -(-blocks // config.split_k)
    return per_part, -(-blocks // per_part)


# ---- the check before first use --------------------------------------------------------------------------------------


def case_of(x: Tensor, bias: Tensor | None, out_features: int, group_size: int, config: Config) -> Case:
    """The case of a product of x ``[M, K]``."""

    def kind(size: int) -> int:
        return 1 if size == 1 else 16 if size % 16 == 0 else 0

    # The product pads K itself; the two stages have no parts, and know of N only where rows end.
    parts = 1 if config.two_stages else cut(-(-x.shape[1] // TILE_COLUMNS), config)[1]
    return Case(
        replace(config, split_k=1),
        parts,
        group_size,
        x.dtype,
        None if bias is None else bias.dtype,
        16 if config.two_stages else kind(out_features),
        kind(x.shape[1]) if config.two_stages else 16,
        not config.two_stages and x.shape[0] >= SWIZZLED_FROM,
    )


def ensure_checked(x: Tensor, bias: Tensor | None, out_features: int, group_size: int, config: Config) -> None:
    """Check what a product runs, once per device before the first one. Raises NumericalError for wrong results.

    While a CUDA graph is captured nothing can be checked: run the product once before.
    """
    device, tokens, in_features = x.device, *x.shape
    call = (
        device.index, config, group_size, x.dtype, None if bias is None else bias.dtype, out_features, in_features,
        tokens >= SWIZZLED_FROM,
    )  # fmt: skip
    if call in _checked:
        return
    case = case_of(x, bias, out_features, group_size, config)
    if (device.index, case) not in _checked:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("int4_matmul: run it once on this device before a CUDA graph is captured, to check it.")
        check(device, case)
    _checked.update(((device.index, case), call))


def check(device: torch.device, case: Case) -> None:
    """Multiply small integers whose product is exact in every step and compare. Raises NumericalError."""
    cpu = torch.device("cpu")  # whatever the caller's defaults for device and dtype are
    generator = torch.Generator(cpu).manual_seed(0)

    def draw(least: int, stop: int, *shape: int) -> Tensor:
        return torch.randint(least, stop, shape, generator=generator, device=cpu, dtype=torch.int64)

    config, group = replace(case.config, split_k=case.parts), case.group_size or -1
    # Parts of at least two blocks each, and three groups.
    whole = TILE_COLUMNS * case.parts * max(2, -(-3 * case.group_size // (TILE_COLUMNS * case.parts)))
    columns = {1: 1, 16: whole, 0: whole - 5}[case.in_features]
    # With swizzling ten tiles of rows: one more than it takes together, and the one that is moved back.
    tiles = 9 if case.swizzled else 1
    rows = {1: 1, 16: tiles * max(config.block_n, 64) + 48, 0: tiles * max(config.block_n, 64) + 41}[case.out_features]
    tokens = config.block_m + 3 + (SWIZZLED_FROM if case.swizzled else 0)
    groups = group_count(columns, group)
    codes, zeros = (draw(0, 16, rows, n).to(torch.uint8) for n in (columns, groups))
    scales = torch.tensor([0.5, 1.0, 2.0], device=cpu, dtype=torch.float32)[draw(0, 3, rows, groups)]
    # Up to four tokens of every row are not zero, so that no sum leaves the integers (and halves) that 8 bits hold.
    x = torch.zeros(tokens, columns, device=cpu, dtype=torch.float32)
    x.scatter_(1, draw(0, columns, tokens, 4), draw(0, 2, tokens, 4).float() * 2.0 - 1.0)
    offset = None if case.bias is None else draw(-2, 3, rows).float()
    exact = QuantizedTensor(codes, scales, zeros, BITS, group)
    weight = pack_weight(exact, case.dtype)
    words, scale_words = weight.words.to(device), weight.scale_words.to(device)
    bias = None if offset is None else offset.to(device, case.bias)
    y = run(x.to(device, case.dtype), words, scale_words, bias, rows, case.group_size, config)
    wanted = x @ exact.dequantize().T + (0.0 if offset is None else offset)
    wrong = y.float().cpu() != wanted
    if bool(wrong.any()):
        raise NumericalError(
            f"int4_matmul: {int(wrong.sum())} of {wrong.numel()} products of small integers are wrong on {device} "
            f"in {case}; this GPU, driver or Triton {triton.__version__} computes wrongly, set EPMQ_BACKEND=reference."
        )
