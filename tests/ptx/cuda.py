"""CUDA sources compiled to PTX by nvcc, for machines without a GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

from ptx.machine import Program
from ptx.source import kernels


def programs(source: Path, arch: str, folder: Path) -> dict[str, Program]:
    """Every kernel of a file by name and template arguments, such as ``fp32_kernel<float>``; arch: 80, 90a."""
    out = folder / f"{source.stem}-{arch}.ptx"
    command = ["nvcc", "--ptx", "-O3", "-std=c++20", "-DUSE_CUDA", f"-arch=compute_{arch}", str(source), "-o", str(out)]
    command += COMMON_NVCC_FLAGS
    command += [part for path in include_paths() for part in ("-isystem", path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {}
    for kernel in kernels(out.read_text()):
        name = subprocess.run(["c++filt", kernel.name], capture_output=True, text=True).stdout
        found[name.removeprefix("void ").split("(epmq::")[0].split("::")[-1].strip()] = Program(kernel)
    return found
