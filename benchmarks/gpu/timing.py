"""Times of calls that a graph cannot hold, what this very card can reach, and its clocks."""

from __future__ import annotations

import statistics
import subprocess
import time

import torch

from epmq.kernels.timing import Call, at_most, microseconds, wall

CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
_without_clocks: list[str] = []


def milliseconds(call: Call, repeats: int = 5, seconds: float = 3.0) -> float:
    """Median wall time of a call that may synchronise by itself; the first one is not counted.

    Of a slow one fewer are counted, so that all takes about ``seconds``.
    """
    first: float = wall(call)
    return 1e3 * statistics.median([float(wall(call)) for _ in range(at_most(repeats, seconds / first))])


def launch_microseconds(call: Call, calls: int = 300) -> float:
    """Wall time of a call in a row of them that nothing waits for: what Python and the driver take to launch it, where
    that is longer than the GPU's work."""
    for _ in range(20):
        call()
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        times.append(time.perf_counter() - begun)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(times) / calls


def clocks() -> str | None:
    """SM and memory clock (MHz), temperature and power of the first GPU as nvidia-smi tells them; None where it does
    not. One that takes long is not asked again: there are more than a hundred rows."""
    if _without_clocks:
        return None
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader,nounits", "--id=0"]
    begun = time.perf_counter()
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        _without_clocks.append(str(error))
        return None
    if time.perf_counter() - begun > 0.25:
        _without_clocks.append("slow")
    return said or None


def card_limits() -> dict[str, float]:
    """Copy rate (bytes read and written) and bf16 and fp32 product rates of this card, now."""
    source, target = (torch.empty(2**28, dtype=torch.int32, device="cuda").random_() for _ in range(2))
    # By a kernel: a copy in a graph may go through a copy engine, at two thirds of the rate.
    copy, _ = microseconds([lambda: torch.bitwise_not(source, out=target)])
    found = {"copy_tb_s": 2 * 2**30 / copy / 1e6}
    for dtype, size in ((torch.bfloat16, 8192), (torch.float32, 4096)):
        a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        taken, _ = microseconds([lambda a=a, b=b, out=out: torch.mm(a, b, out=out)])
        found[f"{str(dtype).removeprefix('torch.')}_tflop_s"] = 2 * size**3 / taken / 1e6
    return found
