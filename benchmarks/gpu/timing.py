"""Wall time of a call that may wait for the GPU by itself, and what this very card can reach."""

from __future__ import annotations

import statistics
import time

import torch

from epmq.kernels.timing import Call, microseconds


def milliseconds(call: Call, repeats: int = 5) -> float:
    """Median wall time of a call that may synchronise by itself; the first one is not counted."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def card_limits() -> dict[str, float]:
    """Copy rate (bytes read and written) and bf16 and fp32 product rates of this card, now."""
    source, target = (torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))
    copy, _ = microseconds([lambda: target.copy_(source)])
    found = {"copy_tb_s": 2 * 2**30 / copy / 1e6}
    for dtype, size in ((torch.bfloat16, 8192), (torch.float32, 4096)):
        a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        taken, _ = microseconds([lambda a=a, b=b, out=out: torch.mm(a, b, out=out)])
        found[f"{str(dtype).removeprefix('torch.')}_tflop_s"] = 2 * size**3 / taken / 1e6
    return found
