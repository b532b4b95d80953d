"""Numbers as a person reads them, and the steps of a colour scale."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable

STEPS = 8


def percent(share: float) -> str:
    """A share in percent with two digits that matter: 0.034 is "3.4"."""
    value = 100.0 * share
    if not math.isfinite(value):
        return "not finite"
    if 0.0 < value < 0.01:
        return "<0.01"
    return f"{value:.2f}" if value < 1.0 else f"{value:.1f}" if value < 10.0 else f"{value:.0f}"


def size(count: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds, or minutes and hours where there are many."""
    if seconds < 100.0:
        return f"{seconds:.1f} s" if seconds >= 1.0 else f"{1000.0 * seconds:.0f} ms"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def thresholds(values: Iterable[float]) -> list[float]:
    """The STEPS - 1 inner bounds of a logarithmic colour scale over the positive, finite values."""
    used = [value for value in values if math.isfinite(value) and value > 0.0]
    if not used:
        return []
    low, high = math.log(min(used)), math.log(max(used))
    return [math.exp(low + (high - low) * step / STEPS) for step in range(1, STEPS)] if high > low else []


def step_of(value: float, bounds: list[float]) -> int:
    """Where a value stands on the scale, 0 the least; what is not finite stands at the end."""
    return bisect_right(bounds, value) if math.isfinite(value) else STEPS - 1
