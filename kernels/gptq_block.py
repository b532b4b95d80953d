"""Blocked GPTQ on a GPU: one launch quantizes a block of columns of all rows, matrix products bring in the rest.

The form ``triton`` of :func:`epmq.reference.gptq_sweep`. Everything is held transposed, columns as rows of memory, so
that a lane owns a row of the weight and every access of a warp is one coalesced line. A block goes in parts: what a
part gets of the block's columns before it is a small product by all warps, the recursion within it runs a lane for a
row, in sub-blocks of 16 columns whose values stay in registers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from epmq.kernels.launch import interpreted, on_device
from epmq.kernels.tune import device_facts

BLOCK = 512
# Between super-blocks the update is right-looking, over all that is left; inside one a product doubles its reach each
# time (see gptq_sweep). Both kinds fill the chip.
SUPER_BLOCK = 2048
LINE = 32  # rows are filled up to a multiple of this: every line of a warp is then whole and aligned
MOST_ROWS = 128  # of a program

# Adding and subtracting 1.5 * 2^23 rounds half to even, as torch.round does, wherever |x| < 2^22; beyond that both the
# exact and this result are clamped. One addition each, against a conversion at a quarter of the rate.
ROUND = tl.constexpr(12582912.0)
SUB = tl.constexpr(16)
QUAD = tl.constexpr(4)  # entries of the factor that one load brings
UNROLL = tl.constexpr(4)  # earlier columns whose loads are under way together
AHEAD = tl.constexpr(3)  # columns of a sub-block whose lines of the factor are read before they are needed
# Fusion is switched off by name, because Triton's default changes: nothing may be fused before a rounding. Left alone,
# ptxas takes fewer registers at times, and spills.
SETTINGS: dict[str, Any] = {"PART": 64, "DEPTH": 16, "STAGES": 3, "enable_fp_fusion": False, "maxnreg": 255}
TILE = 32  # of a transposition


@triton.jit
def _column(value, kept, scale, inverse, zero, top):
    """Code (as a float) of a column's adjusted values, and its deviation ``kept - dequantized`` (NaN stays NaN)."""
    nearest = (value * inverse + ROUND) - ROUND
    code = tl.maximum(nearest + zero, 0.0, propagate_nan=tl.PropagateNan.ALL)
    code = tl.minimum(code, top, propagate_nan=tl.PropagateNan.ALL)
    return code, kept - (code - zero) * scale


