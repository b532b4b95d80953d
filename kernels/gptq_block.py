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
def _column(value, kept, scale, inverse, zero, top):
    """Code (as a float) of a column's adjusted values, and its deviation ``kept - dequantized`` (NaN stays NaN)."""
    nearest = (value * inverse + ROUND) - ROUND
    code = tl.maximum(nearest + zero, 0.0, propagate_nan=tl.PropagateNan.ALL)
    code = tl.minimum(code, top, propagate_nan=tl.PropagateNan.ALL)
    return code, kept - (code - zero) * scale


@triton.jit
def load_line(factor, place, FROM: tl.constexpr):
    """SUB entries of the factor from ``place`` on, which is even, two with each load; zeros before FROM."""
    pairs = (factor + place).to(tl.pointer_type(tl.int64))
    line = ()
    for pair in tl.static_range(SUB // 2):
        if 2 * pair + 1 >= FROM:
            both = tl.load(pairs + pair)
            low = both.to(tl.int32).to(tl.float32, bitcast=True)
            line = line + (low, (both >> 32).to(tl.int32).to(tl.float32, bitcast=True))
        else:
            line = line + (0.0, 0.0)
    return line


@triton.jit
def take_in(values, deviation, line, FROM: tl.constexpr):
    """values[c] + deviation * line[c] for c from FROM on."""
    moved = ()
    for c in tl.static_range(SUB):
        if c >= FROM:
            moved = moved + (tl.fma(deviation, line[c], values[c]),)
        else:
            moved = moved + (values[c],)
    return moved


@triton.jit
def prefetch(addresses):
    """Bring lines into the first-level cache. Returns zeros, because inline assembly must return something."""
    return tl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.u32 $0, 0;", "=r,l", [addresses.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )


# Two floats at a time are the widest access: nothing is gained by a program for each alignment.
@triton.jit(
    do_not_specialize=["count", "rows", "factor_stride"],
    do_not_specialize_on_alignment=[
        "running",
        "weight",
        "codes",
        "factor",
        "scales",
        "inverse_scales",
        "zeros",
        "group_of",
    ],
)
def gptq_block_kernel(
    running,  # fp32 [count, N]: adjusted values of the block's columns, replaced by their deviations
    weight,  # fp32 [count, N]: the block's columns of the weight
    codes,  # uint8 [count, N]
    factor,  # fp32 [count, count]: the block's part of the unit upper factor, rows factor_stride apart, 8-byte aligned
    scales,  # fp32 [G, N]
    inverse_scales,  # fp32 [G, N]
    zeros,  # fp32 [G, N]
    group_of,  # int32 [count]
    count,  # columns of the block, a multiple of SUB
    rows,  # N
    factor_stride,  # even
    top,  # 2^bits - 1, a float
    ROWS: tl.constexpr,  # rows of the weight per program: the lanes of one warp
    BLOCK: tl.constexpr,  # the most columns of a block
    PREFETCH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    if PREFETCH:
        # Of what one warp alone would wait for, column after column: the factor, and its own rows.
        column = tl.minimum(tl.arange(0, BLOCK), count - 1)
        for quarter in tl.static_range(BLOCK // 32):
            prefetch(factor + column * factor_stride + tl.minimum(32 * quarter, count - 1))
        own = column * rows + tl.minimum(tl.program_id(0) * ROWS, rows - 1)
        prefetch(running + own)
        prefetch(weight + own)
    for first in range(0, count, SUB):
        # All loads of a sub-block stand before its recursion, which then waits for arithmetic only.
        values = ()
        kept = ()
        scale = ()
        inverse = ()
        zero = ()
        for c in tl.static_range(SUB):
            values = values + (tl.load(running + (first + c) * rows + row, mask=there, other=0.0),)
            kept = kept + (tl.load(weight + (first + c) * rows + row, mask=there, other=0.0),)
            grid = tl.load(group_of + first + c) * rows + row
            scale = scale + (tl.load(scales + grid, mask=there, other=1.0),)
            inverse = inverse + (tl.load(inverse_scales + grid, mask=there, other=1.0),)
            zero = zero + (tl.load(zeros + grid, mask=there, other=0.0),)
        deviation = tl.load(running + row, mask=there, other=0.0)
        line = load_line(factor, first, 0)
        for group in range(0, first, UNROLL):
            for step in tl.static_range(UNROLL):
                # What the next column needs is under way while this one is worked on; the last one loads in vain.
                after = group + step + 1
                next_deviation = tl.load(running + after * rows + row, mask=there, other=0.0)
                next_line = load_line(factor, after * factor_stride + first, 0)
                values = take_in(values, deviation, line, 0)
                deviation = next_deviation
                line = next_line
        line = load_line(factor, first * factor_stride + first, 1)
        for c in tl.static_range(SUB):
            following = line
            if c + 1 < SUB:
                following = load_line(factor, (first + c + 1) * factor_stride + first, c + 2)
            at = (first + c) * rows + row
            code, deviation = _column(values[c], kept[c], scale[c], inverse[c], zero[c], top)
            tl.store(codes + at, code.to(tl.uint8), mask=there)
            tl.store(running + at, deviation, mask=there)
            values = take_in(values, deviation, line, c + 1)
            line = following


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
    # Two entries are read at a time.
    paired = unit_upper.stride(1) == 1 and unit_upper.stride(0) % 2 == 0 and unit_upper.data_ptr() % 8 == 0
    factor = unit_upper if paired else unit_upper.clone(memory_format=torch.contiguous_format)
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
                    float(2**bits - 1),
                    ROWS=per_program,
                    BLOCK=triton.next_power_of_2(max(block, BLOCK)),
                    PREFETCH=not interpreted(),
                    num_warps=1,
                    enable_fp_fusion=False,
                )
            if super_stop < columns:
                share = factor[super_start:super_stop, super_stop:]
                running[super_stop:].addmm_(share.T, running[super_start:super_stop])
    return swept[: columns - missing].T.contiguous()
