"""Numbers as a person reads them, and the steps of a colour scale."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable

STEPS = 8
DECADES = 1e3


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


class Scale:
    """Colour steps for values: logarithmic over the last three decades, or one per value where there are few."""

    def __init__(self, values: Iterable[float], exact: bool = False):
        used = sorted({value for value in values if math.isfinite(value)})
        self.values = used if exact and len(used) <= STEPS else None
        positive = [value for value in used if value > 0.0]
        self.bounds: list[float] = []
        if self.values is None and positive:
            high = math.log(positive[-1])
            low = max(math.log(positive[0]), high - math.log(DECADES))
            self.bounds = [math.exp(low + (high - low) * step / STEPS) for step in range(1, STEPS)]

    def step(self, value: float) -> int:
        """0 is the least, STEPS - 1 the greatest; what is not finite stands at the end."""
        if not math.isfinite(value):
            return STEPS - 1
        if self.values is not None:
            return round((STEPS - 1) * self.values.index(value) / max(1, len(self.values) - 1))
        return bisect_right(self.bounds, value)
