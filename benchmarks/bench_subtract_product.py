"""``pytest benchmarks/bench_subtract_product.py``: products of the target's solve."""

from __future__ import annotations

from typing import Any

import pytest
from cases import check_and_time, parameters


@pytest.mark.parametrize("make, form", parameters("subtract_product"))
def test_subtract_product(benchmark: Any, make: Any, form: str) -> None:
    check_and_time(benchmark, make, form)
