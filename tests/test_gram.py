"""The Triton form of accumulate against float64, in the interpreter or on a GPU."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from close import assert_close, product_bound
from conftest import PTX_ARCH
from forms import CUT_OFF, DTYPES, check_accumulate, cut_off_sums, seeded
from torch import Tensor

from epmq import ops, reference
from epmq.statistics import ROUNDING

pytest.importorskip("triton", reason="Triton is not installed")
gram = pytest.importorskip("epmq.kernels.gram")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from epmq.kernels.gram import Plan  # noqa: E402
from epmq.kernels.gram_programs import gram_kernel, tile_at  # noqa: E402


@triton.jit(do_not_specialize=["first", "h_tiles", "cross_tiles"])
def list_tiles(found, first, h_tiles, cross_tiles, RATIO: tl.constexpr, BAND: tl.constexpr):
    place = found + 3 * tl.program_id(0)
    row, column, cross = tile_at(first + tl.program_id(0), h_tiles, cross_tiles, RATIO, BAND)
    tl.store(place, row)
    tl.store(place + 1, column)
    tl.store(place + 2, cross.to(tl.int32))


def listed(device: torch.device, first: int, count: int, *sizes: int) -> list[tuple[int, int, bool]]:
    found = torch.full((count, 3), -1, dtype=torch.int32, device=device)
    list_tiles[(count,)](found, first, *sizes)
    return [(row, column, bool(cross)) for row, column, cross in found.tolist()]


@dataclass(frozen=True)
class Form:
    """The kernel as an entry of the table."""

    function: Any = gram.accumulate
    backend: str = "triton"


def row_weights(kind: str, count: int) -> Tensor | None:
    if kind == "ones":
        return None
    kept = (torch.arange(count) % 3 != 1).float()
    return kept if kind == "mask" else kept * torch.linspace(0.5, 2.0, count)


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", ["ones", "mask", "weighted"])
@pytest.mark.parametrize(
    "shape", [(150, 64, 40), (1, 24, 8), (0, 16, 8), (97, 100, None), (70, 129, 131), (65, 33, 5), (5, 1, 1)], ids=str
)
def test_both_moments(device: torch.device, shape: tuple[int, int, int | None], kind: str, dtype: torch.dtype) -> None:
    count, columns, targets = shape
    x = seeded(count, columns).to(dtype)
    target = None if targets is None else seeded(count, targets).to(dtype)
    check_accumulate(Form(), x, target, row_weights(kind, count))


def test_strided_rows_and_columns(device: torch.device) -> None:
    base = seeded(90, 200)
    check_accumulate(Form(), base[::2, 10:70], base[::2, 100:150], None)
    check_accumulate(Form(), base.T[:100, ::3], None, None)
    narrow = base.half()
    check_accumulate(Form(), narrow[:, 16:64], narrow[:, 3:20], None)
    # What a single row says of the next one may be anything.
    check_accumulate(Form(), narrow[:1, :32].as_strided((1, 32), (2**33, 1)), narrow[:1, :16].clone(), None)


def test_masked_rows_may_hold_anything(device: torch.device) -> None:
    x = seeded(40, 30)
    rows = torch.ones(40)
    rows[7] = rows[31] = 0
    x[7], x[31, 3] = float("nan"), float("inf")
    for dtype in DTYPES.values():
        check_accumulate(Form(), x.to(dtype), x[:, :10].to(dtype), rows)
    check_accumulate(Form(), x, x[:, :10].clone(), torch.zeros(40))


def test_denormals_and_non_finite_numbers(device: torch.device) -> None:
    check_accumulate(Form(), torch.full((9, 20), 1e-41), None, None)
    x = seeded(20, 10)
    x[3, 2], x[5, 4] = float("inf"), float("nan")
    check_accumulate(Form(), x, None, None)


def test_rows_and_targets_of_different_dtypes(device: torch.device) -> None:
    check_accumulate(Form(), seeded(20, 24).half(), seeded(20, 9), None)


PLANS = [
    Plan(128, 8192),
    Plan(128, 64),
    Plan(256, 8192),
    Plan(256, 96),
    Plan(128, 8192, 1, 64),
    Plan(128, 96, 1, 16, band=1),
    Plan(256, 64, 2, 16, band=2),
]


@pytest.mark.sampled
@pytest.mark.parametrize("chosen", PLANS, ids=str)
@pytest.mark.parametrize("shape", [(150, 64, 40), (200, 300, 130), (100, 129, None), (70, 257, 1)], ids=str)
def test_any_plan_gives_the_moments(device: torch.device, shape: tuple[int, int, int | None], chosen: Plan) -> None:
    """Tiles of either width; parts of the rows that are no multiple of what a program reads at a time; pieces."""
    count, columns, targets = shape
    target = None if targets is None else seeded(count, targets).bfloat16()
    check_accumulate(Form(partial(gram.accumulate, chosen=chosen)), seeded(count, columns).bfloat16(), target, None)


def test_the_last_tile_of_a_result_with_more_than_two_billion_entries(device: torch.device) -> None:
    """One program, told to be the last one; the memory of the others is never touched."""
    columns, count = 47104, 64
    tiles = gram.tile_count(columns // 128, 0, 1)
    turns = torch.zeros(tiles + 1, dtype=torch.int32, device=device)
    turns[tiles] = tiles - 1
    x = torch.zeros(count, columns, dtype=torch.float16, device=device)
    x[:, -128:] = seeded(count, 128).half()
    hessian, sum_x = torch.empty(columns, columns, device=device), torch.zeros(columns, device=device)
    hessian[-128:, -128:] = 1.0
    gram_kernel[(1,)](
        x, x, sum_x, hessian, hessian, sum_x, sum_x, turns, count, columns, 0, columns, columns, columns, columns,
        columns // 128, tiles, count, tiles, 1, 0, EXACT=False, WEIGHTED=False, ORDERED=True,
        INTERPRETED=gram.interpreted(), TILE=128, ACROSS=128, BAND=gram.BAND, **gram.NARROW,
    )  # fmt: skip
    wide = x[:, -128:].cpu().double()
    exact, size = wide.T @ wide + 1, wide.abs().T @ wide.abs() + 1
    assert_close(hessian[-128:, -128:].cpu(), exact, product_bound(size, count + 1), "H")


@pytest.mark.parametrize("kind", ["ones", "weighted"])
def test_parts_of_the_rows(device: torch.device, kind: str) -> None:
    form = Form(partial(gram.accumulate, chosen=Plan(128, 40)))
    for dtype in DTYPES.values():
        check_accumulate(form, seeded(150, 140).to(dtype), seeded(150, 9).to(dtype), row_weights(kind, 150))


def test_plans_keep_the_multiprocessors_busy() -> None:
    fp32, fp16, bf16 = DTYPES.values()
    # 96.7 waves: a last one that is nearly full stays whole.
    assert gram.plan(90, 132, 32768, 14336, 0, bf16) == Plan(256, 8192)
    # 8 waves and 32 parts of tiles for 132 multiprocessors: four pieces each.
    assert gram.plan(90, 132, 32768, 4096, 0, bf16) == Plan(256, 8192, 32, 2048)
    # 151 waves and 4 parts: as many pieces as are worth the adding, one after the other.
    assert gram.plan(90, 132, 32768, 14336, 4096, bf16) == Plan(256, 8192, 4, 2048)
    assert gram.plan(90, 132, 32768, 384, 0, bf16) == Plan(128, 4096)  # 32 parts would wait for each other
    assert gram.plan(90, 132, 100, 384, 0, bf16).across == 128
    assert gram.plan(80, 108, 32768, 14336, 0, bf16).across == gram.plan(90, 132, 32768, 14336, 0, fp32).across == 128
    for arch, processors in ((80, 108), (90, 132), (90, 4)):
        for rows, columns, targets in [
            (32768, 4096, 4096),
            (1, 1, 0),
            (8192, 768, 5),
            (10**6, 128, 0),
            (9000, 2048, 0),
        ]:
            for dtype in (fp32, fp16, bf16):
                plan = gram.plan(arch, processors, rows, columns, targets, dtype)
                assert 512 <= plan.rows <= gram.most_rows(arch, dtype) and plan.across in (128, 256)
                tiles = gram.tile_count(-(-columns // 128), -(-targets // 128), plan.across // 128)
                assert plan.cut <= tiles
                last = rows - (-(-rows // plan.rows) - 1) * plan.rows
                assert plan.cut == 0 or plan.cut * -(-last // plan.piece) <= processors
                assert plan.cut == 0 or (512 <= plan.piece < last and plan.piece % 64 == 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_parts_are_short_enough_to_tell_a_variance(arch: int, dtype: torch.dtype) -> None:
    """What tensor cores cut off a part's sum of squares stays below what statistics take for rounding."""
    rows = gram.most_rows(arch, dtype)
    x = (30 + 0.3 * seeded(rows, 40)).to(dtype).double()
    exact = x.square().sum(0)
    error = (cut_off_sums(x, x, *CUT_OFF[arch], pairs=False) - exact).abs().max() / exact.max()
    print(f"{error / ROUNDING:.2f} of what is allowed")
    assert error < ROUNDING


