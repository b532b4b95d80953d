"""Counters of programs that have arrived: zero when a launch begins, left as zero when it ends, one launch's alone.

Launches of a stream run one after the other and share theirs. A captured launch may be replayed beside anything else
and has its own for good. Both come out of one piece of memory a device, so that no launch is needed to zero them.
"""

from __future__ import annotations

import threading

import torch
import triton
from torch import Tensor

TOTAL = 2**20  # a device's
OF_STREAM = 4096
ALIGNED = 32  # whole lines of the cache, which also begin where Triton compiles for


class Counters:
    """Those of one device."""

    def __init__(self, device: torch.device):
        self.zeros = torch.zeros(TOTAL, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # other streams do not wait for the one that zeroes
        self.taken = 0
        self.of_stream: dict[int, Tensor] = {}
        self.lock = threading.Lock()

    def take(self, count: int) -> Tensor:
        """``count`` that nobody else gets; when all are taken, new ones, which the current stream zeroes."""
        with self.lock:
            first, end = self.taken, self.taken + -(-count // ALIGNED) * ALIGNED
            if end > TOTAL:
                return torch.zeros(count, dtype=torch.int32, device=self.zeros.device)
            self.taken = end
        return self.zeros[first:end]


_of_device: dict[torch.device, Counters] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """At least ``count`` int32 zeros for a launch on the device's current stream; the device is the current one.

    While a graph is captured before any other launch of the device, the graph zeroes them itself.
    """
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    known = _of_device.get(device)
    if known is None:
        if captured:
            return torch.zeros(count, dtype=torch.int32, device=device)
        known = _of_device[device] = Counters(device)
    if captured:
        return known.take(count)
    stream = triton.runtime.driver.active.get_current_stream(device.index) if device.type == "cuda" else 0
    found = known.of_stream.get(stream)
    if found is None or len(found) < count:
        found = known.of_stream[stream] = known.take(max(count, OF_STREAM))
    return found
