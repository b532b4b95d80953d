"""Times on this machine: QuantLinear beside the dense nn.Linear it replaces, interleaved in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from epmq.devices import compute_device
from epmq.errors import ConfigError
from epmq.linear import QuantLinear
from epmq.memory import available_bytes

Call = Callable[[], object]
LEAST_ROUNDS = 5
MOST_ROUNDS = 200
COPIES = 4  # of a weight in fp32, while it is rounded


@dataclass(frozen=True)
class LayerTime:
    """Median milliseconds of one call on ``tokens`` rows, and the bytes of both weights."""

    rows: int
    columns: int
    tokens: int
    quantized_ms: float
    dense_ms: float
    quantized_bytes: int
    dense_bytes: int


def interleaved(calls: Mapping[str, Call], seconds: float, wait: Call = lambda: None) -> dict[str, float]:
    """Median milliseconds of each call; one round times each of them once. wait: for work that is still under way."""
    for call in calls.values():
        call()
    wait()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    stop = time.perf_counter() + seconds
    rounds = 0
    while (time.perf_counter() < stop or rounds < LEAST_ROUNDS) and rounds < MOST_ROUNDS:
        rounds += 1
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            wait()
            taken[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(times) for name, times in taken.items()}


def time_layers(
    shapes: list[tuple[int, int]],
    tokens: list[int],
    bits: int = 4,
    group_size: int = 128,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seconds: float = 1.0,
) -> Iterator[LayerTime]:
    """One result per shape (out, in) and number of tokens, as they are measured. ``seconds`` is spent on each.

    Raises ConfigError, before anything is measured, for settings that no layer has and shapes that do not fit.
    """
    home = compute_device(device)
    QuantLinear(1, 1, bits=bits, group_size=group_size)  # refuses what no layer has
    free = available_bytes()
    for rows, columns in shapes:
        needed = COPIES * 4 * rows * columns
        if needed > free:
            raise ConfigError(
                f"shape {rows}x{columns}: rounding it takes {needed / 2**30:,.0f} GiB, and {free / 2**30:,.0f} GiB are"
                " free."
            )
    return _times(shapes, tokens, bits, group_size, dtype, home, seconds)


@torch.no_grad()
def _times(
    shapes: list[tuple[int, int]],
    tokens: list[int],
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    home: torch.device,
    seconds: float,
) -> Iterator[LayerTime]:
    wait: Call = torch.cuda.synchronize if home.type == "cuda" else lambda: None
    for rows, columns in shapes:
        dense = nn.Linear(columns, rows, bias=False, dtype=dtype)
        quantized = QuantLinear.from_linear(dense, bits, group_size).to(home)
        dense = dense.to(home)
        stored = sum(t.numel() * t.element_size() for t in quantized.state_dict().values())
        for count in tokens:
            x = torch.randn(count, columns, dtype=dtype, device=home)
            times = interleaved({"quantized": lambda: quantized(x), "dense": lambda: dense(x)}, seconds, wait)  # noqa: B023
            size = dense.weight.numel() * dense.weight.element_size()
            yield LayerTime(rows, columns, count, times["quantized"], times["dense"], stored, size)


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """ "4096x4096,11008x4096" as (out, in) pairs. Raises ConfigError naming the part that is not a shape."""
    shapes = []
    for part in text.split(","):
        sides = part.strip().lower().split("x")
        if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
            raise ConfigError(f"shape {part.strip()!r}: give OUTxIN, such as 4096x4096.")
        shapes.append((int(sides[0]), int(sides[1])))
    return shapes


def parse_counts(text: str) -> list[int]:
    """ "1,16,64" as positive numbers. Raises ConfigError naming the part that is none."""
    for part in text.split(","):
        if not part.strip().isdecimal() or int(part) < 1:
            raise ConfigError(f"tokens {part.strip()!r}: give positive numbers, such as 1,16,64.")
    return [int(part) for part in text.split(",")]
