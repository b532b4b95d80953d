"""The cases of the registry as parameters of pytest-benchmark."""

from __future__ import annotations

from typing import Any

import pytest
from registry import makers

RIVALS = {
    "accumulate": ("two torch.addmm", "two oneDNN products"),
    "gptq_sweep": ("PyTorch reference",),
    "subtract_product": ("torch.addmm", "oneDNN product"),
    "subtract_gram": ("PyTorch reference",),
    "gptq_settings": ("clip: mse", "clip: hessian", "E-PMQ target too"),
    "dequant_matmul": ("dense fp32 F.linear", "dense fp32 oneDNN", "dense bf16 F.linear", "aten int4pack bf16"),
}


def parameters(op: str) -> list[Any]:
    """(case maker, "ours" or a rival) of one operation; cases are made when they run."""
    wanted = [(make, name) for make, name in zip(makers(), names(), strict=True) if name.startswith(op)]
    return [
        pytest.param(make, form, id=f"{name.removeprefix(op + ' ')}-{form}")
        for make, name in wanted
        for form in ("ours", *RIVALS[op])
    ]


def names() -> list[str]:
    """A name per maker, in order, from the arguments that it binds."""
    return [f"{make.op} {'x'.join(map(str, make.shape))} {make.dtype}" for make in makers()]


def check_and_time(benchmark: Any, make: Any, form: str) -> None:
    """Time one form of one case; rivals that do not apply here are skipped by name."""
    case = make()
    calls = {"ours": case.ours, **case.rivals}
    if form not in calls:
        pytest.skip(f"{form}: absent, or not for this dtype")
    benchmark.extra_info.update(op=case.op, case=case.name, bytes_read=case.bytes_read, flops=case.flops)
    benchmark(calls[form])
