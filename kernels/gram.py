"""Second moments of a batch on a GPU: the lower triangle of H = XᵀX and all of the cross-covariance in one launch.

The form ``triton`` of :func:`epmq.reference.accumulate`. A program computes one tile of output over one part of the
rows; the parts of a tile are added to the running sum in their order, so the same call gives the same bits each time.
The gain over two matrix products is the symmetry, half of H is never computed; reading X once gains next to nothing,
the work is bound by arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from epmq.kernels.gram_programs import gram_kernel
from epmq.kernels.launch import interpreted, on_device, readable, row_stride
from epmq.kernels.tune import device_facts, has_wgmma
from epmq.rows import kept_rows

TILE = 128
LINE = 16  # columns that are read together
# Fusion is named because Triton's default for it changes in 3.10. More depth for fp32, or four warps, spills.
NARROW = {"DEPTH": 64, "num_warps": 8, "num_stages": 4, "enable_fp_fusion": True}  # fp16 and bf16, on the tensor cores
# fp32 multiply-adds. Left alone, ptxas takes 128 registers at times, and spills.
WIDE = {"DEPTH": 16, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": True, "maxnreg": 168}
# Reckoned, not measured. What it costs to add a square tile to the result, in rows of products; and a tile of 256
# columns against one of 128: twice the products from 3/4 of the bytes, which are the limit.
ADDING = 512
TWICE = 1.6
# Rows of tiles that are taken together, column by column: with 132 programs of 128 x 256 about as tall as wide.
BAND = 16
LEAST_ROWS, STEP = 512, 64  # of a part or piece: at least so many; a multiple of what a program reads at a time


@dataclass(frozen=True)
class Plan:
    """How a launch is cut: the columns of a tile (its rows are TILE), and the rows of X that a program takes.

    The last ``cut`` parts of tiles, at most one a tile, are cut again, into pieces of ``piece`` rows. band: rows of
    tiles that are taken together, a multiple of ``across // TILE``.
    """

    across: int
    rows: int
    cut: int = 0
    piece: int = 0
    band: int = BAND


def most_rows(arch: int, dtype: torch.dtype) -> int:
    """Rows that a sum in registers covers at most; dtype: fp32 where its multiply-adds are used.

    Long sums of squares drift, and what they drift passes for a variance (``ROUNDING`` of epmq/statistics.py). The
    total is therefore carried in the fp32 result. Tensor cores cut off what they add, 16 rows at a time, sm_80 a bit
    before sm_90 does; squares of fp16 have six bits more than those of bf16 to lose.
    """
    if dtype == torch.float32:
        return 1024
    return (4096 if dtype == torch.float16 else 8192) >> (0 if has_wgmma(arch) else 1)


def tile_count(h_tiles: int, cross_tiles: int, ratio: int) -> int:
    """Tiles of H's triangle and of C, of TILE rows by ``ratio`` times TILE columns."""
    whole, rest = divmod(h_tiles, ratio)
    triangle = ratio * whole * (whole + 1) // 2 + rest * (whole + 1)
    return triangle + cross_tiles * -(-h_tiles // ratio)


@functools.lru_cache(maxsize=4096)
def plan(arch: int, processors: int, rows: int, columns: int, targets: int, dtype: torch.dtype) -> Plan:
    """The plan that keeps the multiprocessors busiest: few waves of programs, a short last one, tiles that reuse what
    they read. dtype: as for :func:`most_rows`."""
    tiles, crossed = -(-columns // TILE), -(-targets // TILE)
    shapes = [TILE, 2 * TILE] if has_wgmma(arch) and dtype != torch.float32 and tiles > 1 else [TILE]

    def plans(across: int, most: int) -> Iterator[tuple[float, Plan]]:
        """What each way to cut the last wave costs, in rows of a square tile."""
        count, parts = tile_count(tiles, crossed, across // TILE), -(-rows // most)
        row, adding = TWICE if across > TILE else 1.0, ADDING * (across // TILE)
        waves, left = divmod(count * parts, processors)
        full = waves * (min(most, rows) * row + adding)
        # What is left belongs to the last part, if there is no more of it than there are tiles.
        last = rows - (parts - 1) * most if left <= count else min(most, rows)
        # Parts of a tile, and pieces, are added one after the other.
        least = min(most, rows) * row + parts * adding
        yield max(least, full + (last * row + adding if left else 0)), Plan(across, most)
        if 0 < left <= count:
            for pieces in range(2, processors // left + 1):
                piece = -(-last // (pieces * STEP)) * STEP
                if piece < LEAST_ROWS:
                    break
                yield max(least, full + piece * row + pieces * adding), Plan(across, most, left, piece)

    longest = most_rows(arch, dtype)
    cuts = [longest >> cut for cut in range(5) if longest >> cut >= LEAST_ROWS]
    found = (one for across in shapes for most in cuts for one in plans(across, most))
    return min(found, key=lambda one: one[0])[1]


def accumulate(
    x: Tensor,
    hessian: Tensor,
    sum_x: Tensor,
    target: Tensor | None = None,
    cross: Tensor | None = None,
    sum_target: Tensor | None = None,
    row_weights: Tensor | None = None,
    chosen: Plan | None = None,
) -> None:
    """See :func:`epmq.reference.accumulate`; contiguous fp32 sums.

    Rows of weight 0 are left out beforehand, which synchronises with the device. fp16 and bf16 rows go through the
    tensor cores when all that is left weighs 1; a product with another weight does not fit 16 bits, so those, and fp32
    rows, go through fp32 multiply-adds. chosen: in place of :func:`plan`'s.
    """
    crossed = target is not None and cross is not None and sum_target is not None
    if not crossed:
        target = None
    x, target, left = kept_rows(x, target, row_weights)
    weighted = left is not None
    (total, columns), count = x.shape, 0 if target is None else target.shape[1]
    if total == 0 or columns == 0:
        return
    if target is not None and target.dtype != x.dtype:
        x, target = x.float(), target.float()
    exact = weighted or x.dtype == torch.float32
    rows = readable(x, LINE)
    targets = rows if target is None else readable(target, LINE)
    how = chosen or plan(*device_facts(x.device), total, columns, count, torch.float32 if exact else x.dtype)
    h_tiles = -(-columns // TILE)
    tiles = tile_count(h_tiles, -(-count // TILE), how.across // TILE)
    parts = -(-total // how.rows)
    whole = tiles * parts - how.cut
    pieces = -(-(total - (parts - 1) * how.rows) // how.piece) if how.cut else 1
    ordered = parts > 1 or pieces > 1
    # What a program does not read may be anything.
    turns = torch.zeros(tiles + 1, dtype=torch.int32, device=x.device) if ordered else sum_x
    with on_device(x):
        gram_kernel[(whole + how.cut * pieces,)](
            rows,
            targets,
            sum_x if left is None else left,
            hessian,
            hessian if cross is None else cross,
            sum_x,
            sum_x if sum_target is None else sum_target,
            turns,
            total,
            columns,
            count,
            rows.shape[1],
            targets.shape[1],
            row_stride(rows),
            row_stride(targets),
            h_tiles,
            tiles,
            how.rows,
            whole,
            max(how.cut, 1),
            how.piece,
            EXACT=exact,
            WEIGHTED=weighted,
            ORDERED=ordered,
            INTERPRETED=interpreted(),
            TILE=TILE,
            ACROSS=how.across,
            BAND=how.band,
            **(WIDE if exact else NARROW),
        )
