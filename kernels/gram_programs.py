"""The Triton program of second moments: which tile of the result it computes, its products, and whose turn it is.

Operands are [rows, columns] as they lie in memory, both read transposed: on sm_90 wgmma takes them from shared memory
like that. Column sums come from the programs that hold the columns anyway, on tensor cores as a product with ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

SUMS = tl.constexpr(16)  # columns of the product that gives column sums: the fewest that tl.dot takes


@triton.jit
def triangle_tiles(rows, RATIO: tl.constexpr):
    """Tiles of a triangle of so many rows of tiles, of which row r has ``r // RATIO + 1``."""
    whole = rows // RATIO
    return RATIO * (whole * (whole + 1) // 2) + rows % RATIO * (whole + 1)


@triton.jit
def tile_at(index, h_tiles, cross_tiles, RATIO: tl.constexpr, BAND: tl.constexpr):
    """(tile row, tile column, is cross): the triangle of H, then all of C, each in bands of BAND rows of tiles.

    Within a band column by column, so that programs that run at a time read few columns of X between them, which the
    second-level cache can hold. h_tiles, cross_tiles: rows of tiles of H and of C. RATIO: a tile's columns over its
    rows, 1 or 2, which divides BAND.
    """
    across = tl.cdiv(h_tiles, RATIO)
    triangle = triangle_tiles(h_tiles, RATIO)
    cross = index >= triangle
    if cross:
        inside = index - triangle
        first = inside // (BAND * across) * BAND
        inside = inside % (BAND * across)
        height = tl.minimum(cross_tiles - first, BAND)
        row = first + inside % height
        column = inside // height
    else:
        inside = index
        first = index * 0
        height = tl.minimum(h_tiles, BAND)
        size = triangle_tiles(height, RATIO)
        while inside >= size:
            inside -= size
            first += BAND
            height = tl.minimum(h_tiles - first, BAND)
            size = first // RATIO * height + triangle_tiles(height, RATIO)
        # Columns left of the band's own triangle are whole; those of the triangle begin RATIO rows later each.
        whole = first // RATIO
        row = first + inside % height
        column = inside // height
        if column >= whole:
            inside -= whole * height
            left = height
            while inside >= left:
                inside -= left
                left -= RATIO
            row = first + height - left + inside
            column = whole + (height - left) // RATIO
    return row, column, cross


@triton.jit
def products(
    left_at,
    right_at,
    left_step,
    right_step,
    left_inside,
    right_inside,
    row_weights,
    first,
    last,
    SUMMED: tl.constexpr,  # also the column sums of the left operand
    EXACT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TILE: tl.constexpr,
    ACROSS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """(sums [TILE, ACROSS], column sums of left [TILE], zeros if not SUMMED) over rows first to last."""
    row = tl.arange(0, DEPTH)[:, None]
    sums = tl.zeros((TILE, ACROSS), tl.float32)
    # Operands of tensor cores stay in shared memory: their sums are one more product. Others are in registers.
    BY_PRODUCT: tl.constexpr = not EXACT
    partial = tl.zeros((TILE, SUMS) if BY_PRODUCT else (DEPTH, TILE), tl.float32)
    for start in range(first, last, DEPTH):
        there = row < last - start
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
def add_sums(out, sums, first_left, first_right, left_columns, columns, TILE: tl.constexpr):
    """out [left_columns, columns] += sums [TILE, TILE] from this row and column on."""
    row, column = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    # A start of 64 bits, and places in the tile of 32: H has more than 2^31 entries from 46341 columns on.
    places = out + first_left.to(tl.int64) * columns + first_right + (row * columns + column)
    inside = (row < left_columns - first_left) & (column < columns - first_right)
    tl.store(places, tl.load(places, mask=inside, other=0.0) + sums, mask=inside)


@triton.jit(do_not_specialize=["rows", "h_tiles", "tiles", "rows_per_part", "whole", "cut", "rows_per_piece"])
def gram_kernel(
    x,  # [M, K], rows x_stride apart
    target,  # [M, P], rows target_stride apart, of x's dtype
    row_weights,  # fp32 [M], read when WEIGHTED
    hessian,  # fp32 [columns, columns]
    cross,  # fp32 [P, columns]
    sum_x,  # fp32 [columns]
    sum_target,  # fp32 [P]
    turns,  # int32 [tiles + 1] of zeros, used when ORDERED: parts of a tile that are done, and programs begun
    rows,  # M
    columns,  # K
    targets,  # P
    x_width,  # readable columns of x: K, or K and the zeros after it
    target_width,
    x_stride,
    target_stride,
    h_tiles,
    tiles,
    rows_per_part,
    whole,  # parts of tiles that are not cut: all but the last
    cut,  # how many come after them, 1 where none
    rows_per_piece,
    EXACT: tl.constexpr,  # fp32 multiply-adds
    WEIGHTED: tl.constexpr,  # rows are multiplied by their weights, which EXACT allows
    ORDERED: tl.constexpr,  # several parts of the rows are added one after the other
    INTERPRETED: tl.constexpr,  # the interpreter cannot multiply bf16
    TILE: tl.constexpr,
    ACROSS: tl.constexpr,  # columns of a tile, TILE or twice as many
    BAND: tl.constexpr,  # rows of tiles that are taken together
    DEPTH: tl.constexpr,
):
    """One tile of H or C over one part of the rows, or a piece of that. Grid: tiles times parts, the last ``cut`` as
    often as they have pieces."""
    index = tl.program_id(0)
    if ORDERED:
        # Programs begin in the order of their numbers, so that whom one waits for has begun.
        index = tl.atomic_add(turns + tiles, 1, sem="relaxed")
    beyond = tl.maximum(index - whole, 0)
    piece = beyond // cut
    item = tl.minimum(index, whole) + beyond % cut
    part = item // tiles
    tile = item % tiles
    tile_row, tile_column, is_cross = tile_at(tile, h_tiles, tl.cdiv(targets, TILE), ACROSS // TILE, BAND)
    left = x
    left_stride = x_stride
    left_width = x_width
    out = hessian
    out_sums = sum_x
    left_columns = columns
    # Which tiles owe the column sums of their left operand: H's diagonal, and the first column of tiles of C.
    owes = tile_row // (ACROSS // TILE) == tile_column
    if is_cross:
        left = target
        left_stride = target_stride
        left_width = target_width
        out = cross
        out_sums = sum_target
        left_columns = targets
        owes = tile_column == 0
    of_left = tile_row * TILE + tl.arange(0, TILE)
    of_right = tile_column * ACROSS + tl.arange(0, ACROSS)
    first = part * rows_per_part + piece * rows_per_piece
    last = tl.minimum(first + tl.where(index < whole, rows_per_part, rows_per_piece), rows)
    # Whole matrices of addresses, advanced by addition: vectors of rows would change layout in every pass.
    row = tl.arange(0, DEPTH)[:, None]
    left_at = left + first.to(tl.int64) * left_stride + row * left_stride + of_left[None, :]
    right_at = x + first.to(tl.int64) * x_stride + row * x_stride + of_right[None, :]
    left_inside = (row >= 0) & (of_left < left_width)[None, :]
    right_inside = (row >= 0) & (of_right < x_width)[None, :]
    left_step = DEPTH * left_stride
    right_step = DEPTH * x_stride
    if owes:
        sums, column_sums = products(
            left_at, right_at, left_step, right_step, left_inside, right_inside, row_weights, first, last,
            True, EXACT, WEIGHTED, INTERPRETED, TILE, ACROSS, DEPTH,
        )  # fmt: skip
    else:
        sums, column_sums = products(
            left_at, right_at, left_step, right_step, left_inside, right_inside, row_weights, first, last,
            False, EXACT, WEIGHTED, INTERPRETED, TILE, ACROSS, DEPTH,
        )  # fmt: skip
    if ORDERED:
        while tl.atomic_add(turns + tile, 0, sem="acquire") != part + piece:
            pass
    if owes:
        places = out_sums + of_left
        total = tl.load(places, mask=of_left < left_columns, other=0.0) + column_sums
        tl.store(places, total, mask=of_left < left_columns)
    if ACROSS == TILE:
        add_sums(out, sums, tile_row * TILE, tile_column * ACROSS, left_columns, columns, TILE)
    else:
        # In halves: the addresses of a whole wide tile and what lies there do not fit beside its sums in registers.
        low, high = tl.split(sums.reshape(TILE, 2, TILE).permute(0, 2, 1))
        half = tile_column * ACROSS
        add_sums(out, low, tile_row * TILE, half, left_columns, columns, TILE)
        add_sums(out, high, tile_row * TILE, half + TILE, left_columns, columns, TILE)
    if ORDERED:
        tl.debug_barrier()
        tl.atomic_add(turns + tile, 1, sem="release")
