"""What memory accesses cost: bank conflicts in shared memory, 32-byte sectors of global memory, by instruction."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ptx.memory import Lanes
from ptx.source import Instruction

BANKS, SECTOR = 32, 32


@dataclass
class Cost:
    """Of one instruction over a run. least: passes or sectors that the same bytes need at least."""

    text: str
    space: str
    taken: int = 0
    least: int = 0


@dataclass
class Traffic:
    costs: dict[tuple[int, str], Cost] = field(default_factory=dict)

    def access(self, i: Instruction, space: str, lanes: Lanes, addresses: Lanes, size: int) -> None:
        """One access of ``size`` bytes a lane."""
        if not lanes.size:
            return
        cost = self.costs.setdefault((id(i), space), Cost(i.text, space))
        warp = lanes // 32
        if space == "global":
            # One request a warp: the sectors it touches.
            first = addresses // SECTOR
            touched = np.unique(np.stack([warp, first], 1), axis=0)
            cost.taken += len(touched)
            words = np.unique(np.stack([warp, addresses // size], 1), axis=0)
            _, counts = np.unique(words[:, 0], return_counts=True)
            cost.least += int((-(-counts * size // SECTOR)).sum())
            return
        # Shared memory serves 128 bytes in a pass: 8 lanes of 16 bytes, 16 of 8, 32 of 4 and less.
        together = min(32, 128 // size) if size > 4 else 32
        turn = lanes // together
        steps = max(1, size // 4)
        words = (addresses // 4)[:, None] + np.arange(steps)
        pairs = np.unique(np.stack([np.repeat(turn, steps), words.reshape(-1)], 1), axis=0)
        banks = pairs[:, 0] * BANKS + pairs[:, 1] % BANKS
        each, counts = np.unique(banks, return_counts=True)
        turns, starts = np.unique(each // BANKS, return_index=True)
        cost.taken += int(np.maximum.reduceat(counts, starts).sum())
        cost.least += turns.size
