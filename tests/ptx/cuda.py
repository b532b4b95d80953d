"""CUDA sources compiled to PTX by nvcc, for machines without a GPU."""

from __future__ import annotations

from pathlib import Path

from csrc.cuda.check import compile_source, plain_name
from ptx.machine import Program
from ptx.source import kernels


def programs(source: Path, arch: str, folder: Path) -> dict[str, Program]:
    """Every kernel of a file by name and template arguments, such as ``fp32_kernel<float>``; arch: 80, 90a."""
    out = folder / f"{source.stem}-{arch}.ptx"
    done = compile_source(source, out, "nvcc", "--ptx", f"-arch=compute_{arch}")
    assert done.returncode == 0, done.stderr
    return {plain_name(kernel.name).split("::")[-1]: Program(kernel) for kernel in kernels(out.read_text())}