def test_two_runs_have_the_same_bits(device: torch.device) -> None:
    x = seeded(100, 140).half().to(device)
    found = []
    for _ in range(2):
        sums = [torch.zeros(140, 140, device=device), torch.zeros(140, device=device)]
        gram.accumulate(x, *sums, chosen=Plan(128, 64, 2, 16))
        found.append(sums)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def tiles_in_order(h_tiles: int, cross_tiles: int, ratio: int, band: int) -> list[tuple[int, int, bool]]:
    """Bands of rows, each column by column: those of the triangle, then those of the cross-covariance."""
    across = -(-h_tiles // ratio)
    found = []
    for cross, height in ((False, h_tiles), (True, cross_tiles)):
        for first in range(0, height, band):
            rows = range(first, min(first + band, height))
            found += [(r, c, cross) for c in range(across) for r in rows if cross or c <= r // ratio]
    return found


@pytest.mark.parametrize("ratio, band", [(1, 1), (1, 4), (1, 16), (2, 2), (2, 8), (2, 16)])
@pytest.mark.parametrize(
    "h_tiles, cross_tiles", [(1, 0), (1, 3), (2, 1), (3, 17), (7, 5), (8, 0), (15, 2), (16, 16), (17, 0), (33, 5)]
)
def test_tiles_cover_the_triangle_and_the_cross_covariance_once(
    device: torch.device, h_tiles: int, cross_tiles: int, ratio: int, band: int
) -> None:
    wanted = tiles_in_order(h_tiles, cross_tiles, ratio, band)
    every = {(row, column, False) for row in range(h_tiles) for column in range(row // ratio + 1)}
    every |= {(row, column, True) for row in range(cross_tiles) for column in range(-(-h_tiles // ratio))}
    assert len(wanted) == len(every) == gram.tile_count(h_tiles, cross_tiles, ratio) and set(wanted) == every
    # The interpreter takes a minute for some hundred tiles: there some are looked at, all of them as PTX and on a GPU.
    count = len(wanted)
    step = count if device.type == "cuda" or PTX_ARCH else min(12, count)
    for first in sorted({0, (count - step) // 2, count - step}):
        assert listed(device, first, step, h_tiles, cross_tiles, ratio, band) == wanted[first : first + step]


@pytest.mark.parametrize("ratio", [1, 2])
def test_the_last_tiles_of_the_largest_triangle(device: torch.device, ratio: int) -> None:
    """K = 131,072, and as many targets."""
    wanted = tiles_in_order(1024, 1024, ratio, gram.BAND)
    ends = gram.tile_count(1024, 0, ratio)
    for first in (ends - 3, len(wanted) - 3):
        assert listed(device, first, 3, 1024, 1024, ratio, gram.BAND) == wanted[first : first + 3]


def test_the_table_takes_the_kernel_on_a_gpu_or_when_asked(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    x = seeded(20, 30).half().to(device)
    hessian, sum_x = torch.zeros(30, 30, device=device), torch.zeros(30, device=device)
    if device.type == "cpu":
        assert ops.choose("accumulate", x, hessian, sum_x).backend != "triton"
    monkeypatch.setenv("EPMQ_BACKEND", "triton")
    assert ops.choose("accumulate", x, hessian, sum_x).backend == "triton"
    ops.accumulate(x, hessian, sum_x)
    wide = x.cpu().double()
    exact, size = wide.T @ wide, wide.abs().T @ wide.abs()
    assert_close(reference.symmetrize(hessian).cpu(), exact, product_bound(size, len(x)), "H")
    assert ops.choose("accumulate", x, hessian.double(), sum_x.double()).backend == "reference"


def test_random_problems(random_seeds: range, device: torch.device) -> None:
    """Any sizes, dtype, weights and strides."""
    for seed in random_seeds:
        draw = random.Random(seed)
        count, columns, targets = draw.randint(0, 90), draw.randint(1, 50), draw.randint(0, 40)
        dtype, kind = draw.choice(list(DTYPES.values())), draw.choice(["ones", "mask", "weighted"])
        first = draw.randint(0, 5)
        print(f"problem {seed}: {count} x {columns}, {targets} targets, {dtype}, {kind}, from column {first}")
        x = seeded(count, columns + first).to(dtype)[:, first:]
        target = None if targets == 0 else seeded(count, targets).to(dtype)
        check_accumulate(Form(), x, target, row_weights(kind, count))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_many_rows_of_real_width_on_a_gpu(dtype: torch.dtype) -> None:
    check_accumulate(Form(), seeded(20000, 384).to(dtype), seeded(20000, 200).to(dtype), None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_wide_tiles_and_a_cut_last_wave_on_a_gpu() -> None:
    """42 tiles in two parts, the last twenty of them in four pieces each."""
    form = Form(partial(gram.accumulate, chosen=Plan(256, 8192, 20, 2048)))
    check_accumulate(form, seeded(16384, 1536).to(torch.bfloat16), None, None)
