"""Scalar arithmetic of PTX on arrays of bit patterns: every result rounded once, as IEEE 754 and the ISA say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Bits = Any  # NumPy arrays, or one number for all lanes: unsigned integers of a register's width, or bool

UNSIGNED = {1: np.dtype(bool), 8: np.dtype("u1"), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}
FLOATS = ("f16", "bf16", "f32", "f64")


def width_of(kind: str) -> int:
    """Bits of a type such as s32, bf16, f16x2 or pred."""
    if kind == "pred":
        return 1
    bits, _, count = kind.lstrip("bsuf").partition("x")
    return int(bits) * int(count or 1)


def narrow(bits: Bits, width: int) -> Bits:
    """The low ``width`` bits."""
    wanted = UNSIGNED[width]
    return bits if bits.dtype == wanted else bits.astype(wanted)


def number(bits: Bits, kind: str) -> Bits:
    """Bit patterns as numbers: integers in their dtype, f16 and bf16 as float64, f32 and f64 as they are."""
    bits = narrow(bits, width_of(kind))
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    if kind in ("f32", "f64"):
        return bits.view(np.float32 if kind == "f32" else np.float64)
    if kind[0] == "s":
        return bits.view(f"i{width_of(kind) // 8}")
    return bits


def pattern(value: Bits, kind: str) -> Bits:
    """Bit patterns of numbers; a float64 is rounded once, half to even."""
    if kind == "bf16":
        return bf16_bits(value)
    if kind in FLOATS:
        wanted = np.dtype(f"f{width_of(kind) // 8}")
        return np.ascontiguousarray(value.astype(wanted)).view(UNSIGNED[width_of(kind)])
    return value.astype(UNSIGNED[width_of(kind)])


def bf16_bits(value: Bits) -> Bits:
    """float64 or float32 to bf16, through fp32 rounded to odd: the second rounding is the only one that counts."""
    bits = odd_fp32(value.astype(np.float64)).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    quiet = bits >> np.uint32(16) | np.uint32(0x40)
    return np.where(np.isnan(value), quiet, rounded).astype(np.uint16)


def odd_fp32(value: Bits) -> Bits:
    """float64 to fp32, inexact results to the neighbour whose last bit is 1."""
    single = value.astype(np.float32)
    bits = single.view(np.uint32).copy()
    error = value - single.astype(np.float64)
    inexact = (error != 0) & np.isfinite(error) & (bits & np.uint32(1) == 0)
    away = (error > 0) == (single > 0)  # the exact value lies further from zero
    bits[inexact & away] += np.uint32(1)
    bits[inexact & ~away] -= np.uint32(1)
    return bits.view(np.float32)


def fused(a: Bits, b: Bits, c: Bits, kind: str) -> Bits:
    """a · b + c, rounded once. Products of two fp32 or narrower numbers are exact in float64."""
    product = a.astype(np.float64) * b.astype(np.float64)
    c = c.astype(np.float64)
    total = product + c
    # The rounding error of the sum, exact; rounding the sum to odd then makes the rounding to ``kind`` the only one.
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = np.ascontiguousarray(total).view(np.int64)
    fix = (error != 0) & np.isfinite(error) & (bits & 1 == 0)
    if fix.any():
        away = (error > 0) == (total > 0)
        bits = bits + np.where(fix, np.where(away, 1, -1), 0)
        total = bits.view(np.float64)
    return pattern(total, kind)


def lop3(a: Bits, b: Bits, c: Bits, table: int) -> Bits:
    """Bit by bit, entry ``4 a + 2 b + c`` of an eight-bit truth table."""
    result = np.zeros_like(a | b | c)
    for entry in range(8):
        if table >> entry & 1:
            result |= (a if entry & 4 else ~a) & (b if entry & 2 else ~b) & (c if entry & 1 else ~c)
    return result


def permute(a: Bits, b: Bits, selector: Bits) -> Bits:
    """prmt.b32 in its default mode: bytes of b:a by four nibbles, whose top bit copies the sign instead."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast(a, selector).shape, np.uint32)
    for place in range(4):
        nibble = selector >> np.uint32(4 * place) & np.uint32(15)
        byte = (both >> (nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8)).astype(np.uint32) & np.uint32(255)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        result |= np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * place)
    return result


