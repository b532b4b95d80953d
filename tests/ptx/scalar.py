"""Instructions that compute a register from registers: moves, arithmetic, comparisons, conversions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx import arithmetic
from ptx.arithmetic import UNSIGNED, Bits, narrow, number, pattern, width_of
from ptx.source import Instruction, Register, Vector
from ptx.state import State, Step


def compute(i: Instruction) -> Step:
    """An instruction of one result that only reads registers."""
    kind = i.modifiers[-1]
    target, *sources = i.operands
    function = scalar(i, kind)
    widths = source_widths(i, kind, len(sources))

    def step(s: State) -> None:
        s.write(target, function(*(s.bits(a, w, i) for a, w in zip(sources, widths, strict=True))), i)

    return step


def source_widths(i: Instruction, kind: str, count: int) -> list[int]:
    width = width_of(kind)
    if i.operation == "selp":
        return [width, width, 1]
    if i.operation in ("shl", "shr"):
        return [width, 32]
    if i.operation == "bfe":
        return [width, 32, 32]
    if i.operation == "bfi":
        return [width, width, 32, 32]
    if i.operation in ("mul", "mad") and "wide" in i.modifiers:
        return [width, width, 2 * width][:count]
    return [width] * count


# Modifiers that change a result and that no function here obeys; fp32 without .ftz keeps what is denormal.
ROUNDINGS = {"ftz", "sat", "rz", "rm", "rp", "rna", "rs", "relu", "satfinite", "cc", "xorsign"}
UNKNOWN = ROUNDINGS | {"f4e", "b4e", "rc8", "rc16", "ecl", "ecr"}  # the latter are modes of prmt


def scalar(i: Instruction, kind: str) -> Callable[..., Bits]:
    """The function of an opcode on bit patterns of its sources."""
    operation, modifiers = i.operation, i.modifiers
    if refused := UNKNOWN.intersection(modifiers) - ({"ftz"} if "approx" in modifiers else set()):
        raise i.fault(f".{min(refused)} is not known")
    if kind.endswith("x2"):
        return on_halves(scalar(i, kind.removesuffix("x2")))
    floating = kind in arithmetic.FLOATS

    def numbers(function: Callable[..., Bits]) -> Callable[..., Bits]:
        return lambda *sources: pattern(function(*(number(np.asarray(a), kind) for a in sources)), kind)

    if operation == "mov":
        return lambda a: a
    if operation in ("add", "sub", "mul") and floating:
        function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation]
        return numbers(function)
    if operation in ("fma", "mad") and floating:
        return lambda a, b, c: arithmetic.fused(number(a, kind), number(b, kind), number(c, kind), kind)
    if operation in ("add", "sub"):
        return {"add": np.add, "sub": np.subtract}[operation]
    if operation in ("mul", "mad"):
        product = integer_product(modifiers, kind)
        return product if operation == "mul" else lambda a, b, c: product(a, b) + c
    if operation in ("min", "max"):
        function = {"min": np.minimum, "max": np.maximum}[operation]
        if floating and "NaN" not in modifiers:
            function = {"min": np.fmin, "max": np.fmax}[operation]
        return numbers(function)
    if operation == "div" and not floating:
        return numbers(arithmetic.quotient)
    if operation == "div" and kind == "f32":
        return numbers(lambda a, b: a.astype(np.float64) / b.astype(np.float64))
    if operation == "rem":
        return numbers(arithmetic.remainder)
    if operation == "neg":
        if floating:
            sign = UNSIGNED[width_of(kind)].type(1 << (width_of(kind) - 1))
            return lambda a: a ^ sign
        return np.negative
    if operation == "abs":
        return numbers(np.abs)
    if operation == "sqrt":
        return numbers(np.sqrt)
    if operation == "rcp":
        return numbers(lambda a: 1.0 / a.astype(np.float64))
    if operation == "and":
        return np.bitwise_and
    if operation == "or":
        return np.bitwise_or
    if operation == "xor":
        return np.bitwise_xor
    if operation == "not":
        return np.invert
    if operation in ("shl", "shr"):
        return lambda a, by: arithmetic.shifted(operation, np.asarray(a), np.asarray(by), kind)
    if operation == "bfe":
        return lambda a, start, count: arithmetic.extract(a, start, count, kind)
    if operation == "bfi":
        return lambda a, b, start, count: arithmetic.insert(a, b, start, count, width_of(kind))
    if operation == "lop3":
        return lambda a, b, c, table: arithmetic.lop3(a, b, c, int(table))
    if operation == "prmt":
        return arithmetic.permute
    if operation == "selp":
        return lambda a, b, p: np.where(p, a, b)
    raise i.fault("this instruction is not known")


def on_halves(function: Callable[..., Bits]) -> Callable[..., Bits]:
    """A function of 16-bit patterns on both halves of 32-bit words."""

    def both(*sources: Bits) -> Bits:
        low, high = (function(*(narrow(np.asarray(a) >> np.uint32(shift), 16) for a in sources)) for shift in (0, 16))
        return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)

    return both


def integer_product(modifiers: tuple[str, ...], kind: str) -> Callable[[Bits, Bits], Bits]:
    width = width_of(kind)
    if "lo" in modifiers:
        return np.multiply
    signed = kind[0] == "s"
    wide = np.dtype(f"{'i' if signed else 'u'}{width // 4}")
    whole = lambda a, b: number(np.asarray(a), kind).astype(wide) * number(np.asarray(b), kind).astype(wide)  # noqa: E731
    if "wide" in modifiers:
        return lambda a, b: whole(a, b).view(UNSIGNED[2 * width])
    return lambda a, b: (whole(a, b) >> wide.type(width)).astype(UNSIGNED[width])


def move(i: Instruction) -> Step:
    """mov, with its forms that join and split registers."""
    target, source = i.operands
    width = width_of(i.modifiers[-1])
    if isinstance(source, Vector):
        part = width // len(source.parts)

        def join(s: State) -> None:
            whole = np.zeros(s.lanes.shape, UNSIGNED[width])
            for place, piece in enumerate(source.parts):
                assert piece is not None
                whole = whole | narrow(s.bits(piece, part, i), width) << UNSIGNED[width].type(part * place)
            s.write(target, whole, i)

        return join
    if isinstance(target, Vector):
        part = width // len(target.parts)

        def cut(s: State) -> None:
            whole = np.asarray(s.bits(source, width, i))
            for place, piece in enumerate(target.parts):
                s.write(piece, narrow(whole >> UNSIGNED[width].type(part * place), part), i)

        return cut
    return compute(i)


def compare(i: Instruction) -> Step:
    """setp of one predicate, without a further predicate to combine with."""
    function, kind = arithmetic.COMPARISONS[i.modifiers[0]], i.modifiers[-1]
    target, a, b = i.operands
    width = width_of(kind)

    def step(s: State) -> None:
        s.write(target, function(*(number(np.asarray(s.bits(source, width, i)), kind) for source in (a, b))), i)

    return step


def convert(i: Instruction) -> Step:
    to, of = i.modifiers[-2:]
    if refused := UNKNOWN.intersection(i.modifiers):
        raise i.fault(f".{min(refused)} is not known")
    target, *sources = i.operands
    if to.endswith("x2"):
        # The first source becomes the high half.
        def pair(s: State) -> None:
            high, low = (arithmetic.convert(s.bits(a, width_of(of), i), of, to[:-2], i.modifiers) for a in sources)
            s.write(target, high.astype(np.uint32) << np.uint32(16) | low, i)

        return pair

    def step(s: State) -> None:
        value = arithmetic.convert(np.asarray(s.bits(sources[0], width_of(of), i)), of, to, i.modifiers)
        if to[0] == "s" and isinstance(target, Register) and target.width > width_of(to):
            value = number(value, to).astype(f"i{target.width // 8}").view(UNSIGNED[target.width])
        s.write(target, value, i)

    return step
