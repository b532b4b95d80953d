"""The tensor cores' instructions: matrices spread over a warp's or a warpgroup's registers, and their products.

Layouts are those of the PTX ISA (mma.m16n8k16, ldmatrix, stmatrix, wgmma with its shared memory descriptors), but for
wmma, whose fragments are opaque: any layout that load, product and store share is right. The ISA leaves open how sums
of products are rounded. Tensor cores cut them off: here a step's products are summed exactly with what was there
before, and the sum is rounded to fp32 towards zero.
"""

from __future__ import annotations

import re

import numpy as np

from ptx.arithmetic import Bits, number
from ptx.memory import Lanes
from ptx.source import Constant, Instruction, Operand, Register, Vector
from ptx.state import WARP, WARPGROUP, State, Step, locate, space_of, vector


def read(s: State, operand: Operand | None, lanes: Lanes, i: Instruction) -> Bits:
    """A 32-bit operand of these lanes, in their shape."""
    return s.of_lanes(operand, lanes, 32, i)


def halves(words: Bits) -> Bits:
    """uint32 [..., n] as uint16 [..., 2 n], low halves first."""
    return np.ascontiguousarray(words).view(np.uint16)


def floats(bits: Bits, kind: str) -> Bits:
    """fp64, in which sums of a step's products have no error that fp32 shows."""
    return number(bits, kind).astype(np.float64)


def cut_off(sums: Bits) -> Bits:
    """fp64 rounded to fp32 towards zero; what is too large is infinite."""
    nearest = sums.astype(np.float32)
    beyond = np.isfinite(nearest) & (np.abs(nearest.astype(np.float64)) > np.abs(sums))
    cut: Bits = np.where(beyond, np.nextafter(nearest, np.float32(0)), nearest)
    return cut


# ---- 8 x 8 matrices --------------------------------------------------------------------------------------------------


def matrix_rows(s: State, memory: Operand, lanes: Lanes, place: int, i: Instruction) -> tuple[Lanes, Lanes]:
    """The lanes that give the addresses of a matrix's rows, 16 bytes each, and these addresses."""
    rows = lanes[:, 8 * place : 8 * place + 8].reshape(-1)
    starts = s.addresses(memory, i)[rows]
    s.refuse(np.flatnonzero(starts % 16), "shared", rows, starts, i)
    if s.traffic:
        s.traffic.access(i, "shared", rows, starts, 16)
    return rows, starts


def load_matrices(i: Instruction) -> Step:
    """ldmatrix: lane 8 m + r gives the address of row r of matrix m; lane l receives row l / 4, columns 2 (l % 4)."""
    target, source = i.operands
    registers, turned = vector(target), "trans" in i.modifiers

    def step(s: State) -> None:
        lanes = s.together(WARP, i)
        for place, register in enumerate(registers):
            rows, starts = matrix_rows(s, source, lanes, place, i)
            words = np.stack([s.load("shared", rows, starts + 4 * word, 32, i) for word in range(4)], 1)
            matrix = halves(words).reshape(-1, 8, 8)
            if turned:
                matrix = np.ascontiguousarray(matrix.transpose(0, 2, 1))
            s.write_lanes(register, lanes, matrix.reshape(-1, 8).view(np.uint32).reshape(-1, WARP), i)

    return step


def store_matrices(i: Instruction) -> Step:
    """stmatrix, the reverse of ldmatrix."""
    target, source = i.operands
    registers, turned = vector(source), "trans" in i.modifiers

    def step(s: State) -> None:
        lanes = s.together(WARP, i)
        for place, register in enumerate(registers):
            matrix = eights(read(s, register, lanes, i))
            if turned:
                matrix = matrix.transpose(0, 2, 1)
            words = np.ascontiguousarray(matrix.reshape(-1, 8)).view(np.uint32)
            rows, starts = matrix_rows(s, target, lanes, place, i)
            for word in range(4):
                s.store("shared", rows, starts + 4 * word, words[:, word], 32, i)

    return step