def extract(a: Bits, start: Bits, count: Bits, kind: str) -> Bits:
    """bfe: ``count`` bits from ``start`` on, as a number of ``kind``."""
    width = width_of(kind)
    wide = number(a, kind).astype(np.int64 if kind[0] == "s" else np.uint64)
    one = wide.dtype.type(1)
    start, count = (narrow(value, 32).astype(wide.dtype) & wide.dtype.type(255) for value in (start, count))
    start = np.minimum(start, wide.dtype.type(width - 1 if kind[0] == "s" else width))
    value = wide >> start & (one << count) - one
    if kind[0] == "s":
        value = np.where((count > 0) & (value >> np.maximum(count - 1, 0) & 1 == 1), value - (one << count), value)
    return value.astype(UNSIGNED[width])


def insert(a: Bits, b: Bits, start: Bits, count: Bits, width: int) -> Bits:
    """bfi: the low ``count`` bits of a put into b at ``start``."""
    kind = UNSIGNED[width].type
    start, count = (
        np.minimum(narrow(value, 32) & np.uint32(255), np.uint32(63)).astype(np.uint64) for value in (start, count)
    )
    wide, one = np.uint64((1 << width) - 1), np.uint64(1)
    mask = (((one << count) - one) << start & wide).astype(kind)
    return b & ~mask | (a.astype(np.uint64) << start).astype(kind) & mask


def shifted(operation: str, a: Bits, by: Bits, kind: str) -> Bits:
    """shl and shr; shifts beyond the width give 0, or copies of the sign."""
    width = width_of(kind)
    by = narrow(by, 32)
    value = number(a, kind)
    beyond = by >= width
    amount = np.minimum(by, np.uint32(width - 1)).astype(value.dtype)
    moved = value << amount if operation == "shl" else value >> amount
    fill = value >> value.dtype.type(width - 1) if kind[0] == "s" and operation == "shr" else value.dtype.type(0)
    return np.where(beyond, fill, moved).astype(value.dtype).view(UNSIGNED[width])


def quotient(a: Bits, b: Bits) -> Bits:
    """Integer division towards zero; by zero it gives what nobody may rely on."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    whole = a // safe
    if a.dtype.kind == "i":
        whole = whole + ((a % safe != 0) & ((a < 0) != (safe < 0)))
    return whole.astype(a.dtype)


def remainder(a: Bits, b: Bits) -> Bits:
    return (a - quotient(a, b) * b).astype(a.dtype)


COMPARISONS: dict[str, Callable[[Bits, Bits], Bits]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),  # ordered; integers are never unordered
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "neu": np.not_equal,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
}


WHOLE: dict[str, Callable[[Bits], Bits]] = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def convert(bits: Bits, source: str, target: str, modifiers: tuple[str, ...]) -> Bits:
    """cvt between one source and one target type."""
    value = number(bits, source)
    rounding = next((WHOLE[name] for name in modifiers if name in WHOLE), None)
    if target in FLOATS:
        if source in FLOATS and rounding:
            value = rounding(value)
        return pattern(value.astype(np.float64), target)  # integers are exact below 2^53
    if source in FLOATS:
        assert rounding is not None
        whole = rounding(value.astype(np.float64))
        width, signed = width_of(target), target[0] == "s"
        low, high = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if signed else (0, 2**width - 1)
        whole = np.where(np.isnan(whole), 0, np.clip(whole, low, high))
        return whole.astype(f"{'i' if signed else 'u'}8").astype(UNSIGNED[width])
    return value.astype(f"{'i' if source[0] == 's' else 'u'}8").astype(UNSIGNED[width_of(target)])
