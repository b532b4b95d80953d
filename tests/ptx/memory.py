"""Memory of a launch: global memory by its real addresses with bounds, shared memory per block, asynchronous copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx.arithmetic import UNSIGNED, Bits
from ptx.source import SHARED_START

SHARED_WINDOW = 1 << 56  # generic addresses from here on are shared memory; no process has memory there
FIRST, ADDRESSES = 1 << 16, 1 << 47  # where a process may have memory
Lanes = Any  # int64 arrays


class Window:
    """All addresses of this process as one array; nothing is touched until an element is."""

    def __init__(self, size: int):
        self.__array_interface__ = {
            "version": 3,
            "data": (FIRST, False),
            "shape": ((ADDRESSES - FIRST) // size,),
            "typestr": f"<u{size}" if size > 1 else "|u1",
        }


class GlobalMemory:
    """The process's own memory, as far as ``regions`` (start, bytes) allow."""

    def __init__(self, regions: list[tuple[int, int]]):
        merged: list[list[int]] = []
        for start, size in sorted(regions):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], start + size)
            elif size:
                merged.append([start, start + size])
        self.starts = np.array([start for start, _ in merged], np.int64)
        self.stops = np.array([stop for _, stop in merged], np.int64)
        self.views = {width: np.asarray(Window(width // 8)) for width in (8, 16, 32, 64)}

    def bad(self, addresses: Lanes, size: int) -> Lanes:
        """Which of the accesses of ``size`` bytes are unaligned or outside."""
        if not self.starts.size:
            return np.arange(addresses.size)
        place = np.searchsorted(self.starts, addresses, "right") - 1
        good = (place >= 0) & (addresses + size <= self.stops[place]) & (addresses % size == 0)
        return np.flatnonzero(~good)

    def load(self, addresses: Lanes, width: int) -> Bits:
        return self.views[width][(addresses - FIRST) // (width // 8)]

    def store(self, addresses: Lanes, values: Bits, width: int) -> None:
        self.views[width][(addresses - FIRST) // (width // 8)] = values


class SharedMemory:
    """``blocks`` shared memories of ``size`` bytes, addressed by block and address."""

    def __init__(self, blocks: int, size: int):
        self.size = -(-size // 16) * 16
        # What nobody has written is not zero: bf16 and fp32 NaN.
        self.bytes = np.full(blocks * self.size, 0xFF, np.uint8)
        self.views = {width: self.bytes.view(UNSIGNED[width]) for width in (8, 16, 32, 64)}

    def bad(self, addresses: Lanes, size: int) -> Lanes:
        return np.flatnonzero((addresses < SHARED_START) | (addresses + size > self.size) | (addresses % size != 0))

    def load(self, blocks: Lanes, addresses: Lanes, width: int) -> Bits:
        return self.views[width][(blocks * self.size + addresses) // (width // 8)]

    def store(self, blocks: Lanes, addresses: Lanes, values: Bits, width: int) -> None:
        self.views[width][(blocks * self.size + addresses) // (width // 8)] = values


@dataclass
class Pending:
    """One asynchronous instruction of some lanes.

    group: each lane's number of commits when it was issued. arrays: what it needs, lane by lane.
    """

    instruction: Any
    lanes: Lanes
    group: Lanes
    arrays: tuple[Bits, ...]

    def part(self, which: Bits) -> Pending:
        return Pending(self.instruction, self.lanes[which], self.group[which], tuple(a[which] for a in self.arrays))


class Queue:
    """Asynchronous operations by groups, per lane, in the order of their issue (cp.async, wgmma)."""

    def __init__(self, lanes: int):
        self.committed = np.zeros(lanes, np.int64)
        self.pending: list[Pending] = []

    def add(self, instruction: Any, lanes: Lanes, *arrays: Bits) -> None:
        self.pending.append(Pending(instruction, lanes, self.committed[lanes], arrays))

    def commit(self, lanes: Lanes) -> None:
        self.committed[lanes] += 1

    def wait(self, lanes: Lanes, allowed: int) -> list[Pending]:
        """Takes out what ends now for ``lanes``: all but the last ``allowed`` groups; with -1 all, committed or not."""
        waiting = np.zeros(self.committed.size, bool)
        waiting[lanes] = True
        done, left = [], []
        for entry in self.pending:
            ready = waiting[entry.lanes] & (entry.group < self.committed[entry.lanes] - allowed)
            if ready.all():
                done.append(entry)
                continue
            if ready.any():
                done.append(entry.part(ready))
                entry = entry.part(~ready)
            left.append(entry)
        self.pending = left
        return done
