"""The lanes of several blocks that run together: registers, the memories they reach, what is under way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ptx.arithmetic import UNSIGNED, Bits, narrow
from ptx.hazards import Hazards
from ptx.memory import SHARED_WINDOW, GlobalMemory, Lanes, Queue, SharedMemory
from ptx.source import Constant, Instruction, Memory, Operand, Register, Special, Vector
from ptx.traffic import Traffic

WARP, WARPGROUP = 32, 128


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

    def of_lanes(self, operand: Operand | None, lanes: Lanes, width: int, instruction: Instruction) -> Bits:
        """An operand's bits for these lanes, in their shape."""
        assert operand is not None
        return np.broadcast_to(self.bits(operand, width, instruction), self.lanes.shape)[lanes]

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
