"""Blocked GPTQ on a GPU: one launch quantizes a block of 128 columns of all rows, a matrix product brings in the rest.

The form ``triton`` of :func:`epmq.reference.gptq_sweep`. Everything is held transposed, columns as rows of memory, so
that a lane owns a row of the weight and every access of a warp is one coalesced line: a row's recursion then needs no
other lane, no shared memory and no barrier. Inside a block, columns go in sub-blocks of 16 whose values stay in
registers; earlier columns of the block come in by fused multiply-adds with their deviations, which the same lane has
just written and reads back.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from epmq.kernels.launch import interpreted, on_device

BLOCK = 128
# Between super-blocks the update is right-looking: one product with 512 inner columns over all that is left, which
# fills the chip. Inside one it is left-looking, so that a column's running sum is rewritten once per 512 columns, not
# once per 128; those products have few output tiles, but only 512 / K of the arithmetic.
SUPER_BLOCK = 512
ROWS_PER_PROGRAM = 32

# Adding and subtracting 1.5 * 2^23 rounds half to even, as torch.round does, wherever |x| < 2^22; beyond that both the
# exact and this result are clamped. One addition each, against a conversion at a quarter of the rate.
ROUND = tl.constexpr(12582912.0)
SUB = tl.constexpr(16)
UNROLL = tl.constexpr(4)  # earlier columns whose loads are under way together


@triton.jit
def _column(value, kept, scale, inverse, zero, TOP: tl.constexpr):
    """Code (as a float) of a column's adjusted values, and its deviation ``kept - dequantized`` (NaN stays NaN)."""
    nearest = (value * inverse + ROUND) - ROUND
    code = tl.maximum(nearest + zero, 0.0, propagate_nan=tl.PropagateNan.ALL)
    code = tl.minimum(code, TOP, propagate_nan=tl.PropagateNan.ALL)
    return code, kept - (code - zero) * scale


@triton.jit
def gptq_block_kernel(
    running,  # fp32 [count, N]: adjusted values of the block's columns, replaced by their deviations
    weight,  # fp32 [count, N]: the block's columns of the weight
    codes,  # uint8 [count, N]
    factor,  # fp32 [count, count]: the block's part of the unit upper factor, rows factor_stride apart
    scales,  # fp32 [G, N]
    inverse_scales,  # fp32 [G, N]
    zeros,  # fp32 [G, N]
    group_of,  # int32 [count]
    count,  # columns of the block, a multiple of SUB
    rows,  # N
    factor_stride,
    TOP: tl.constexpr,  # 2^bits - 1
    ROWS: tl.constexpr,  # rows of the weight per program: the lanes of one warp
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    for first in range(0, count, SUB):
        values = ()
        for c in tl.static_range(SUB):
            values = values + (tl.load(running + (first + c) * rows + row, mask=there, other=0.0),)
        for group in range(0, first, UNROLL):
            for step in tl.static_range(UNROLL):
                before = group + step
                deviation = tl.load(running + before * rows + row, mask=there, other=0.0)
                line = factor + before * factor_stride + first
                moved = ()
                for c in tl.static_range(SUB):
                    moved = moved + (tl.fma(deviation, tl.load(line + c), values[c]),)
                values = moved
        for c in tl.static_range(SUB):
            at = (first + c) * rows + row
            grid = tl.load(group_of + first + c) * rows + row
            kept = tl.load(weight + at, mask=there, other=0.0)
            scale = tl.load(scales + grid, mask=there, other=1.0)
            inverse = tl.load(inverse_scales + grid, mask=there, other=1.0)
            zero = tl.load(zeros + grid, mask=there, other=0.0)
            code, deviation = _column(values[c], kept, scale, inverse, zero, TOP)
            tl.store(codes + at, code.to(tl.uint8), mask=there)
            tl.store(running + at, deviation, mask=there)
            line = factor + (first + c) * factor_stride + first
            moved = ()
            for d in tl.static_range(SUB):
                if d > c:
                    moved = moved + (tl.fma(deviation, tl.load(line + d), values[d]),)
                else:
                    moved = moved + (values[d],)
            values = moved


def gptq_sweep(
    weight: Tensor,
    unit_upper: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_of: Tensor,
    bits: int,
    block: int = BLOCK,
    super_block: int = SUPER_BLOCK,
) -> Tensor:
    """See :func:`epmq.reference.gptq_sweep`; fp32 tensors of one device, no synchronisation with it.

    block: columns of one launch, a multiple of 16. super_block: columns between updates of all that is left, a multiple
    of ``block``. The products follow torch's own TF32 switches, off by default; everything else is IEEE fp32.
    """
    rows, columns = weight.shape
    if rows == 0 or columns == 0:
        return torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    missing = -columns % SUB.value
    if missing:
        # Columns of zeros change no other; with them no access of the kernel needs a bound but that of the rows.
        weight, unit_upper = F.pad(weight, (0, missing)), F.pad(unit_upper, (0, missing, 0, missing))
        group_of, columns = F.pad(group_of, (0, missing)), columns + missing
    transposed = weight.T.contiguous()
    running = transposed.clone()
    swept = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    by_group = [tensor.T.contiguous() for tensor in (scales, 1.0 / scales, zeros)]
    factor = unit_upper if unit_upper.stride(1) == 1 else unit_upper.contiguous()
    group_of = group_of.to(torch.int32).contiguous()
    # The interpreter's cost is by operation, not by element: all rows at once.
    per_program = triton.next_power_of_2(rows) if interpreted() else ROWS_PER_PROGRAM
    grid = (triton.cdiv(rows, per_program),)
    with on_device(weight):
        for super_start in range(0, columns, super_block):
            super_stop = min(super_start + super_block, columns)
            for start in range(super_start, super_stop, block):
                stop = min(start + block, super_stop)
                if start > super_start:
                    share = factor[super_start:start, start:stop]
                    running[start:stop].addmm_(share.T, running[super_start:start])
                gptq_block_kernel[grid](
                    running[start:],
                    transposed[start:],
                    swept[start:],
                    factor[start:, start:],
                    *by_group,
                    group_of[start:],
                    stop - start,
                    rows,
                    factor.stride(0),
                    TOP=float(2**bits - 1),
                    ROWS=per_program,
                    num_warps=1,
                    enable_fp_fusion=False,
                )
            if super_stop < columns:
                share = factor[super_start:super_stop, super_stop:]
                running[super_stop:].addmm_(share.T, running[super_start:super_stop])
    return swept[: columns - missing].T.contiguous()