def eights(words: Bits) -> Bits:
    """One register of a warp [W, 32] as its 8 x 8 matrix of 16-bit patterns [W, 8, 8]."""
    return halves(words).reshape(-1, 8, 8)


def left_operand(registers: list[Bits]) -> Bits:
    """Four registers of a warp as A, 16 x 16 patterns: rows 0 and 8, then both again 8 columns on."""
    top, bottom, top_right, bottom_right = map(eights, registers)
    return np.block([[top, top_right], [bottom, bottom_right]])


def add(s: State, target: Operand, sums: Operand, products: Bits, lanes: Lanes, i: Instruction) -> None:
    """target = sums + products fp64 [W, 32, registers]."""
    for place, (out, part) in enumerate(zip(vector(target), vector(sums), strict=True)):
        total = cut_off(read(s, part, lanes, i).view(np.float32) + products[:, :, place])
        s.write_lanes(out, lanes, total.view(np.uint32), i)


def warp_product(i: Instruction) -> Step:
    """mma.m16n8k16 with fp32 sums."""
    if "m16n8k16" not in i.modifiers or i.modifiers[-1] != "f32":
        raise i.fault("only m16n8k16 with fp32 sums is known")
    kind = i.modifiers[-3]
    target, a, b, c = i.operands

    def step(s: State) -> None:
        lanes = s.together(WARP, i)
        left = floats(left_operand([read(s, part, lanes, i) for part in vector(a)]), kind)
        right = floats(np.concatenate([eights(read(s, part, lanes, i)) for part in vector(b)], 2), kind)  # [W, 8, 16]
        product = left @ right.transpose(0, 2, 1)  # [W, 16, 8]
        spread = product.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, WARP, 4)
        add(s, target, c, spread, lanes, i)

    return step


# ---- wmma ------------------------------------------------------------------------------------------------------------


def wmma(i: Instruction) -> Step:
    if "m16n16k16" not in i.modifiers or i.modifiers[:2] == ("load", "c"):
        raise i.fault("only operands and products of m16n16k16 are known")
    if i.modifiers[0] == "load":
        return wmma_load(i)
    return wmma_store(i) if i.modifiers[0] == "store" else wmma_product(i)


def tile_addresses(
    s: State, memory: Operand, leading: Operand, by_rows: bool, size: int, i: Instruction
) -> tuple[Lanes, Lanes]:
    """Lanes [W, 32] and the addresses [W, 16, 16] of a tile's elements; every lane gives the same start."""
    lanes = s.together(WARP, i)
    starts = s.addresses(memory, i)[lanes[:, 0]]
    where, starts = locate(s, space_of(i), lanes[:, 0], starts, i)
    assert where == "shared"
    stride = read(s, leading, lanes, i)[:, 0].astype(np.int64)
    outer, inner = np.arange(16)[None, :, None], np.arange(16)[None, None]
    places = outer * stride[:, None, None] + inner
    if not by_rows:
        places = places.transpose(0, 2, 1)
    return lanes, starts[:, None, None] + size * places


def wmma_load(i: Instruction) -> Step:
    """A lane holds eight neighbouring elements of the tile; fp16 fragments have twice the registers they need."""
    target, source, leading = i.operands
    by_rows = "row" in i.modifiers

    def step(s: State) -> None:
        lanes, addresses = tile_addresses(s, source, leading, by_rows, 2, i)
        owners = np.repeat(lanes, 8, 1).reshape(-1)
        tile = s.load("shared", owners, addresses.reshape(-1), 16, i).reshape(-1, WARP, 8)
        words = np.ascontiguousarray(tile).view(np.uint32)
        for place, register in enumerate(vector(target)):
            s.write_lanes(register, lanes, words[:, :, place % 4], i)

    return step


def wmma_product(i: Instruction) -> Step:
    target, a, b, c = i.operands
    kind = "bf16" if "bf16" in i.modifiers else "f16"

    def step(s: State) -> None:
        lanes = s.together(WARP, i)
        left, right = (
            floats(halves(np.stack([read(s, part, lanes, i) for part in vector(x)[:4]], 2)).reshape(-1, 16, 16), kind)
            for x in (a, b)
        )
        add(s, target, c, (left @ right).reshape(-1, WARP, 8), lanes, i)

    return step


