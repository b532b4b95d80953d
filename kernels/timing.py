"""Time of a call on a GPU, from graphs replayed over rotating data, and what ``epmq tune`` does with it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from epmq.kernels import tune
from epmq.kernels.int4_matmul import ensure_checked, run
from epmq.kernels.layout import WHOLE_ROW, grid_words, kernel_group, packed_shapes
from epmq.kernels.tune import DTYPE_NAMES, Config, Key
from epmq.quantized import group_count

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

    At least 20 launches are captured in one graph, which is replayed 7 times between events, so that the cost of a
    launch from Python is not timed; what cannot be captured is timed without a graph, that cost included.
    """
    many = [calls[i % len(calls)] for i in range(max(LAUNCHES, len(calls)))]
    for call in calls:
        call()
    torch.cuda.synchronize()
    how, replay = "graph", _captured(many)
    if replay is None:
        how = "events"

        def replay() -> None:
            for call in many:
                call()

    times = []
    for _ in range(REPLAYS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
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
    found: dict[Key, Config] = tune.tune(keys, milliseconds)
    tune.store(found)
    return found


def milliseconds(key: Key, config: Config) -> float:
    """Time of one product, its weights rotated so that each is read from memory, not from the L2 cache."""
    device = torch.device("cuda", torch.cuda.current_device())
    dtype = next(dtype for dtype, name in DTYPE_NAMES.items() if name == key.dtype)
    words_shape, grid_shape = packed_shapes(key.out_features, key.in_features, key.group_size or -1)
    scales = torch.full((key.out_features, group_count(key.in_features, key.group_size or -1)), 0.01, device=device)
    grid = grid_words(scales, None, grid_shape, dtype)
    x = torch.randn(key.tokens, key.in_features, device=device).to(dtype)
    ensure_checked(x, config, key.group_size)
    calls = []
    for _ in range(copies_needed(key.out_features * key.in_features // 2, device)):
        words = torch.randint(-(2**15), 2**15, words_shape, dtype=torch.int16, device=device)
        calls.append(partial(run, x, words, grid, None, key.out_features, key.group_size, config))
    return microseconds(calls)[0] / 1e3
