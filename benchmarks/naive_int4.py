"""The int4 product on the layout of GPTQ files, 8 neighbouring columns per int32: counted beside ours."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def naive_product(
    x,
    words,
    scales,
    origins,
    out,
    M,
    N,
    K,
    x_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """y = x · W with words int32 [K/8, N], scales fp16 [K/128, N], origins int8 [K/128, N]."""
    tokens = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, 128)
    x_ptrs = x + tl.minimum(tokens, M - 1)[:, None] * x_stride + k[None, :]
    w_ptrs = words + (k // 8)[:, None] * N + columns[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for kb in range(K // 128):
        a = tl.load(x_ptrs)
        code = (tl.load(w_ptrs) >> ((k % 8) * 4)[:, None]) & 0xF
        scale = tl.load(scales + kb * N + columns)
        origin = tl.load(origins + kb * N + columns)
        weight = (code - origin[None, :]).to(tl.float16) * scale[None, :]
        acc = tl.dot(a, weight, acc)
        x_ptrs += 128
        w_ptrs += 16 * N
    tl.store(out + tokens[:, None] * N + columns[None, :], acc.to(tl.float16), mask=(tokens < M)[:, None])
