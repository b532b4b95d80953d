"""Races in shared memory: two lanes use the same bytes, one writes, and no barrier lies between."""

from __future__ import annotations

import numpy as np

from ptx.arithmetic import Bits
from ptx.memory import Lanes
from ptx.source import Instruction

UNIT = 2  # bytes that are looked at together
NOBODY, MANY = -1, -2


class Hazards:
    """Who used which bytes last, and at which of the barriers of its block and its warp."""

    def __init__(self, blocks: int, threads: int, size: int):
        self.threads, self.units = threads, size // UNIT
        count = blocks * self.units
        self.writer, self.reader, self.reader_warp = (np.full(count, NOBODY, np.int64) for _ in range(3))
        self.write_time, self.read_time, self.write_warp_time, self.read_warp_time = (
            np.zeros(count, np.int32) for _ in range(4)
        )
        self.by: Bits = np.zeros(count, np.int64)  # the writing instruction
        self.instructions: list[Instruction] = []
        self.numbers: dict[int, int] = {}
        self.block_time = np.zeros(blocks, np.int32)
        self.warp_time = np.zeros(blocks * threads // 32, np.int32)

    def blocks_met(self, blocks: Lanes) -> None:
        self.block_time[blocks] += 1

    def warps_met(self, lanes: Lanes) -> None:
        self.warp_time[lanes // 32] += 1

    def places(self, lanes: Lanes, addresses: Lanes, size: int) -> tuple[Lanes, Lanes]:
        """Unit and lane of every pair of bytes."""
        steps = max(1, size // UNIT)
        block = lanes // self.threads
        units = (block * self.units + addresses // UNIT)[:, None] + np.arange(steps)
        return units.reshape(-1), np.repeat(lanes, steps)

    def between(self, lanes: Lanes, other_warp: Lanes, time: Lanes, warp_time: Lanes) -> Bits:
        """Whether no barrier of the block, and none of the lane's own warp, came since."""
        warp = lanes // 32
        unordered = time == self.block_time[lanes // self.threads]
        return unordered & ~((other_warp == warp) & (warp_time < self.warp_time[warp]))

    def read(self, lanes: Lanes, addresses: Lanes, size: int, i: Instruction) -> None:
        units, lanes = self.places(lanes, addresses, size)
        writer = self.writer[units]
        bad = (writer != NOBODY) & (writer != lanes)
        bad &= self.between(lanes, writer // 32, self.write_time[units], self.write_warp_time[units])
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            raise i.fault(
                f"thread {lanes[at] % self.threads} reads shared memory that thread {writer[at] % self.threads} writes "
                f"without a barrier between them ({self.instructions[self.by[units[at]]].text})"
            )
        warp = lanes // 32
        current = self.read_time[units] == self.block_time[lanes // self.threads]
        first = ~current | (self.reader[units] == NOBODY)
        self.reader[units] = np.where(first | (self.reader[units] == lanes), lanes, MANY)
        self.reader_warp[units] = np.where(first | (self.reader_warp[units] == warp), warp, MANY)
        # Several lanes of one instruction may read the same place: the last one is not the only one.
        shared = self.reader[units] != np.where(first, lanes, self.reader[units])
        if shared.any():
            self.reader[units[shared]] = MANY
            other = self.reader_warp[units] != warp
            self.reader_warp[units[other]] = MANY
        self.read_time[units] = self.block_time[lanes // self.threads]
        self.read_warp_time[units] = self.warp_time[warp]

    def write(self, lanes: Lanes, addresses: Lanes, size: int, i: Instruction) -> None:
        units, lanes = self.places(lanes, addresses, size)
        number = self.numbers.setdefault(id(i), len(self.instructions))
        if number == len(self.instructions):
            self.instructions.append(i)
        reader = self.reader[units]
        bad = (reader != NOBODY) & (reader != lanes)
        bad &= self.between(lanes, self.reader_warp[units], self.read_time[units], self.read_warp_time[units])
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            raise i.fault(
                f"thread {lanes[at] % self.threads} writes shared memory that another thread reads, without a barrier"
            )
        writer = self.writer[units]
        # Lanes of one instruction may write the same value twice: compilers do that with what they hold twice.
        bad = (writer != NOBODY) & (writer != lanes) & (self.by[units] != number)
        bad &= self.between(lanes, writer // 32, self.write_time[units], self.write_warp_time[units])
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            raise i.fault(
                f"thread {lanes[at] % self.threads} writes shared memory that thread {writer[at] % self.threads} "
                f"writes, without a barrier between them ({self.instructions[self.by[units[at]]].text})"
            )
        self.writer[units] = lanes
        self.by[units] = number
        self.write_time[units] = self.block_time[lanes // self.threads]
        self.write_warp_time[units] = self.warp_time[lanes // 32]
