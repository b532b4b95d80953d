"""``pytest benchmarks/bench_accumulate.py``: every shape, ours and each rival that can be imported."""

from __future__ import annotations

from typing import Any

import pytest
from cases import check_and_time, parameters


@pytest.mark.parametrize("make, form", parameters("accumulate"))
def test_accumulate(benchmark: Any, make: Any, form: str) -> None:
    check_and_time(benchmark, make, form)
