"""Time of a call on a GPU, from graphs replayed over rotating data, and what ``epmq tune`` does with it."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from epmq.errors import NumericalError
from epmq.kernels import tune
from epmq.kernels.arrivals import in_order
from epmq.kernels.int4_check import ensure_checked
from epmq.kernels.int4_launch import run
from epmq.kernels.layout import WHOLE_ROW, grid_words, kernel_group, packed_shapes
from epmq.kernels.tune import DTYPE_NAMES, Config, Key
from epmq.quantized import group_count

log = logging.getLogger("epmq")
Call = Callable[[], Any]
LAUNCHES, REPLAYS, ROUNDS = 20, 7, 4
WARM_SECONDS = 0.02  # an idle GPU takes some milliseconds to reach its clocks
HEAD_START = 4_000_000  # cycles, about 2 ms
ROTATION_BYTES = 2  # times the second-level cache that the rotating data must exceed


def copies_needed(bytes_each: int, device: torch.device) -> int:
    """How many copies of some data exceed the L2 cache twice over, at least 1 and at most 64."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(64, -(-ROTATION_BYTES * cache // max(bytes_each, 1)) + 1))


def microseconds(calls: Sequence[Call], seconds: float = 0.5) -> tuple[float, str]:
    """Median time of one call, and how it was taken. ``calls`` do the same on different copies of the data.

    At least 20 launches are captured in one graph, which is replayed several times between two events, and all that
    seven times. The GPU is busy before the first event until all is queued, so that no launch is timed; what cannot be
    captured is timed without a graph, the cost of its launches included. Slow calls are made less often, so that all
    takes about ``seconds``; one that takes a quarter of them is made twice, and its wall time taken.
    """
    for call in calls:
        call()
    once = wall(calls[0])
    if 4 * once > seconds:
        return 1e6 * once, "wall"
    launches = at_most(max(LAUNCHES, len(calls)), seconds / (2 * REPLAYS * once))
    many = [calls[i % len(calls)] for i in range(launches)]
    how, replay = "graph", _captured(many)
    if replay is None:
        how = "events"

        def replay() -> None:
            for call in many:
                call()

    rounds = at_most(ROUNDS, seconds / (2 * REPLAYS * launches * once))
    begun = time.perf_counter()
    while True:
        replay()
        torch.cuda.synchronize()
        if time.perf_counter() - begun >= WARM_SECONDS:
            break
    times = []
    for _ in range(at_most(REPLAYS, seconds / (2 * launches * once))):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if how == "graph":
            torch.cuda._sleep(HEAD_START)
        start.record()
        for _ in range(rounds):
            replay()
        stop.record()
        stop.synchronize()
        times.append(1e3 * start.elapsed_time(stop) / (rounds * launches))
    return statistics.median(times), how


def at_most(most: int, wanted: float) -> int:
    """``wanted`` as a whole number from 1 to ``most``."""
    return max(1, min(most, int(wanted)))


def wall(call: Call) -> float:
    """Seconds of one call and of the GPU's work for it."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def _captured(calls: Sequence[Call]) -> Call | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with in_order(), torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:  # it allocates or synchronises in a way that a graph cannot hold
        torch.cuda.synchronize()
        return None
    return graph.replay


def replayed(call: Callable[[], Tensor]) -> Tensor:
    """What a call that has run before gives when it is captured in a graph, and the graph replayed."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    out.fill_(float("nan"))
    graph.replay()
    return out.clone()


def tune_on_gpu(
    shapes: Iterable[tuple[int, int]], tokens: Iterable[int], group_size: int, dtype: torch.dtype
) -> dict[Key, Config]:
    """Time all candidates for layers ``(N, K)`` on the current device and keep the winners in the cache.

    group_size: as in a checkpoint, -1 for the whole row.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    buckets = sorted({tune.bucket(count) for count in tokens})
    keys = [
        tune.device_key(device, n, k, count, kernel_group(group_size, k) or WHOLE_ROW, dtype)
        for n, k in shapes
        for count in buckets
    ]
    found: dict[Key, Config] = tune.tune(keys, _milliseconds_if_it_runs)
    tune.store(found)
    return found


def _milliseconds_if_it_runs(key: Key, config: Config) -> float:
    """Infinite for a candidate that this GPU cannot run or computes wrongly, which is told."""
    try:
        return milliseconds(key, config)
    except (OutOfResources, NumericalError) as reason:
        log.warning("%s: left out (%s)", config, reason)
        return math.inf


def milliseconds(key: Key, config: Config, seconds: float = 0.5) -> float:
    """Time of one product, its weights rotated so that each is read from memory, not from the L2 cache; about
    ``seconds`` are spent on it."""
    device = torch.device("cuda", torch.cuda.current_device())
    dtype = next(dtype for dtype, name in DTYPE_NAMES.items() if name == key.dtype)
    words_shape, grid_shape = packed_shapes(key.out_features, key.in_features, key.group_size or -1)
    groups = group_count(key.in_features, key.group_size or -1)
    scales = torch.full((key.out_features, groups), 0.01, dtype=torch.float32, device=device)
    grid = grid_words(scales, None, grid_shape, dtype)
    x = torch.randn(key.tokens, key.in_features, dtype=dtype, device=device)
    ensure_checked(x, None, key.out_features, key.group_size, config)
    calls = []
    for _ in range(copies_needed(key.out_features * key.in_features // 2, device)):
        words = torch.randint(-(2**15), 2**15, words_shape, dtype=torch.int16, device=device)
        calls.append(partial(run, x, words, grid, None, key.out_features, key.group_size, config))
    return microseconds(calls, seconds)[0] / 1e3
