"""Counters of programs that have arrived: zero when a launch begins, left as zero when it ends, one launch's alone.

Launches of a stream run one after the other and share theirs. A captured launch may be replayed beside anything else
and has its own for good, unless its graph's launches are said to be :func:`in_order`. All come out of one piece of
memory a device, so that no launch is needed to zero them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
from torch import Tensor

TOTAL = 2**20  # a device's
OF_STREAM = 4096
ALIGNED = 32  # whole lines of the cache, which also begin where Triton compiles for
IN_ORDER = -1  # in place of a stream


class Counters:
    """Those of one device."""

    def __init__(self, device: torch.device):
        # A thread's allocations may be directed into the pool of a graph that is to be captured: another thread's.
        with ThreadPoolExecutor(1) as other:
            self.zeros = other.submit(_zeros, device).result()
        self.taken = 0
        self.of_stream: dict[int, Tensor] = {}
        self.lock = threading.Lock()

    def take(self, count: int) -> Tensor | None:
        """``count`` that nobody else gets; None when not as many are left."""
        with self.lock:
            first, end = self.taken, self.taken + -(-count // ALIGNED) * ALIGNED
            if end > len(self.zeros):
                return None
            self.taken = end
        return self.zeros[first:end]

    def of(self, stream: int, count: int) -> Tensor | None:
        """At least ``count`` for launches that follow each other; None when not as many are left."""
        found = self.of_stream.get(stream)
        if found is None or len(found) < count:
            found = self.take(max(OF_STREAM, 1 << (count - 1).bit_length()))
            if found is not None:
                self.of_stream[stream] = found
        return found


def _zeros(device: torch.device) -> Tensor:
    zeros = torch.zeros(TOTAL, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # other streams do not wait for the one that zeroes
    return zeros


_of_device: dict[torch.device, Counters] = {}
_lock = threading.Lock()
_here = threading.local()


def counters(device: torch.device, count: int) -> Tensor:
    """At least ``count`` int32 zeros for a launch on the device's current stream; the device is the current one.

    When all are taken, and while a graph is captured before any other launch of the device, a launch more zeroes them.
    """
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    known = _of_device.get(device)
    if known is None and not captured:
        with _lock:
            known = _of_device.get(device) or Counters(device)
            _of_device[device] = known
    if known is None:
        found = None
    elif not captured:
        found = known.of(_stream(device), count)
    elif getattr(_here, "in_order", False):
        found = known.of(IN_ORDER, count)
    else:
        found = known.take(count)
    return torch.zeros(count, dtype=torch.int32, device=device) if found is None else found


def _stream(device: torch.device) -> int:
    return int(triton.runtime.driver.active.get_current_stream(device.index)) if device.type == "cuda" else 0


@contextlib.contextmanager
def in_order() -> Iterator[None]:
    """What this thread captures meanwhile shares counters: graphs of one stream each, none replayed beside another."""
    _here.in_order = True
    try:
        yield
    finally:
        _here.in_order = False
