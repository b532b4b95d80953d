"""The Triton programs behind :mod:`epmq.kernels.int4_matmul`: nibbles to 16-bit floats, product tiles, sums of parts.

Weights are the left operand (``yᵀ = W · xᵀ``): an int16 tile of :mod:`epmq.kernels.layout` has the shape and the width
of a 16-bit float operand, so the compiler reads it straight into the tensor core's register layout, and each nibble
plane of it is a ready slice of 32 columns. Nothing is shuffled and no dequantized weight goes through memory.

``ASM`` chooses how nibbles become floats: inline assembly (one ``lop3`` for two weights), or the same arithmetic on
integers, which Triton's interpreter can run. ``WIDE`` is for bf16 in the interpreter, which computes wrongly in it:
fp32 arithmetic, rounded to bf16 where the other form rounds.
"""

from __future__ import annotations

import triton
import triton.language as tl

# 16-bit floats whose last mantissa bits are a code: 1024 + c in fp16, 128 + c in bf16, both exact.
MAGIC_BITS = {"fp16": 0x6400, "bf16": 0x4300}


def nibble_assembly(kind: str, nibble: int) -> str:
    """PTX that makes two floats from nibble 0..3 of two int16 words; kind is ``fp16`` or ``bf16``.

    The floats are ``magic + code``; for the odd nibbles of fp16, which has the mantissa bits for it,
    ``magic + 16 · code``: nibble 1 is taken where it lies, nibble 3 shares its shift with nibble 2.
    """
    sixteenfold = kind == "fp16" and nibble % 2 == 1
    mask, shift = (0x00F000F0, 4 * (nibble - 1)) if sixteenfold else (0x000F000F, 4 * nibble)
    last = f"{mask:#010x}, {MAGIC_BITS[kind] * 0x10001:#010x}, 0xEA;"  # (word & mask) | magic
    if shift == 0:
        return f"lop3.b32 $0, $1, {last}"
    return f"{{ .reg .b32 t; shr.u32 t, $1, {shift}; lop3.b32 $0, t, {last} }}"


FP16_0, FP16_1, FP16_2, FP16_3 = (tl.constexpr(nibble_assembly("fp16", i)) for i in range(4))
BF16_0, BF16_1, BF16_2, BF16_3 = (tl.constexpr(nibble_assembly("bf16", i)) for i in range(4))
FP16_MAGIC, BF16_MAGIC = tl.constexpr(MAGIC_BITS["fp16"]), tl.constexpr(MAGIC_BITS["bf16"])


@triton.jit
def lop3_fp16(words, text: tl.constexpr):
    """fp16 of one nibble of int16 words, see :func:`nibble_assembly`."""
    return tl.inline_asm_elementwise(text, "=r,r", [words], tl.float16, is_pure=True, pack=2)


