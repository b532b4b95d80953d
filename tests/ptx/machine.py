"""Runs a kernel: all lanes of several blocks at once, one instruction after the other, on arrays of registers.

Lanes that go different ways are brought forward from the lowest instruction on, so that loops and branches join again
where their code does. Barriers hold lanes back until all of their block have come; a block that waits in a loop for
another one lets all others go on first. What is asynchronous happens as late as it may: a copy arrives when it is
waited for, a wgmma reads shared memory and writes its sums when it is waited for. A program that reads too early
therefore reads what was there before, every time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ptx.arithmetic import Bits
from ptx.hazards import Hazards
from ptx.instructions import step_of
from ptx.memory import GlobalMemory, Lanes, SharedMemory
from ptx.source import Constant, Instruction, Kernel, PtxError, kernels
from ptx.state import WARP, State, Step
from ptx.traffic import Traffic

LANES_AT_ONCE = 8192
DONE = np.iinfo(np.int64).max
TURNS = 20  # times that all who wait look again while nobody gets further
ENDS_STEP = ("bra", "bar", "barrier", "ret", "exit")


@dataclass
class Watch:
    """What a run looks at besides results."""

    hazards: bool = False
    traffic: Traffic | None = None


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
        # Branches back to where a turn is waited for, which other blocks may have to give.
        self.waits = {
            place for place, i in enumerate(kernel.instructions) if i.operation == "bra" and self.spins(i, place)
        }

    def spins(self, branch: Instruction, place: int) -> bool:
        """Whether a branch goes back over an acquire."""
        loop = self.kernel.instructions[self.kernel.labels[branch.target] : place]
        return any("acquire" in i.modifiers for i in loop)

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
        at_once = max(1, LANES_AT_ONCE // threads)
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
        waiting, turning = np.zeros(count, bool), np.zeros(count, bool)  # at a barrier; for another block
        before, turns = place.copy(), 0
        instructions = self.kernel.instructions
        while True:
            runnable = np.where(waiting | turning, DONE, place)
            start = int(runnable.min())
            if start == DONE:
                if turning.any():
                    turns = turns + 1 if np.array_equal(place, before) else 0
                    if turns == TURNS:
                        raise PtxError(f"{self.kernel.name}: blocks wait for what no other one does")
                    before, turning[:] = place.copy(), False
                    continue
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
            lanes = self.turn(s, instructions[end], end, lanes, place, waiting)
            turning[lanes] = end in self.waits

    def turn(self, s: State, i: Instruction, at: int, lanes: Lanes, place: Lanes, waiting: Bits) -> Lanes:
        """Where lanes go from the instruction that ends a straight piece; the lanes that execute it."""
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
        return lanes


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
