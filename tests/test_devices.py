"""Runs devices_apart.py in a process of its own: a registered device changes how autograd works for a whole process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def run_apart(marker: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", marker, str(HERE / "devices_apart.py")]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_quantization_on_a_device_that_refuses_tensors_of_the_cpu() -> None:
    run_apart("not gpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_quantization_on_a_gpu() -> None:
    run_apart("gpu")
