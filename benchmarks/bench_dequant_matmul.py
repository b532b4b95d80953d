"""``pytest benchmarks/bench_dequant_matmul.py``: every shape, ours and each rival that can be imported."""

from __future__ import annotations

from typing import Any

import pytest
from cases import check_and_time, parameters


@pytest.mark.parametrize("make, form", parameters("dequant_matmul"))
def test_dequant_matmul(benchmark: Any, make: Any, form: str) -> None:
    check_and_time(benchmark, make, form)
