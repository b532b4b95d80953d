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
        # wgmma sees what was written before a fence.proxy.async, of the writer or of its own lanes.
        self.clock = 0
        self.store_time = np.full(blocks * threads, -1, np.int32)  # of each lane's last store to global memory
        self.write_clock, self.fence_clock = np.zeros(count, np.int64), np.zeros(blocks * threads, np.int64)
        self.warp_time = np.zeros(blocks * threads // 32, np.int32)

    def blocks_met(self, blocks: Lanes) -> None:
        self.block_time[blocks] += 1

    def warps_met(self, lanes: Lanes) -> None:
        self.warp_time[lanes // 32] += 1

    def stored(self, lanes: Lanes) -> None:
        self.store_time[lanes] = self.block_time[lanes // self.threads]

    def release(self, lanes: Lanes, i: Instruction) -> None:
        """A release speaks for other lanes' stores only if a barrier lies between."""
        late = self.store_time.reshape(-1, self.threads) == self.block_time[:, None]
        for lane in lanes:
            late_others = late[lane // self.threads].copy()
            late_others[lane % self.threads] = False
            if late_others.any():
                raise i.fault("other threads of the block have stored to global memory since its last barrier")

    def fenced(self, lanes: Lanes) -> None:
        self.clock += 1
        self.fence_clock[lanes] = self.clock

    def read_by_proxy(self, lanes: Lanes, addresses: Lanes, i: Instruction) -> None:
        """Pairs of bytes that a warpgroup's wgmma reads.

        What cp.async brought is left out: by the ISA it needs the fence as well, but Triton 3.6 sets none there (its
        issue 9610, seen to matter on sm_100).
        """
        units, _ = self.places(lanes[:1], addresses, UNIT)
        stored = [number for number, writer in enumerate(self.instructions) if writer.operation != "cp"]
        writer = np.where(np.isin(self.by[units], stored), self.writer[units], NOBODY)
        bad = (writer != NOBODY) & (self.write_clock[units] >= self.fence_clock[writer])
        if (bad & (self.write_clock[units] >= self.fence_clock[lanes].min())).any():
            raise i.fault("no fence.proxy.async between what was written to shared memory and the wgmma that reads it")

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
        more = ~first & (self.reader[units] != lanes)
        wider = ~first & (self.reader_warp[units] != warp)
        self.reader[units], self.reader_warp[units] = lanes, warp
        self.reader[units[more]] = MANY
        self.reader_warp[units[wider]] = MANY
        # Several lanes of one instruction may use the same place: the last one is not the only one.
        self.reader[units[self.reader[units] != lanes]] = MANY
        self.reader_warp[units[self.reader_warp[units] != warp]] = MANY
        self.read_time[units] = self.block_time[lanes // self.threads]
        self.read_warp_time[units] = self.warp_time[warp]

    def write(self, lanes: Lanes, addresses: Lanes, size: int, i: Instruction, differs: Bits = False) -> None:
        """differs: from what lies there, lane by lane."""
        differs = np.repeat(np.broadcast_to(differs, lanes.shape), max(1, size // UNIT))
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
        bad = (writer != NOBODY) & (writer != lanes) & ((self.by[units] != number) | differs)
        bad &= self.between(lanes, writer // 32, self.write_time[units], self.write_warp_time[units])
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            raise i.fault(
                f"thread {lanes[at] % self.threads} writes shared memory that thread {writer[at] % self.threads} "
                f"writes, without a barrier between them ({self.instructions[self.by[units[at]]].text})"
            )
        self.clock += 1
        self.write_clock[units] = self.clock
        self.writer[units] = lanes
        self.by[units] = number
        self.write_time[units] = self.block_time[lanes // self.threads]
        self.write_warp_time[units] = self.warp_time[lanes // 32]
