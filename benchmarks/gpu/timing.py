"""Time of a call on a GPU: CUDA graphs over rotating data, medians, and what this very card can reach."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]
LAUNCHES, REPLAYS = 20, 7
ROTATION_BYTES = 2  # times the second-level cache that the rotating data must exceed


def copies_needed(bytes_each: int, device: torch.device) -> int:
    """How many copies of some data exceed the L2 cache twice over, at least 1 and at most 64."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(64, -(-ROTATION_BYTES * cache // max(bytes_each, 1)) + 1))


def microseconds(calls: Sequence[Call]) -> tuple[float, str]:
    """Median time of one call, and how it was taken. ``calls`` do the same on different copies of the data.

    At least 20 launches are captured in one graph, which is replayed 7 times between events; what cannot be captured is
    timed without a graph, launch cost included.
    """
    many = [calls[i % len(calls)] for i in range(max(LAUNCHES, len(calls)))]
    for call in calls:
        call()
    torch.cuda.synchronize()
    how, run = "graph", _captured(many)
    if run is None:
        how = "events"

        def run() -> None:
            for call in many:
                call()

    times = []
    for _ in range(REPLAYS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(1e3 * start.elapsed_time(stop) / len(many))
    return statistics.median(times), how


def _captured(calls: Sequence[Call]) -> Call | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:  # it allocates or synchronises in a way that a graph cannot hold
        torch.cuda.synchronize()
        return None
    return graph.replay


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
        taken, _ = microseconds([lambda a=a, b=b, out=out: torch.mm(a, b, out=out)])  # type: ignore[misc]
        found[f"{str(dtype).removeprefix('torch.')}_tflop_s"] = 2 * size**3 / taken / 1e6
    return found
