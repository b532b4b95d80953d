"""Quantization on a GPU; and devices_apart.py in a process of its own.

A registered device changes how autograd works for a whole process: that of a GPU then fails inside torch.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_toy_job

import epmq
from epmq.devices import home_of

HERE = Path(__file__).parent
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "regmean": {"method": "regmean", "gamma": 0.9, "alpha": 0.0, "diagnostics": False},
    "rtn": {"method": "rtn"},
    "auto anchor": {"anchor": "auto", "rho": 1.5, "diagnostics": False},
    "3 bits, refits": {"bits": 3, "group_size": 4, "scale_refit": True, "norm_refit": True, "diagnostics": False},
    "late grids": {"act_order": False, "static_groups": False, "group_size": 4, "diagnostics": False},
    "distilled": {"distill": {"steps": 1, "copies": 1, "examples": 2}, "diagnostics": False},
}


def test_quantization_on_a_device_that_refuses_tensors_of_the_cpu() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / "devices_apart.py")]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_gpu_gives_nearly_the_same_model(settings: dict[str, Any]) -> None:
    """The targets agree to fp32 rounding; codes may differ where it falls on a tie, and what follows from them."""
    job, config = make_toy_job(2, 16, 2), epmq.QuantConfig(**settings)
    results = [
        epmq.quantize(job.merged, job.experts, job.calibration, config, job.base, device=device)
        for device in ("cpu", "cuda")
    ]
    for task, errors in results[0].report["average_error"].items():
        for method, error in errors.items():
            assert results[1].report["average_error"][task][method] == pytest.approx(error, rel=0.05)
    assert home_of(results[1].model) == torch.device("cpu")
