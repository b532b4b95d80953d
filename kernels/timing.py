"""Times configurations of the int4 product on the GPU at hand, for ``epmq tune``."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

import torch
from epmq.kernels.int4_matmul import ensure_checked, run
from epmq.kernels.layout import WHOLE_ROW, grid_words, kernel_group, packed_shapes
from epmq.kernels.tune import DTYPE_NAMES, Config, Key

from epmq.kernels import tune
from epmq.quantized import group_count

LAUNCHES = 32  # in a CUDA graph, so that the cost of a launch from Python is not timed
REPEATS = 7


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
    """Median time of one product, its weights rotated so that each is read from memory, not from the L2 cache."""
    device = torch.device("cuda", torch.cuda.current_device())
    dtype = next(dtype for dtype, name in DTYPE_NAMES.items() if name == key.dtype)
    words_shape, grid_shape = packed_shapes(key.out_features, key.in_features, key.group_size or -1)
    size = key.out_features * key.in_features // 2
    copies = min(LAUNCHES, 2 + 2 * torch.cuda.get_device_properties(device).L2_cache_size // size)
    words = [torch.randint(-(2**15), 2**15, words_shape, dtype=torch.int16, device=device) for _ in range(copies)]
    scales = torch.full((key.out_features, group_count(key.in_features, key.group_size or -1)), 0.01, device=device)
    grid = grid_words(scales, None, grid_shape, dtype)
    x = torch.randn(key.tokens, key.in_features, device=device).to(dtype)
    ensure_checked(x, config, key.group_size)

    def launch(number: int) -> None:
        run(x, words[number % copies], grid, None, key.out_features, key.group_size, config)

    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(LAUNCHES):
            launch(number)
    times: list[float] = []
    for _ in range(REPEATS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / LAUNCHES)
    return statistics.median(times)
