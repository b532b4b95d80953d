"""``pytest benchmarks/bench_subtract_gram.py``: the blocked factor's updates."""

from __future__ import annotations

from typing import Any

import pytest
from cases import check_and_time, parameters


@pytest.mark.parametrize("make, form", parameters("subtract_gram"))
def test_subtract_gram(benchmark: Any, make: Any, form: str) -> None:
    check_and_time(benchmark, make, form)
