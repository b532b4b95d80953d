"""Second moments of a batch on a GPU: the lower triangle of H = XᵀX and all of the cross-covariance in one launch.

The form ``triton`` of :func:`epmq.reference.accumulate`. One program computes one 128 x 128 tile of output over up to
8192 rows and alone adds it to the running sum: no atomics, the same bits each time. The gain over two matrix products
is the symmetry, half of H is never computed; reading X once gains next to nothing, the work is bound by arithmetic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epmq.kernels.launch import interpreted, on_device, readable
from epmq.rows import kept_rows

TILE = 128
LINE = 16  # columns that are read together
SUMS = tl.constexpr(16)  # columns of the product that gives column sums: the fewest that tl.dot takes
# Tensor cores do not round their running sums to nearest, so sums of squares drift; the total is therefore carried in
# the fp32 result, and a sum in registers never covers more rows than this.
ROWS_PER_LAUNCH = 8192
# Fusion is named because Triton's default for it changes in 3.10. More depth for fp32, or four warps, spills.
NARROW = {"DEPTH": 64, "num_warps": 8, "num_stages": 4, "enable_fp_fusion": True}  # fp16 and bf16, on the tensor cores
WIDE = {"DEPTH": 16, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": True, "maxnreg": 168}  # fp32 multiply-adds


@triton.jit
def tile_at(index, h_tiles):
    """(tile row, tile column, is cross): the triangle of H row by row, row r from r (r + 1) / 2 on, then all of C."""
    row = ((tl.sqrt(8.0 * index + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The square root is approximate: off by one at most.
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
    column = index - row * (row + 1) // 2
    rest = index - h_tiles * (h_tiles + 1) // 2
    cross = rest >= 0
    return tl.where(cross, rest // h_tiles, row), tl.where(cross, rest % h_tiles, column), cross


@triton.jit
def products(
    left_at,
    right_at,
    left_step,
    right_step,
    left_inside,
    right_inside,
    row_weights,
    rows,
    SUMMED: tl.constexpr,  # also the column sums of the left operand
    EXACT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """(sums [TILE, TILE], column sums of left [TILE], zeros if not SUMMED) over all rows."""
    row = tl.arange(0, DEPTH)[:, None]
    sums = tl.zeros((TILE, TILE), tl.float32)
    # Operands of tensor cores stay in shared memory: their sums are one more product. Others are in registers.
    BY_PRODUCT: tl.constexpr = not EXACT
    partial = tl.zeros((TILE, SUMS) if BY_PRODUCT else (DEPTH, TILE), tl.float32)
    for start in range(0, rows, DEPTH):
        there = row < rows - start
        a = tl.load(left_at, mask=there & left_inside, other=0.0)
        b = tl.load(right_at, mask=there & right_inside, other=0.0)
        left_at += left_step
        right_at += right_step
        if EXACT or INTERPRETED:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        if WEIGHTED:
            weight = tl.load(row_weights + start + row, mask=there, other=0.0)
            b = b * weight
        if SUMMED:
            if BY_PRODUCT:
                partial = tl.dot(tl.trans(a), tl.full((DEPTH, SUMS), 1.0, a.dtype), partial, input_precision="ieee")
            elif WEIGHTED:
                partial += a * weight
            else:
                partial += a
        sums = tl.dot(tl.trans(a), b, sums, input_precision="ieee")
    if BY_PRODUCT:
        column_sums = tl.max(partial, 1)
    else:
        column_sums = tl.sum(partial, 0)
    return sums, column_sums


@triton.jit
def gram_kernel(
    x,  # [M, K], rows x_stride apart
    target,  # [M, P], rows target_stride apart, of x's dtype
    row_weights,  # fp32 [M], read when WEIGHTED
    hessian,  # fp32 [columns, columns]
    cross,  # fp32 [P, columns]
    sum_x,  # fp32 [columns]
    sum_target,  # fp32 [P]
    rows,  # M
    columns,  # K
    targets,  # P
    x_width,  # readable columns of x: K, or K and the zeros after it
    target_width,
    x_stride,
    target_stride,
    h_tiles,
    EXACT: tl.constexpr,  # fp32 multiply-adds
    WEIGHTED: tl.constexpr,  # rows are multiplied by their weights, which EXACT allows
    INTERPRETED: tl.constexpr,  # the interpreter cannot multiply bf16
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tile_row, tile_column, is_cross = tile_at(tl.program_id(0), h_tiles)
    left = x
    left_stride = x_stride
    left_width = x_width
    out = hessian
    out_sums = sum_x
    left_columns = columns
    # Which tiles owe the column sums of their left operand: H's diagonal, and the first column of tiles of C.
    owes = tile_row == tile_column
    if is_cross:
        left = target
        left_stride = target_stride
        left_width = target_width
        out = cross
        out_sums = sum_target
        left_columns = targets
        owes = tile_column == 0
    of_left = tile_row * TILE + tl.arange(0, TILE)
    of_right = tile_column * TILE + tl.arange(0, TILE)
    # Whole matrices of addresses, advanced by addition: vectors of rows would change layout in every pass.
    row = tl.arange(0, DEPTH)[:, None]
    left_at = left + row * left_stride + of_left[None, :]
    right_at = x + row * x_stride + of_right[None, :]
    left_inside = (row >= 0) & (of_left < left_width)[None, :]
    right_inside = (row >= 0) & (of_right < x_width)[None, :]
    left_step = DEPTH * left_stride
    right_step = DEPTH * x_stride
    if owes:
        sums, column_sums = products(
            left_at, right_at, left_step, right_step, left_inside, right_inside, row_weights, rows,
            True, EXACT, WEIGHTED, INTERPRETED, TILE, DEPTH,
        )  # fmt: skip
        places = out_sums + of_left
        total = tl.load(places, mask=of_left < left_columns, other=0.0) + column_sums
        tl.store(places, total, mask=of_left < left_columns)
    else:
        sums, column_sums = products(
            left_at, right_at, left_step, right_step, left_inside, right_inside, row_weights, rows,
            False, EXACT, WEIGHTED, INTERPRETED, TILE, DEPTH,
        )  # fmt: skip
    place = of_left[:, None] * columns + of_right[None, :]
    inside = (of_left < left_columns)[:, None] & (of_right < columns)[None, :]
    tl.store(out + place, tl.load(out + place, mask=inside, other=0.0) + sums, mask=inside)


def accumulate(
    x: Tensor,
    hessian: Tensor,
    sum_x: Tensor,
    target: Tensor | None = None,
    cross: Tensor | None = None,
    sum_target: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> None:
    """See :func:`epmq.reference.accumulate`; contiguous fp32 sums.

    Rows of weight 0 are left out beforehand, which synchronises with the device. fp16 and bf16 rows go through the
    tensor cores when all that is left weighs 1; a product with another weight does not fit 16 bits, so those, and fp32
    rows, go through fp32 multiply-adds.
    """
    crossed = target is not None and cross is not None and sum_target is not None
    if not crossed:
        target = None
    x, target, left = kept_rows(x, target, row_weights)
    weighted = left is not None
    weights = x.new_ones(1, dtype=torch.float32) if left is None else left
    if x.shape[0] == 0 or x.shape[1] == 0:
        return
    if target is not None and target.dtype != x.dtype:
        x, target = x.float(), target.float()
    exact = weighted or x.dtype == torch.float32
    rows = readable(x, LINE)
    targets = rows if target is None else readable(target, LINE)
    columns, count = x.shape[1], 0 if target is None else target.shape[1]
    h_tiles = triton.cdiv(columns, TILE)
    grid = (h_tiles * (h_tiles + 1) // 2 + triton.cdiv(count, TILE) * h_tiles,)
    with on_device(x):
        for start in range(0, x.shape[0], ROWS_PER_LAUNCH):
            some = slice(start, start + ROWS_PER_LAUNCH)
            part, part_targets = rows[some], targets[some]
            part_weights = weights[some] if weighted else weights
            gram_kernel[grid](
                part,
                part_targets,
                part_weights,
                hessian,
                hessian if cross is None else cross,
                sum_x,
                sum_x if sum_target is None else sum_target,
                part.shape[0],
                columns,
                count,
                part.shape[1],
                part_targets.shape[1],
                part.stride(0),
                part_targets.stride(0),
                h_tiles,
                EXACT=exact,
                WEIGHTED=weighted,
                INTERPRETED=interpreted(),
                TILE=TILE,
                **(WIDE if exact else NARROW),
            )
