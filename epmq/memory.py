"""Memory of this process: its peak, and giving back what is free."""

from __future__ import annotations

import ctypes
import platform
import resource
import sys


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def give_back_free_memory() -> None:
    """Return the pages of freed tensors to the system, where the C library can be asked to (glibc).

    Tensors of a few MiB leave holes in the heap that the next block's do not fit; without this a deep model's peak
    drifts upwards by what the holes add.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
