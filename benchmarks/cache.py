"""Weights as inference meets them: out of memory, not out of a cache that the call before has filled."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

MOST = 1_200_000_000  # bytes of copies of one weight


def last_level_bytes() -> int:
    """Size of the largest cache that the system reports for one core; 32 MiB where it reports none."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(path.read_text().strip().removesuffix("K")) * 1024 for path in sizes), default=32 * 2**20)


def beyond_cache() -> int:
    """Bytes that do not stay in that cache, but no more than MOST or an eighth of the memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(last_level_bytes() * 5 // 4, MOST, memory // 8)


def rotating(*tensors: Tensor) -> Callable[[], Sequence[Tensor]]:
    """A function that gives the next of enough copies of these tensors at every call."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    copies = itertools.cycle([[tensor.clone() for tensor in tensors] for _ in range(math.ceil(beyond_cache() / size))])
    return lambda: next(copies)


def read_rate_buffer() -> Tensor:
    """Ones to read for the bandwidth limit."""
    return torch.ones(max(beyond_cache(), 2**28) // 4)
