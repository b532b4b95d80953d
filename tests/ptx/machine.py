"""Runs a kernel: all lanes of several blocks at once, one instruction after the other, on arrays of registers.

Lanes that go different ways are brought forward from the lowest instruction on, so that loops and branches join again
where their code does. Barriers hold lanes back until all of their block have come. What is asynchronous happens as late
as it may: a copy arrives when it is waited for, a wgmma reads shared memory and writes its sums when it is waited for.
A program that reads too early therefore reads what was there before, every time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ptx import arithmetic, fragments
from ptx.arithmetic import UNSIGNED, Bits, narrow, number, pattern, width_of
from ptx.hazards import Hazards
from ptx.memory import SHARED_WINDOW, GlobalMemory, Lanes, Queue, SharedMemory
from ptx.source import Constant, Instruction, Kernel, Memory, Operand, PtxError, Register, Special, Vector, kernels
from ptx.traffic import Traffic

WARP, WARPGROUP = 32, 128
LANES_AT_ONCE = 8192
DONE = np.iinfo(np.int64).max
ENDS_STEP = ("bra", "bar", "barrier", "ret", "exit")


@dataclass
class Watch:
    """What a run looks at besides results: None, or an object that is told of every access to memory."""

    hazards: bool = False
    traffic: Traffic | None = None


@dataclass
class State:
    """The lanes that run together: ``blocks`` (x, y, z of each) of ``threads`` lanes."""

    blocks: Bits  # [B, 3]
    grid: tuple[int, int, int]
    threads: int
    parameters: bytes  # the space of parameters
    memory: GlobalMemory
    shared: SharedMemory
    hazards: Hazards | None
    traffic: Traffic | None
    registers: dict[str, Bits] = field(default_factory=dict)
    active: Bits | None = None  # lanes that run the current instruction; None: all

    def __post_init__(self) -> None:
        count = len(self.blocks) * self.threads
        self.lanes = np.arange(count)
        self.block = self.lanes // self.threads
        self.copies, self.products = Queue(count), Queue(count)

    # ---- lanes ----

    def which(self) -> Lanes:
        """The lanes that run the current instruction."""
        return self.lanes if self.active is None else np.flatnonzero(self.active)

    def together(self, size: int, instruction: Instruction) -> Lanes:
        """The same as [groups, size]: whole warps or warpgroups, as .sync.aligned instructions ask for."""
        lanes = self.which()
        if self.active is not None:
            groups = self.active.reshape(-1, size)
            if (groups.any(1) != groups.all(1)).any():
                raise instruction.fault(f"only a part of {size} lanes executes it")
        return lanes.reshape(-1, size)

    # ---- registers ----

    def bits(self, operand: Operand, width: int, instruction: Instruction) -> Bits:
        """An operand's bits for all lanes, or one value for all of them."""
        if isinstance(operand, Register):
            if operand.name not in self.registers:
                raise instruction.fault(f"{operand.name} is read before it is written")
            return narrow(self.registers[operand.name], width)
        if isinstance(operand, Constant):
            bits = operand.bits
            return UNSIGNED[width].type(bits != 0 if width == 1 else bits & (1 << width) - 1)
        if isinstance(operand, Special):
            return narrow(self.special(operand.name, instruction), width)
        raise instruction.fault("an operand of another kind was expected")

    def write(self, register: Operand | None, value: Bits, instruction: Instruction) -> None:
        """Set a register of the active lanes; the value has all lanes, or is one for all."""
        if register is None:
            return
        if not isinstance(register, Register):
            raise instruction.fault("a register was expected")
        value = narrow(np.asarray(value), register.width)
        if value.shape != self.lanes.shape:
            value = np.broadcast_to(value, self.lanes.shape)
        if self.active is not None:
            old = self.registers.get(register.name)
            value = np.where(self.active, value, unwritten(register.width) if old is None else old)
        self.registers[register.name] = value

    def write_lanes(self, register: Operand | None, lanes: Lanes, values: Bits, instruction: Instruction) -> None:
        """Set a register of these lanes, in their order."""
        if register is None:
            return
        if not isinstance(register, Register):
            raise instruction.fault("a register was expected")
        old = self.registers.get(register.name)
        whole = np.full(self.lanes.shape, unwritten(register.width)) if old is None else old.copy()
        whole[lanes.reshape(-1)] = narrow(values.reshape(-1), register.width)
        self.registers[register.name] = whole

    def special(self, name: str, instruction: Instruction) -> Bits:
        kind, _, axis = name.partition(".")
        place = "xyz".find(axis) if axis else 0
        thread = (self.lanes % self.threads).astype(np.uint32)
        if kind == "tid":
            return thread if place == 0 else np.zeros_like(thread)
        if kind == "ntid":
            return np.uint32(self.threads if place == 0 else 1)
        if kind == "ctaid":
            return self.blocks[self.block, place].astype(np.uint32)
        if kind == "nctaid":
            return np.uint32(self.grid[place])
        if kind == "laneid":
            return thread % np.uint32(WARP)
        if kind == "warpid":
            return thread // np.uint32(WARP)
        raise instruction.fault(f"%{name} is not known")

    # ---- memory ----

    def addresses(self, operand: Operand, instruction: Instruction) -> Lanes:
        """Of all lanes."""
        assert isinstance(operand, Memory)
        base = self.bits(operand.base, 64, instruction)
        return np.broadcast_to(base.astype(np.int64) + operand.offset, self.lanes.shape)

    def load(self, space: str, lanes: Lanes, addresses: Lanes, width: int, instruction: Instruction) -> Bits:
        """What lies at the addresses of these lanes."""
        if space == "shared":
            self.refuse(self.shared.bad(addresses, width // 8), "shared", lanes, addresses, instruction)
            if self.hazards:
                self.hazards.read(lanes, addresses, width // 8, instruction)
            return self.shared.load(self.block[lanes], addresses, width)
        self.refuse(self.memory.bad(addresses, width // 8), "global", lanes, addresses, instruction)
        return self.memory.load(addresses, width)

    def store(
        self, space: str, lanes: Lanes, addresses: Lanes, values: Bits, width: int, instruction: Instruction
    ) -> None:
        if space == "shared":
            self.refuse(self.shared.bad(addresses, width // 8), "shared", lanes, addresses, instruction)
            if self.hazards:
                before = self.shared.load(self.block[lanes], addresses, width)
                self.hazards.write(lanes, addresses, width // 8, instruction, before != values)
            self.shared.store(self.block[lanes], addresses, values, width)
            if self.hazards and (self.shared.load(self.block[lanes], addresses, width) != values).any():
                raise instruction.fault("lanes write different values to one place")
            return
        self.refuse(self.memory.bad(addresses, width // 8), "global", lanes, addresses, instruction)
        if self.hazards:
            self.hazards.stored(lanes)
        self.memory.store(addresses, values, width)

    def refuse(self, bad: Lanes, space: str, lanes: Lanes, addresses: Lanes, instruction: Instruction) -> None:
        if bad.size:
            lane = lanes[bad[0]]
            raise instruction.fault(
                f"thread {lane % self.threads} of block {self.blocks[self.block[lane]].tolist()} and {bad.size - 1} "
                f"others use {space} address {int(addresses[bad[0]]):#x}, unaligned or outside"
            )


Step = Callable[[State], None]


def unwritten(width: int) -> Bits:
    """What lanes hold that have not written a register: as in shared memory not zero but NaN."""
    return UNSIGNED[width].type(True if width == 1 else (1 << width) - 1)


def vector(operand: Operand) -> tuple[Operand | None, ...]:
    return operand.parts if isinstance(operand, Vector) else (operand,)


# ---- instructions ----------------------------------------------------------------------------------------------------


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
        return halves(scalar(i, kind.removesuffix("x2")))
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


def halves(function: Callable[..., Bits]) -> Callable[..., Bits]:
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


def space_of(i: Instruction) -> str:
    return next((name for name in ("global", "shared", "param", "local") if name in i.modifiers), "generic")


def locate(s: State, space: str, lanes: Lanes, addresses: Lanes, i: Instruction) -> tuple[str, Lanes]:
    """The memory that generic addresses of these lanes mean, and the addresses in it."""
    if space != "generic":
        return space, addresses
    in_shared = addresses >= SHARED_WINDOW
    if in_shared.any() != in_shared.all():
        raise i.fault("generic addresses of both memories in one instruction")
    return ("shared", addresses - SHARED_WINDOW) if in_shared.any() else ("global", addresses)


def load(i: Instruction) -> Step:
    if "param" in i.modifiers:
        return parameter(i)
    target, source = i.operands
    kind, space, pieces = i.modifiers[-1], space_of(i), vector(target)
    width = width_of(kind)

    def step(s: State) -> None:
        lanes = s.which()
        where, addresses = locate(s, space, lanes, s.addresses(source, i)[lanes], i)
        if s.traffic:
            s.traffic.access(i, where, lanes, addresses, len(pieces) * width // 8)
        s.refuse(np.flatnonzero(addresses % (len(pieces) * width // 8)), f"{where} (vector)", lanes, addresses, i)
        for place, piece in enumerate(pieces):
            value = s.load(where, lanes, addresses + place * width // 8, width, i)
            if kind[0] == "s" and isinstance(piece, Register) and piece.width > width:
                value = value.view(f"i{width // 8}").astype(f"i{piece.width // 8}").view(UNSIGNED[piece.width])
            s.write_lanes(piece, lanes, value, i)

    return step


def store(i: Instruction) -> Step:
    target, source = i.operands
    space, pieces = space_of(i), vector(source)
    width = width_of(i.modifiers[-1])

    def step(s: State) -> None:
        lanes = s.which()
        where, addresses = locate(s, space, lanes, s.addresses(target, i)[lanes], i)
        if s.traffic:
            s.traffic.access(i, where, lanes, addresses, len(pieces) * width // 8)
        s.refuse(np.flatnonzero(addresses % (len(pieces) * width // 8)), f"{where} (vector)", lanes, addresses, i)
        for place, piece in enumerate(pieces):
            assert piece is not None
            values = np.broadcast_to(s.bits(piece, width, i), s.lanes.shape)[lanes]
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
        count = np.broadcast_to(s.bits(counts[0], 32, i) if counts else np.uint32(size.bits), s.lanes.shape)[lanes]
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
        amounts = np.broadcast_to(s.bits(amount, 32, i), s.lanes.shape)[lanes]
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
        values, steps, limits = (
            np.broadcast_to(s.bits(a, 32, i), s.lanes.shape)[lanes].astype(np.int64) for a in (source, by, clamp)
        )
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
    "mov": move, "setp": compare, "cvt": convert, "cvta": address, "ld": load, "st": store, "cp": copy,
    "atom": atomic, "red": atomic, "shfl": shuffle, "fence": fence, "membar": fence,
    "griddepcontrol": nothing, "prefetch": nothing,
    "ldmatrix": fragments.load_matrices, "stmatrix": fragments.store_matrices, "mma": fragments.warp_product,
    "wmma": fragments.wmma, "wgmma": fragments.wgmma,
}  # fmt: skip


def step_of(i: Instruction) -> Step:
    """What an instruction does; a guard on anything but a branch leaves lanes out."""
    plain = warp_barrier(i) if i.operation == "bar" else HANDLERS.get(i.operation, compute)(i)
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


# ---- control ---------------------------------------------------------------------------------------------------------


class Program:
    """A kernel made ready to run: its steps, and where straight pieces of it begin and end."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.steps: list[Step | None] = []
        starts = {0, len(kernel.instructions)}
        for place, i in enumerate(kernel.instructions):
            ends = i.operation in ENDS_STEP and i.modifiers[:1] != ("warp",)
            self.steps.append(None if ends else step_of(i))
            if ends:
                starts.add(place + 1)
            if i.operation == "bra":
                starts.add(kernel.labels[i.target])
        self.starts = sorted(starts)

    def run(
        self,
        grid: Sequence[int],
        threads: int,
        arguments: Iterable[bytes],
        regions: list[tuple[int, int]],
        dynamic_shared: int = 0,
        watch: Watch | None = None,
    ) -> None:
        """Run all blocks of a grid. regions: (address, bytes) of the memory that the kernel may use."""
        x, y, z = (*grid, 1, 1)[:3]
        blocks = np.stack(np.meshgrid(np.arange(z), np.arange(y), np.arange(x), indexing="ij"), -1).reshape(-1, 3)[
            :, ::-1
        ]
        parameters = b"".join(
            value.ljust(-(-p.bytes // 16) * 16, b"\0")
            for p, value in zip(self.kernel.parameters, arguments, strict=True)
        )
        memory = GlobalMemory(regions)
        size = self.kernel.shared_bytes + dynamic_shared
        # Blocks that may wait for each other run one after the other: an earlier one never needs a later one.
        waits = any(i.operation == "atom" or "acquire" in i.modifiers for i in self.kernel.instructions)
        at_once = 1 if waits else max(1, LANES_AT_ONCE // threads)
        watch = watch or Watch()
        for first in range(0, len(blocks), at_once):
            some = blocks[first : first + at_once]
            shared = SharedMemory(len(some), size)
            hazards = Hazards(len(some), threads, shared.size) if watch.hazards else None
            with np.errstate(all="ignore"):
                self.advance(State(some, (x, y, z), threads, parameters, memory, shared, hazards, watch.traffic))

    def advance(self, s: State) -> None:
        count = s.lanes.size
        place = np.zeros(count, np.int64)
        waiting = np.zeros(count, bool)
        instructions = self.kernel.instructions
        while True:
            runnable = np.where(waiting, DONE, place)
            start = int(runnable.min())
            if start == DONE:
                if not waiting.any():
                    return
                raise PtxError(f"{self.kernel.name}: lanes wait at a barrier that others never reach")
            here = runnable == start
            s.active = None if here.all() else here
            stop = self.starts[np.searchsorted(self.starts, start, "right")]
            end = stop
            for at in range(start, stop):
                step = self.steps[at]
                if step is None:
                    end = at
                    break
                step(s)
            lanes = s.which()
            if end == stop:
                place[lanes] = stop if stop < len(instructions) else DONE
                continue
            self.turn(s, instructions[end], end, lanes, place, waiting)

    def turn(self, s: State, i: Instruction, at: int, lanes: Lanes, place: Lanes, waiting: Bits) -> None:
        """Where lanes go from the instruction that ends a straight piece."""
        place[lanes] = at + 1
        if i.guard is not None:
            chosen = np.broadcast_to(s.bits(i.guard, 1, i) ^ i.negated, s.lanes.shape)[lanes]
            lanes = lanes[chosen]
        if i.operation == "bra":
            place[lanes] = self.kernel.labels[i.target]
        elif i.operation in ("ret", "exit"):
            place[lanes] = DONE
        else:
            if len(i.operands) != 1 or i.operands[0] != Constant(0):
                raise i.fault("only barrier 0 of a whole block is known")
            waiting[lanes] = True
            warps = (waiting & (place == at + 1) | (place == DONE)).reshape(-1, WARP)
            if (warps.any(1) != warps.all(1))[np.unique(lanes // WARP)].any():
                raise i.fault(f"only a part of {WARP} lanes executes it")
        held = waiting.reshape(-1, s.threads)
        met = (held | (place == DONE).reshape(held.shape)).all(1) & held.any(1)
        if met.any():
            held[met] = False
            if s.hazards:
                s.hazards.blocks_met(np.flatnonzero(met))


def evaluate(assembly: str, *inputs: Bits) -> Bits:
    """Register $0 of inline assembly with ``inputs`` in $1, $2, ...; arrays of 32-bit words."""
    lanes = inputs[0].size
    text = re.sub(r"\$(\d+)", r"%v\1", assembly)
    kernel = kernels(f".entry snippet() {{ .reg .b32 %v<{len(inputs) + 1}>; {text}; }}")[0]
    state = State(np.zeros((lanes, 3)), (lanes, 1, 1), 1, b"", GlobalMemory([]), SharedMemory(1, 0), None, None)
    state.registers = {f"%v{number}": value for number, value in enumerate(inputs, 1)}
    with np.errstate(all="ignore"):
        for instruction in kernel.instructions:
            step_of(instruction)(state)
    return state.registers["%v0"]