@triton.jit
def load_line(place, FROM: tl.constexpr, COMPILED: tl.constexpr):
    """SUB entries of the factor, 16-byte aligned, four with each load; zeros before FROM where nothing is loaded."""
    line = ()
    for quad in tl.static_range(SUB // QUAD):
        if QUAD * quad + QUAD <= FROM:
            line = line + (0.0, 0.0, 0.0, 0.0)
        elif COMPILED:
            # What nothing writes may be read before stores that stand before it.
            line = line + tl.inline_asm_elementwise(
                "ld.global.nc.v4.f32 {$0, $1, $2, $3}, [$4];",
                "=f,=f,=f,=f,l",
                [(place + QUAD * quad).to(tl.int64)],
                (tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=True,
                pack=1,
            )
        else:
            for entry in tl.static_range(QUAD):
                line = line + (tl.load(place + QUAD * quad + entry),)
    return line


@triton.jit
def load_row(place, COMPILED: tl.constexpr):
    """A number for each lane. For every load that Triton knows of, its coalescing pass walks the whole program: with
    tl.load the machine code is the same and takes twice as long to compile."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "ld.global.f32 $0, [$1];", "=f,l", [place.to(tl.int64)], tl.float32, is_pure=False, pack=1
        )
    return tl.load(place)


@triton.jit
def take_in(values, deviation, lines, AT: tl.constexpr, FROM: tl.constexpr):
    """values[c] + deviation * lines[AT + c] for c from FROM on."""
    moved = ()
    for c in tl.static_range(SUB):
        if c >= FROM:
            moved = moved + (tl.fma(deviation, lines[AT + c], values[c]),)
        else:
            moved = moved + (values[c],)
    return moved


@triton.jit
def prefetch(addresses):
    """Bring lines into the first-level cache. Returns zeros, because inline assembly must return something."""
    return tl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.u32 $0, 0;", "=r,l", [addresses.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )


@triton.jit(
    do_not_specialize=["first_sub", "subs", "lines", "factor_quads"],
    do_not_specialize_on_alignment=["group_of"],
)
def gptq_block_kernel(
    running,  # fp32 [columns, N]: what a column gets of those before its block, replaced by its deviations
    weight,  # fp32 [columns, N]
    codes,  # uint8 [columns, N]
    factor,  # fp32 [columns, columns]: unit upper triangular, rows 4 * factor_quads apart, 16-byte aligned
    scales,  # fp32 [G, N]
    inverse_scales,  # fp32 [G, N]
    zeros,  # fp32 [G, N]
    group_of,  # int32 [columns]
    first_sub,  # first column of the block, in SUBs; the first block's ``running`` is not read before it is written
    subs,  # columns of the block, in SUBs. What is a multiple is given like that, so that the compiler knows
    lines,  # N / 32, filled up to whole programs
    factor_quads,
    top,  # 2^bits - 1, a float
    ROWS: tl.constexpr,  # rows of the weight per program, at most a lane for each; with fewer, warps do the same twice
    PART: tl.constexpr,  # columns that one product brings up to date, a multiple of SUB
    DEPTH: tl.constexpr,  # inner columns of a turn of it, a divisor of PART
    STAGES: tl.constexpr,
    COMPILED: tl.constexpr,
):
    start = first_sub * SUB
    count = subs * SUB
    rows = lines * 32
    stride = factor_quads * 4
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    origin = start.to(tl.int64) * rows
    running += origin
    weight += origin
    codes += origin
    factor += start.to(tl.int64) * stride + start
    group_of += start
    summed = tl.where(start > 0, count, 0)
    for part in range(0, count, PART):
        column = part + tl.arange(0, PART)
        inside = column < count
        if COMPILED:
            # What the recursion would wait for, line after line, is fetched while the product runs.
            own = tl.minimum(column, count - 1)
            for line in tl.static_range(PART // 32):
                prefetch(factor + own * stride + tl.minimum(part + 32 * line, count - 1))
            for line in tl.static_range(ROWS // 32):
                prefetch(weight + own * rows + tl.program_id(0) * ROWS + 32 * line)
        place = running + column[:, None] * rows + row[None, :]
        sums = tl.load(place, mask=(column < summed)[:, None], other=0.0)
        for inner in tl.range(0, part, DEPTH, num_stages=STAGES):
            depth = inner + tl.arange(0, DEPTH)
            deviations = tl.load(running + depth[:, None] * rows + row[None, :])
            shares = tl.load(factor + depth[:, None] * stride + column[None, :], mask=inside[None, :], other=0.0)
            sums = tl.dot(tl.trans(shares), deviations, sums, input_precision="ieee")
        tl.store(place, sums, mask=inside[:, None])
        tl.debug_barrier()
        for first in range(part, tl.minimum(part + PART, count), SUB):
            # All loads of a sub-block stand before its recursion, which then waits for arithmetic only.
            values = ()
            kept = ()
            scale = ()
            inverse = ()
            zero = ()
            for c in tl.static_range(SUB):
                grid = tl.load(group_of + first + c) * rows + row
                scale = scale + (load_row(scales + grid, COMPILED),)
                inverse = inverse + (load_row(inverse_scales + grid, COMPILED),)
                zero = zero + (load_row(zeros + grid, COMPILED),)
                kept = kept + (load_row(weight + (first + c) * rows + row, COMPILED),)
                values = values + (kept[c] + load_row(running + (first + c) * rows + row, COMPILED),)
            for group in range(part, first, UNROLL):
                deviation = ()
                shares_of = ()
                for step in tl.static_range(UNROLL):
                    deviation = deviation + (load_row(running + (group + step) * rows + row, COMPILED),)
                    shares_of = shares_of + load_line(factor + (group + step) * stride + first, 0, COMPILED)
                for step in tl.static_range(UNROLL):
                    values = take_in(values, deviation[step], shares_of, SUB * step, 0)
            # Warps that do the same twice read what the first of them is about to replace.
            tl.debug_barrier()
            triangle = ()
            for c in tl.static_range(AHEAD):
                triangle = triangle + load_line(factor + (first + c) * stride + first, c + 1, COMPILED)
            for c in tl.static_range(SUB):
                if c + AHEAD < SUB:
                    after = factor + (first + c + AHEAD) * stride + first
                    triangle = triangle + load_line(after, c + AHEAD + 1, COMPILED)
                at = (first + c) * rows + row
                code, error = _column(values[c], kept[c], scale[c], inverse[c], zero[c], top)
                tl.store(codes + at, code.to(tl.uint8))
                tl.store(running + at, error)
                values = take_in(values, error, triangle, SUB * c, c + 1)
            tl.debug_barrier()


# That neighbours are read is known to the compiler (``across`` is 1) and nothing else: one program for all sizes.
@triton.jit(
    do_not_specialize=["height", "width", "down", "target_height", "target_width"],
    do_not_specialize_on_alignment=["source", "target"],
)
def transpose_kernel(
    source,  # [height, width], ``down`` and ``across`` entries from one to the next
    target,  # [target_height, target_width]: the source's columns as rows, zeros where it has none
    height,
    width,
    down,
    across,
    target_height,
    target_width,
    TILE: tl.constexpr,
):
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)  # of the source's rows
    j = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = (i < height)[:, None] & (j < width)[None, :]
    far = i.to(tl.int64)[:, None] * down + j.to(tl.int64)[None, :] * across
    tile = tl.trans(tl.load(source + far, mask=there, other=0))
    place = target + j.to(tl.int64)[:, None] * target_width + i[None, :]
    tl.store(place, tile, mask=(j < target_height)[:, None] & (i < target_width)[None, :])


def transposed(source: Tensor, height: int, width: int) -> Tensor:
    """The transpose, cut to [height, width] or filled up to it with zeros; torch's own copy is many times slower."""
    target = torch.empty(height, width, dtype=source.dtype, device=source.device)
    tile = triton.next_power_of_2(max(height, width)) if interpreted() else TILE
    grid = (triton.cdiv(height, tile), triton.cdiv(width, tile))
    transpose_kernel[grid](source, target, *source.shape, *source.stride(), height, width, TILE=tile)
    return target


def rows_of_a_program(rows: int, processors: int) -> int:
    """The fewest that leave every multiprocessor one program at most, where so many are not too many for one."""
    fewest = LINE
    while fewest < MOST_ROWS and rows > fewest * processors:
        fewest *= 2
    return fewest


def warps_of_a_program(rows: int) -> int:
    """Four, or as many as keep a product's sums in registers."""
    return max(4, rows // 16)


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

    block: columns of one launch, a multiple of 16. super_block: columns between updates of all that is left, ``block``
    times a power of two. The products follow torch's own TF32 switches, off by default; everything else is IEEE fp32.
    """
    rows, columns = weight.shape
    if rows == 0 or columns == 0:
        return torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    # Columns of zeros change no other, rows know of no other; with both no access of the kernel needs a bound.
    missing = -columns % SUB.value
    _, processors = device_facts(weight.device)
    # The interpreter's cost is by operation, not by element: all rows at once.
    per_program = max(triton.next_power_of_2(rows), LINE) if interpreted() else rows_of_a_program(rows, processors)
    width, height = triton.cdiv(rows, per_program) * per_program, columns + missing
    if missing:
        unit_upper, group_of = F.pad(unit_upper, (0, missing, 0, missing)), F.pad(group_of, (0, missing))
    # Four entries are read at a time.
    aligned = unit_upper.stride(1) == 1 and unit_upper.stride(0) % 4 == 0 and unit_upper.data_ptr() % 16 == 0
    factor = unit_upper if aligned else unit_upper.clone(memory_format=torch.contiguous_format)
    group_of = group_of.to(torch.int32).contiguous()
    with on_device(weight):
        kept = transposed(weight, height, width)
        by_group = [transposed(tensor, tensor.shape[1], width) for tensor in (scales, 1.0 / scales, zeros)]
        running = torch.empty_like(kept)
        swept = torch.empty(height, width, dtype=torch.uint8, device=weight.device)
        for start in range(0, height, block):
            stop = min(start + block, height)
            gptq_block_kernel[(width // per_program,)](
                running,
                kept,
                swept,
                factor,
                *by_group,
                group_of,
                start // SUB.value,
                (stop - start) // SUB.value,
                width // LINE,
                factor.stride(0) // QUAD.value,
                float(2**bits - 1),
                ROWS=per_program,
                COMPILED=not interpreted(),
                num_warps=warps_of_a_program(per_program),
                **SETTINGS,
            )
            # After an odd number of blocks the last one goes to the next one, after twice an odd number the last two go
            # to the next two, and so on: square products, up to the super-block's, which goes to all that is left.
            reach = block
            while reach < super_block and stop % (2 * reach) == 0:
                reach *= 2
            end = height if reach >= super_block else min(stop + reach, height)
            if stop < end:
                share, out = factor[stop - reach : stop, stop:end].T, running[stop:end]
                if reach == stop:  # the first that these columns get
                    torch.mm(share, running[:stop], out=out)
                else:
                    out.addmm_(share, running[stop - reach : stop])
        return transposed(swept, rows, columns)
