"""``pytest benchmarks/bench_gptq_settings.py``: plain GPTQ of a weight, and what clip search and E-PMQ's target add."""

from __future__ import annotations

from typing import Any

import pytest
from cases import check_and_time, parameters


@pytest.mark.parametrize("make, form", parameters("gptq_settings"))
def test_gptq_settings(benchmark: Any, make: Any, form: str) -> None:
    check_and_time(benchmark, make, form)