def wmma_store(i: Instruction) -> Step:
    target, source, leading = i.operands

    def step(s: State) -> None:
        lanes, addresses = tile_addresses(s, target, leading, "row" in i.modifiers, 4, i)
        values = np.stack([read(s, part, lanes, i) for part in vector(source)], 2)
        owners = np.repeat(lanes, 8, 1).reshape(-1)
        s.store("shared", owners, addresses.reshape(-1), values.reshape(-1), 32, i)

    return step


# ---- wgmma -----------------------------------------------------------------------------------------------------------


def wgmma(i: Instruction) -> Step:
    if i.modifiers[0] == "mma_async":
        return group_product(i)
    if i.modifiers[0] == "commit_group":
        return lambda s: s.products.commit(s.which())
    if i.modifiers[0] == "wait_group":
        allowed = i.operands[0]
        assert isinstance(allowed, Constant)

        def wait(s: State) -> None:
            for entry in s.products.wait(s.which(), allowed.bits):
                finish(s, entry.instruction, entry.lanes.reshape(-1, WARPGROUP), *entry.arrays)

        return wait
    return lambda s: None  # wgmma.fence orders registers, which here are always in order


def group_product(i: Instruction) -> Step:
    """wgmma.mma_async with fp32 sums: registers are taken now, shared memory and sums when it is waited for."""
    if i.modifiers[-3] != "f32" or not any(re.fullmatch(r"m64n\d+k16", name) for name in i.modifiers):
        raise i.fault("only products of 16-bit floats with fp32 sums are known")
    _, a, b, keep, *signs = i.operands
    if any(not isinstance(sign, Constant) for sign in signs) or [sign.bits for sign in signs[:2]] != [1, 1]:  # type: ignore[union-attr]
        raise i.fault("operands with another sign are not known")

    def step(s: State) -> None:
        lanes = s.together(WARPGROUP, i).reshape(-1)
        keeps, right = s.of_lanes(keep, lanes, 1, i), s.of_lanes(b, lanes, 64, i)
        if isinstance(a, Vector):
            left = np.stack([read(s, part, lanes, i) for part in a.parts], 1)
        else:
            left = s.of_lanes(a, lanes, 64, i)
        if s.hazards:
            for operand, bits in operands_in_shared(i, left, right):
                note_read(s, i, lanes, operand, bits)
        s.products.add(i, lanes, left, right, keeps)

    return step


def shape_of(i: Instruction) -> int:
    """n of m64nNk16."""
    return next(int(found[1]) for name in i.modifiers if (found := re.fullmatch(r"m64n(\d+)k16", name)))


def turns(i: Instruction) -> tuple[bool, bool]:
    """Whether A and B are transposed in shared memory; A in registers never is."""
    flags = [bool(sign.bits) for sign in i.operands[6:] if isinstance(sign, Constant)]
    return (False, flags[0]) if isinstance(i.operands[1], Vector) else (flags[0], flags[1])


def operands_in_shared(i: Instruction, left: Bits, right: Bits) -> list[tuple[tuple[int, bool], Bits]]:
    """(rows, transposed) and descriptors of the operands that lie in shared memory."""
    turn_a, turn_b = turns(i)
    found = [((shape_of(i), turn_b), right)]
    return found if left.ndim == 2 else [((64, turn_a), left), *found]