@triton.jit
def lop3_bf16(words, text: tl.constexpr):
    """bf16 of one nibble of int16 words, see :func:`nibble_assembly`."""
    return tl.inline_asm_elementwise(text, "=r,r", [words], tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def low_half(words, FP16: tl.constexpr):
    """The 16-bit float in the low half of int32 words."""
    bits = (words & 0xFFFF).to(tl.int16)
    return bits.to(tl.float16, bitcast=True) if FP16 else bits.to(tl.bfloat16, bitcast=True)


@triton.jit
def high_half(words, FP16: tl.constexpr):
    """The 16-bit float in the high half of int32 words."""
    bits = (words >> 16).to(tl.int16)
    return bits.to(tl.float16, bitcast=True) if FP16 else bits.to(tl.bfloat16, bitcast=True)


@triton.jit
def centred(words, scale_words, NIBBLE: tl.constexpr, FP16: tl.constexpr, ASM: tl.constexpr, WIDE: tl.constexpr):
    """``code - zero`` of one nibble of words [R, 32], exact in fp16 or bf16 (fp32 if WIDE); scale_words int32 [R]."""
    origin = high_half(scale_words, FP16)[:, None]
    if FP16:
        if ASM:
            if NIBBLE == 0:
                value = lop3_fp16(words, FP16_0)
            elif NIBBLE == 1:
                value = lop3_fp16(words, FP16_1)
            elif NIBBLE == 2:
                value = lop3_fp16(words, FP16_2)
            else:
                value = lop3_fp16(words, FP16_3)
        elif NIBBLE % 2 == 1:
            value = (((words >> (4 * NIBBLE - 4)) & 0xF0) | FP16_MAGIC).to(tl.int16).to(tl.float16, bitcast=True)
        else:
            value = (((words >> (4 * NIBBLE)) & 0xF) | FP16_MAGIC).to(tl.int16).to(tl.float16, bitcast=True)
        if NIBBLE % 2 == 1:
            # (1024 + 16 c) / 16 - (64 + z), with 1024 + z at hand.
            return tl.fma(value, tl.full(value.shape, 0.0625, tl.float16), (960.0 - origin).to(tl.float16))
        return value - origin
    if ASM:
        if NIBBLE == 0:
            value = lop3_bf16(words, BF16_0)
        elif NIBBLE == 1:
            value = lop3_bf16(words, BF16_1)
        elif NIBBLE == 2:
            value = lop3_bf16(words, BF16_2)
        else:
            value = lop3_bf16(words, BF16_3)
    else:
        value = (((words >> (4 * NIBBLE)) & 0xF) | BF16_MAGIC).to(tl.int16).to(tl.bfloat16, bitcast=True)
    if WIDE:
        return value.to(tl.float32) - origin.to(tl.float32)
    return value - origin


@triton.jit
def nearest_bf16(value):
    """fp32 rounded to the nearest bf16, ties to even, still fp32: the interpreter's own conversion cuts off."""
    bits = value.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def scaled(whole, scale_words, FP16: tl.constexpr, WIDE: tl.constexpr):
    """``(code - zero) · scale``, rounded once to 16 bits; WIDE keeps the rounded numbers in fp32."""
    scale = low_half(scale_words, FP16)[:, None]
    if WIDE:
        return nearest_bf16(whole * scale.to(tl.float32))
    return whole * scale


@triton.jit
def plane(
    words,
    scale_words,
    NIBBLE: tl.constexpr,
    SCALED: tl.constexpr,
    FP16: tl.constexpr,
    ASM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The operand of one nibble: the weight in 16 bits, or ``code - zero`` where sums are scaled."""
    whole = centred(words, scale_words, NIBBLE, FP16, ASM, WIDE)
    if SCALED:
        return scaled(whole, scale_words, FP16, WIDE)
    return whole


@triton.jit
def grid_places(rows, GROUP: tl.constexpr):
    """Where the grid words of rows lie from a step's first one: int32 [R], or [R, 128 / GROUP] for smaller groups."""
    if GROUP == 32 or GROUP == 64:
        return rows[:, None] * (128 // GROUP) + tl.arange(0, 128 // GROUP)[None, :]
    else:
        return rows


@triton.jit
def first_grid_word(scales, kb, NP, GROUP: tl.constexpr):
    """The address of the grid words of block kb of 128 columns. GROUP 0 is the whole row."""
    if GROUP == 0:
        return scales
    elif GROUP >= 128:
        return scales + (kb // (GROUP // 128)) * NP.to(tl.int64)
    else:
        return scales + kb * (128 // GROUP) * NP.to(tl.int64)


@triton.jit
def words_of_planes(grid, GROUP: tl.constexpr):
    """Four int32 [R], the grid words of nibbles 0 to 3, from what :func:`grid_places` points to."""
    if GROUP == 64:
        low, high = tl.split(grid)
        return low, low, high, high
    elif GROUP == 32:
        even, odd = tl.split(grid.reshape(grid.shape[0], 2, 2))
        s0, s2 = tl.split(even)
        s1, s3 = tl.split(odd)
        return s0, s1, s2, s3
    else:
        return grid, grid, grid, grid


@triton.jit(do_not_specialize=["M", "KB", "blocks_per_part"])
def product_tiles(
    x,
    words,
    scales,
    bias,
    out,
    sums,
    arrived,
    M,
    N,
    NP,
    KB,
    x_stride,
    blocks_per_part,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    LAST: tl.constexpr,
    BIAS: tl.constexpr,
    JOINED: tl.constexpr,
    SWIZZLE: tl.constexpr,
    EARLY: tl.constexpr,
    ASM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of ``y = x · Wᵀ`` [BM, BN] over one part of the columns.

    x: 16-bit [M, 128·KB], rows x_stride apart. words: int16 tiles of 64 rows by 32 words, [NP/64, KB, 64, 32].
    scales: int32 grid words, [groups, NP, 1], or [KB, NP, 128 / GROUP] for groups of 32 and 64. bias: [N] if BIAS.
    out: [M, N] in x's dtype. Grid: (tiles over N and M, parts). With SPLIT parts are written to sums, fp32
    [parts, M, N], of which :func:`sum_parts` makes out; with LAST the program of a tile that ends last does. arrived:
    with LAST int32 zeros, one for each tile, which it leaves as zeros. EARLY: the next launch may begin once all
    programs of this one have, and waits itself for their end.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    FP16: tl.constexpr = x.dtype.element_ty == tl.float16
    tiles_n = tl.cdiv(N, BN)
    tiles_m = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    part = tl.program_id(1)
    if SWIZZLE > 1:
        # Neighbours in time share weight tiles: SWIZZLE tiles of rows at a time meet every tile of tokens.
        span = SWIZZLE * tiles_m
        first_n = (pid // span) * SWIZZLE
        width = tl.minimum(tiles_n - first_n, SWIZZLE)
        pid_n = first_n + (pid % span) % width
        pid_m = (pid % span) // width
    else:
        pid_n = pid % tiles_n
        pid_m = pid // tiles_n
    # The last tile is moved back to end where the weight ends; what it shares with its neighbour it does not store.
    start_n = tl.minimum(pid_n * BN, NP - BN)
    start_n = tl.multiple_of(start_n, 64)
    rows = tl.arange(0, BN)
    inside = (rows // 64)[:, None] * (KB * 2048) + ((rows % 64) * 32)[:, None] + tl.arange(0, 32)[None, :]
    grid_inside = grid_places(rows, GROUP)
    first = part * blocks_per_part
    last = tl.minimum(first + blocks_per_part, KB)
    # Addresses are a moving start and fixed 32-bit places: moving every address costs two additions for each.
    w_start = words + ((start_n // 64).to(tl.int64) * KB + first) * 2048
    TOGETHER: tl.constexpr = 128 // GROUP if GROUP == 32 or GROUP == 64 else 1
    tile_grid = scales + start_n * TOGETHER
    grid_start = first_grid_word(tile_grid, first, NP, GROUP)
    # Tokens past the end read the last one's: loads need no mask, and what comes of them is not stored.
    start_m = pid_m * BM
    x_start = x + start_m.to(tl.int64) * x_stride + first * 128
    x_rows = tl.minimum(tl.arange(0, BM), M - 1 - start_m) * x_stride
    # Few tokens: scaling a sum of 128 columns takes fewer instructions than scaling its weights. With fewer rows Triton
    # would load scales a second time, and wait for them.
    SUMMED: tl.constexpr = GROUP >= 128 and BM <= 32 and BN >= 128
    SCALED: tl.constexpr = GROUP > 0 and not SUMMED
    acc = tl.zeros((BN, BM), tl.float32)
    if GROUP == 0:
        grid = tl.load(grid_start + grid_inside)
    for kb in range(first, last):
        w = tl.load(w_start + inside)
        if GROUP > 128:
            grid_start = first_grid_word(tile_grid, kb, NP, GROUP)
        if GROUP > 0:
            grid = tl.load(grid_start + grid_inside)
        s0, s1, s2, s3 = words_of_planes(grid, GROUP)
        total = tl.zeros((BN, BM), tl.float32) if SUMMED else acc
        if JOINED:
            xt = tl.load(x_start + x_rows[None, :] + tl.arange(0, 128)[:, None])
            even = tl.join(plane(w, s0, 0, SCALED, FP16, ASM, WIDE), plane(w, s2, 2, SCALED, FP16, ASM, WIDE))
            odd = tl.join(plane(w, s1, 1, SCALED, FP16, ASM, WIDE), plane(w, s3, 3, SCALED, FP16, ASM, WIDE))
            weight = tl.join(even, odd).permute(0, 2, 3, 1).reshape(BN, 128)
            if WIDE:
                xt = xt.to(tl.float32)
            total = tl.dot(weight, xt, total)
        else:
            k32 = tl.arange(0, 32)[:, None]
            x0 = tl.load(x_start + x_rows[None, :] + k32)
            x1 = tl.load(x_start + x_rows[None, :] + (k32 + 32))
            x2 = tl.load(x_start + x_rows[None, :] + (k32 + 64))
            x3 = tl.load(x_start + x_rows[None, :] + (k32 + 96))
            if WIDE:
                x0, x1, x2, x3 = x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)
            total = tl.dot(plane(w, s0, 0, SCALED, FP16, ASM, WIDE), x0, total)
            total = tl.dot(plane(w, s1, 1, SCALED, FP16, ASM, WIDE), x1, total)
            total = tl.dot(plane(w, s2, 2, SCALED, FP16, ASM, WIDE), x2, total)
            total = tl.dot(plane(w, s3, 3, SCALED, FP16, ASM, WIDE), x3, total)
        if JOINED and ASM:
            # No instruction: ties the sum to this iteration, without which ptxas runs wgmma one at a time.
            total = tl.inline_asm_elementwise("", "=f,0", [total], tl.float32, is_pure=True, pack=1)
        if SUMMED:
            scale = low_half(s0, FP16).to(tl.float32)[:, None]
            acc = tl.fma(total, tl.broadcast_to(scale, (BN, BM)), acc)
        else:
            acc = total
        w_start += 2048
        x_start += 128
        if GROUP == 128 or TOGETHER > 1:
            grid_start += TOGETHER * NP
    if GROUP == 0:
        acc *= low_half(grid, FP16).to(tl.float32)[:, None]
    columns = start_n + rows
    own = (columns >= pid_n * BN) & (columns < N)
    if BIAS and not SPLIT:
        acc += tl.load(bias + columns, mask=own, other=0.0).to(tl.float32)[:, None]
    y = tl.trans(acc)
    tokens = start_m + tl.arange(0, BM)
    places = tokens.to(tl.int64)[:, None] * N + columns[None, :]
    keep = (tokens < M)[:, None] & own[None, :]
    if WIDE and not SPLIT:
        y = nearest_bf16(y)
    if SPLIT:
        tl.store(sums + part.to(tl.int64) * M * N + places, y, mask=keep)
    else:
        tl.store(out + places, y.to(out.dtype.element_ty), mask=keep)
    if LAST:
        # The barrier puts all threads' stores before the release, and their loads after the acquire.
        tl.debug_barrier()
        before = tl.atomic_add(arrived + pid, 1, sem="acq_rel")
        if before == tl.num_programs(1) - 1:
            tl.store(arrived + pid, 0)
            sum_tile(sums, bias, out, M, N, start_m, columns, own, BM, BN, BIAS, WIDE)


@triton.jit
def sum_tile(
    sums,
    bias,
    out,
    M,
    N,
    start_m,
    columns,
    own,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BIAS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of out as :func:`sum_parts` makes it. own: which of the columns [BN] are this tile's."""
    # 16 floats a thread at a time, four parts of them under way together.
    STRIP: tl.constexpr = min(BM, 2048 // BN)
    size = M.to(tl.int64) * N
    parts = tl.num_programs(1)
    if BIAS:
        offset = tl.load(bias + columns, mask=own, other=0.0).to(tl.float32)[None, :]
    for first in range(start_m, start_m + BM, STRIP):
        tokens = first + tl.arange(0, STRIP)
        places = tokens.to(tl.int64)[:, None] * N + columns[None, :]
        keep = (tokens < M)[:, None] & own[None, :]
        total = tl.zeros((STRIP, BN), tl.float32)
        for part in range(0, parts, 4):
            for ahead in tl.static_range(4):
                there = tokens < tl.where(part + ahead < parts, M, 0)
                at = sums + (part + ahead) * size + places
                total += tl.load(at, mask=there[:, None] & own[None, :], other=0.0)
        if BIAS:
            total += offset
        if WIDE:
            total = nearest_bf16(total)
        tl.store(out + places, total.to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["M"])
def sum_parts(
    parts,
    bias,
    out,
    M,
    N,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    EARLY: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [M, N] = Σ over parts [SPLITS, M, N] in order, plus bias [N], rounded once.

    EARLY: launched while the programs that write the parts still run.
    """
    # What N is a multiple of, the size is too: that lets accesses be wide.
    count = M.to(tl.int64) * N
    start = tl.program_id(0).to(tl.int64) * BLOCK
    place = start + tl.arange(0, BLOCK)
    inside = place < count
    if EARLY:
        tl.extra.cuda.gdc_wait()
    total = tl.load(parts + place, mask=inside, other=0.0)
    for part in tl.static_range(1, SPLITS):
        total += tl.load(parts + part * count + place, mask=inside, other=0.0)
    if BIAS:
        column = ((start % N).to(tl.int32) + tl.arange(0, BLOCK)) % N
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if WIDE:
        total = nearest_bf16(total)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "KB"])
def dequantize_tiles(words, scales, out, N, NP, K, KB, GROUP: tl.constexpr, ASM: tl.constexpr, WIDE: tl.constexpr):
    """out [N, K]: the weight in its 16-bit dtype, one tile of 64 rows by 128 columns per program."""
    FP16: tl.constexpr = out.dtype.element_ty == tl.float16
    kb = tl.program_id(0)
    tile = tl.program_id(1)
    rows = tl.arange(0, 64)
    j = tl.arange(0, 32)
    w = tl.load(words + (tile.to(tl.int64) * KB + kb) * 2048 + rows[:, None] * 32 + j[None, :])
    n = tile * 64 + rows
    base = out + n.to(tl.int64)[:, None] * K
    grid = tl.load(first_grid_word(scales, kb, NP, GROUP) + grid_places(n, GROUP))
    grids = words_of_planes(grid, GROUP)
    for i in tl.static_range(4):
        k = kb * 128 + i * 32 + j
        value = scaled(centred(w, grids[i], i, FP16, ASM, WIDE), grids[i], FP16, WIDE)
        tl.store(base + k[None, :], value.to(out.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])
