"""Memory of this process: what it holds, its peak, what it may still take, and giving back what is free."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from pathlib import Path

# Limit and use of the control group a container runs in, in both versions.
CONTROL_GROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    if (told := _status("VmHWM")) is not None:
        return told
    # Which counts what the process that started this one held then.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def give_back_free_memory() -> None:
    """Return the pages of freed tensors to the system, where the C library can be asked to (glibc).

    Tensors of a few MiB leave holes in the heap that the next group's do not fit; without this a deep model's peak
    drifts upwards by what the holes add.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def resident_bytes() -> int:
    """What this process holds now; its peak where the system does not tell."""
    told = _status("VmRSS")
    return peak_memory_bytes() if told is None else told


def available_bytes() -> int:
    """What this process can still take: the least of the machine's, its control group's and its own limit's."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") - resident_bytes()]
    found += [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]
    for limit, used in CONTROL_GROUP_FILES:
        limits, uses = _lines(limit), _lines(used)
        if limits and uses and limits[0].isdigit():
            found.append(int(limits[0]) - int(uses[0]))
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        found.append(address_space - (_status("VmSize") or 0))
    return max(0, min(found))


def _status(name: str) -> int | None:
    """Bytes that the system tells of this process under a name; None where it does not."""
    lines = [line for line in _lines("/proc/self/status") if line.startswith(f"{name}:")]
    return int(lines[0].split()[1]) * 1024 if lines else None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