def note_read(s: State, i: Instruction, lanes: Lanes, operand: tuple[int, bool], descriptors: Bits) -> None:
    assert s.hazards
    for group in range(lanes.size // WARPGROUP):
        own = lanes[group * WARPGROUP : (group + 1) * WARPGROUP]
        addresses = element_addresses(int(descriptors[group * WARPGROUP]), *operand, i).reshape(-1)
        # Any lane of the group may be the one that reads.
        s.hazards.read_by_proxy(own, addresses, i)
        for warp in range(0, WARPGROUP, WARP):
            s.hazards.read(np.full(addresses.size, own[warp]), addresses, 2, i)


def element_addresses(descriptor: int, rows: int, turned: bool, i: Instruction) -> Lanes:
    """Where element (row, k) of an operand [rows, 16] lies, by its matrix descriptor.

    Before the exchange of address bits that a swizzle is: rows along k are as wide as the swizzle, eight of them make
    an atom, and atoms lie the stride offset apart. Turned, an atom is 8 k by one swizzle width; atoms lie the leading
    offset apart along the rows and the stride offset along k.
    """
    start, leading, stride = (16 * (descriptor >> shift & 0x3FFF) for shift in (0, 16, 32))
    swizzle = {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62 & 3]
    if descriptor >> 49 & 7:
        raise i.fault("a descriptor with a base offset")
    row, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if not turned:
        if swizzle == 16:
            place = row // 8 * stride + row % 8 * 16 + k // 8 * leading + k % 8 * 2
        else:
            place = row // 8 * stride + row % 8 * swizzle + k * 2
    elif swizzle == 16:
        place = row // 8 * stride + row % 8 * 2 + k // 8 * leading + k % 8 * 16
    else:
        width = swizzle // 2
        place = row // width * leading + row % width * 2 + k // 8 * stride + k % 8 * swizzle
    address = (start + place).astype(np.int64)
    return address ^ (address >> 7 & swizzle // 16 - 1) << 4


def finish(s: State, i: Instruction, lanes: Lanes, left: Bits, right: Bits, keeps: Bits) -> None:
    """The product itself, for warpgroups [G, 128]."""
    kind, n = i.modifiers[-1], shape_of(i)
    turn_a, turn_b = turns(i)
    groups = lanes.shape[0]

    def from_shared(descriptors: Bits, rows: int, turned: bool) -> Bits:
        found = np.empty((groups, rows, 16), np.uint16)
        for group, descriptor in enumerate(descriptors.reshape(groups, WARPGROUP)):
            if (descriptor != descriptor[0]).any():
                raise i.fault("lanes of a warpgroup have different descriptors")
            addresses = element_addresses(int(descriptor[0]), rows, turned, i).reshape(-1)
            owner = np.full(addresses.size, lanes[group, 0])
            s.refuse(s.shared.bad(addresses, 2), "shared", owner, addresses, i)
            found[group] = s.shared.load(s.block[owner], addresses, 16).reshape(rows, 16)
        return floats(found, kind)

    if left.ndim == 2:
        now = np.stack([read(s, part, lanes.reshape(-1), i) for part in vector(i.operands[1])], 1)
        if (now != left).any():
            raise i.fault("registers of A are written before it is waited for")
        warps = np.ascontiguousarray(left.reshape(groups * 4, WARP, 4))
        a = floats(left_operand([np.ascontiguousarray(warps[:, :, place]) for place in range(4)]), kind)
        a = a.reshape(groups, 64, 16)
    else:
        a = from_shared(left, 64, turn_a)
    b = from_shared(right, n, turn_b)
    if s.hazards:
        for operand, bits in operands_in_shared(i, left, right):
            note_read(s, i, lanes.reshape(-1), operand, bits)
    product = a @ b.transpose(0, 2, 1)  # [G, 64, N]
    # Row 16 w + 8 h + q and column 8 c + 2 p + e: register 4 c + 2 h + e of lane 4 q + p of warp w.
    spread = (
        product.reshape(groups, 4, 2, 8, n // 8, 4, 2).transpose(0, 1, 3, 5, 4, 2, 6).reshape(groups, WARPGROUP, n // 2)
    )
    for place, register in enumerate(vector(i.operands[0])):
        assert isinstance(register, Register)
        old = s.registers.get(register.name)
        if old is None and keeps.any():
            raise i.fault(f"{register.name} is read before it is written")
        before = np.zeros(lanes.shape, np.uint32) if old is None else old[lanes]
        sums = np.where(keeps.reshape(lanes.shape), before.view(np.float32), np.float32(0)) + spread[:, :, place]
        s.write_lanes(register, lanes, cut_off(sums).view(np.uint32), i)
