"""What each instruction does: memory and the exchange of lanes here, the rest in the modules that have it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx import fragments, scalar
from ptx.arithmetic import UNSIGNED, width_of
from ptx.memory import SHARED_WINDOW, Lanes
from ptx.source import Constant, Instruction, Operand, Register
from ptx.state import WARP, State, Step, locate, space_of, vector


def address(i: Instruction) -> Step:
    """cvta between generic addresses and those of global or shared memory."""
    target, source = i.operands
    shift = np.uint64(SHARED_WINDOW) if "shared" in i.modifiers else np.uint64(0)

    def step(s: State) -> None:
        bits = s.bits(source, 64, i)
        s.write(target, bits - shift if "to" in i.modifiers else bits + shift, i)

    return step


def parameter(i: Instruction) -> Step:
    target, source = i.operands
    width = width_of(i.modifiers[-1])

    def step(s: State) -> None:
        lanes = s.which()
        addresses = s.addresses(source, i)[lanes]
        space = np.frombuffer(s.parameters, np.uint8)
        for place, piece in enumerate(vector(target)):
            where = (addresses + place * width // 8)[:, None] + np.arange(width // 8)
            s.write_lanes(piece, lanes, np.ascontiguousarray(space[where]).view(UNSIGNED[width])[:, 0], i)

    return step


def accessed(s: State, memory: Operand, size: int, i: Instruction) -> tuple[Lanes, str, Lanes]:
    """The active lanes, the memory that they use, and where: ``size`` bytes each."""
    lanes = s.which()
    where, addresses = locate(s, space_of(i), lanes, s.addresses(memory, i)[lanes], i)
    if s.traffic:
        s.traffic.access(i, where, lanes, addresses, size)
    s.refuse(np.flatnonzero(addresses % size), f"{where} (vector)", lanes, addresses, i)
    return lanes, where, addresses


def load(i: Instruction) -> Step:
    if "param" in i.modifiers:
        return parameter(i)
    target, source = i.operands
    kind, pieces = i.modifiers[-1], vector(target)
    width = width_of(kind)

    def step(s: State) -> None:
        lanes, where, addresses = accessed(s, source, len(pieces) * width // 8, i)
        for place, piece in enumerate(pieces):
            value = s.load(where, lanes, addresses + place * width // 8, width, i)
            if kind[0] == "s" and isinstance(piece, Register) and piece.width > width:
                value = value.view(f"i{width // 8}").astype(f"i{piece.width // 8}").view(UNSIGNED[piece.width])
            s.write_lanes(piece, lanes, value, i)

    return step


def store(i: Instruction) -> Step:
    target, source = i.operands
    pieces = vector(source)
    width = width_of(i.modifiers[-1])

    def step(s: State) -> None:
        lanes, where, addresses = accessed(s, target, len(pieces) * width // 8, i)
        for place, piece in enumerate(pieces):
            values = s.of_lanes(piece, lanes, width, i)
            s.store(where, lanes, addresses + place * width // 8, values, width, i)

    return step


def copy(i: Instruction) -> Step:
    """cp.async: copies, commits and waits."""
    if "commit_group" in i.modifiers:
        return lambda s: s.copies.commit(s.which())
    if "wait_group" in i.modifiers or "wait_all" in i.modifiers:
        count = i.operands[0] if i.operands else Constant(-1)
        assert isinstance(count, Constant)
        allowed = count.bits

        def wait(s: State) -> None:
            for entry in s.copies.wait(s.which(), allowed):
                to, data = entry.arrays
                for place in range(data.shape[1]):
                    s.store("shared", entry.lanes, to + 4 * place, data[:, place], 32, entry.instruction)

        return wait
    target, source, size, *counts = i.operands
    if (
        not isinstance(size, Constant)
        or len(counts) > 1
        or any(isinstance(c, Register) and c.width != 32 for c in counts)
    ):
        raise i.fault("only copies with a size of their source are known")

    def step(s: State) -> None:
        lanes = s.which()
        to, start = (s.addresses(operand, i)[lanes] for operand in (target, source))
        s.refuse(np.flatnonzero(to % size.bits), "shared", lanes, to, i)
        count = s.of_lanes(counts[0] if counts else size, lanes, 32, i)
        s.refuse(np.flatnonzero((start % size.bits != 0) & (count > 0)), "global", lanes, start, i)
        if s.traffic:
            s.traffic.access(i, "shared", lanes, to, size.bits)
            s.traffic.access(i, "global", lanes[count > 0], start[count > 0], size.bits)
        if s.hazards:
            s.hazards.write(lanes, to, size.bits, i)  # it may arrive at once
        data = np.zeros((lanes.size, size.bits // 4), np.uint32)
        for place in range(size.bits // 4):
            inside = count > 4 * place
            data[inside, place] = s.load("global", lanes[inside], start[inside] + 4 * place, 32, i)
        s.copies.add(i, lanes, to, data)

    return step


def atomic(i: Instruction) -> Step:
    """atom.add and red.add on integers: one lane after the other."""
    if "add" not in i.modifiers or i.modifiers[-1] not in ("u32", "s32"):
        raise i.fault("only additions of 32-bit integers are known")
    *targets, source, amount = i.operands

    def step(s: State) -> None:
        lanes = s.which()
        addresses = s.addresses(source, i)[lanes]
        amounts = s.of_lanes(amount, lanes, 32, i)
        if s.hazards and ("release" in i.modifiers or "acq_rel" in i.modifiers):
            s.hazards.release(lanes, i)
        before = np.empty(lanes.size, np.uint32)
        for place in range(lanes.size):
            one, where = lanes[place : place + 1], addresses[place : place + 1]
            before[place] = s.load("global", one, where, 32, i)[0]
            s.store("global", one, where, before[place : place + 1] + amounts[place : place + 1], 32, i)
        for target in targets:
            s.write_lanes(target, lanes, before, i)

    return step


def shuffle(i: Instruction) -> Step:
    *targets, source, by, clamp, _ = i.operands
    mode = next(name for name in i.modifiers if name in ("idx", "bfly", "up", "down"))

    def step(s: State) -> None:
        lanes = s.together(WARP, i)
        values, steps, limits = (s.of_lanes(a, lanes, 32, i).astype(np.int64) for a in (source, by, clamp))
        own = np.arange(WARP)[None]
        segment = limits >> 8 & 31
        last = (own & segment) | (limits & 31 & ~segment)
        other = {
            "idx": (own & segment) | (steps & 31 & ~segment),
            "bfly": own ^ steps & 31,
            "up": own - (steps & 31),
            "down": own + (steps & 31),
        }[mode]
        inside = other >= last if mode == "up" else other <= last
        other = np.where(inside, other, own)
        s.write_lanes(targets[0], lanes, np.take_along_axis(values, other, 1).astype(np.uint32), i)
        if len(targets) > 1:
            s.write_lanes(targets[1], lanes, inside, i)

    return step


def nothing(i: Instruction) -> Step:
    return lambda s: None


def fence(i: Instruction) -> Step:
    """Memory is always in order here; what wgmma may read is looked at with the hazards."""
    if "proxy" not in i.modifiers:
        return lambda s: None

    def step(s: State) -> None:
        if s.hazards:
            s.hazards.fenced(s.which())

    return step


def warp_barrier(i: Instruction) -> Step:
    def step(s: State) -> None:
        lanes = s.together(WARP, i)
        if s.hazards:
            s.hazards.warps_met(lanes[:, 0])

    return step


HANDLERS: dict[str, Callable[[Instruction], Step]] = {
    "mov": scalar.move, "setp": scalar.compare, "cvt": scalar.convert, "cvta": address,
    "ld": load, "st": store, "cp": copy, "atom": atomic, "red": atomic, "shfl": shuffle,
    "fence": fence, "membar": fence, "griddepcontrol": nothing, "prefetch": nothing,
    "ldmatrix": fragments.load_matrices, "stmatrix": fragments.store_matrices, "mma": fragments.warp_product,
    "wmma": fragments.wmma, "wgmma": fragments.wgmma,
}  # fmt: skip


def step_of(i: Instruction) -> Step:
    """What an instruction does; a guard on anything but a branch leaves lanes out."""
    plain = warp_barrier(i) if i.operation == "bar" else HANDLERS.get(i.operation, scalar.compute)(i)
    guard = i.guard
    if guard is None:
        return plain

    def guarded(s: State) -> None:
        chosen = np.broadcast_to(s.bits(guard, 1, i) ^ i.negated, s.lanes.shape)
        before = s.active
        if before is not None:
            chosen = chosen & before
        if chosen.all():
            plain(s)
        elif chosen.any():
            s.active = chosen
            plain(s)
            s.active = before

    return guarded
