"""What is installed and what is used, for ``epmq env`` and bug reports."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch

from epmq import __version__, extension, onednn, ops
from epmq.quantized import packed_words
from epmq.report import machine

OPTIONAL = ("transformers", "compressed-tensors", "triton", "scikit-learn", "matplotlib")
# Of the layer for which it is told what is used: the choice may depend on its size.
WIDTH, GROUP, BITS, TOKENS = 2048, 128, 4, 16
# Operations that see inputs in the dtype the model runs in; all others compute in fp32.
OF_INPUTS = ("accumulate", "dequant_matmul")


def describe() -> list[str]:
    """Lines of ``name: value``."""
    lines = [f"epmq: {__version__}"]
    lines += [f"{key}: {value}" for key, value in machine().items()]
    for package in OPTIONAL:
        try:
            lines.append(f"{package}: {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{package}: absent")
    built = extension.build_report()
    lines += [f"extension {key}: {value}" for key, value in built.items()] or ["extension: absent"]
    lines.append(f"fp32 linears of forward passes: {'oneDNN' if onednn.preferred() else 'torch'}")
    lines.append(f"EPMQ_BACKEND: {ops.wanted_backend() or 'not set'}")
    lines.append(f"used for a layer of {WIDTH} x {WIDTH} and {TOKENS} tokens:")
    for op in ops.operations():
        used = [f"{_used(op, 'cpu', torch.float32)} for fp32 on the CPU"]
        if torch.cuda.is_available():
            used += [f"{_used(op, 'cuda', torch.float32)} for fp32 on the GPU"]
            used += [f"{_used(op, 'cuda', torch.bfloat16)} for bf16 there"] if op in OF_INPUTS else []
        forms = [form.backend for form in ops.implementations(op)]
        lines.append(f"{op}: {', '.join(used)}; registered: {', '.join(forms)}")
    return lines


def _used(op: str, device: str, dtype: torch.dtype) -> str:
    """The backend that runs an operation on inputs of a dtype."""
    return ops.choose(op, *_arguments(op, device, dtype)).backend


def _arguments(op: str, device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """What the operation is called with for a layer; the values are never read."""
    groups = WIDTH // GROUP

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    x, square, grid = empty(TOKENS, WIDTH, dtype=dtype), empty(WIDTH, WIDTH), empty(WIDTH, groups)
    codes = empty(WIDTH, packed_words(WIDTH, BITS), dtype=torch.int32)
    zeros = empty(WIDTH, groups, dtype=torch.uint8)
    return {
        "accumulate": (x, square, empty(WIDTH)),
        "gptq_sweep": (square, square, grid, grid, empty(WIDTH, dtype=torch.int32), BITS),
        "cholesky": (square,),
        "product": (square, square),
        "subtract_product": (square, empty(WIDTH, GROUP), empty(GROUP, WIDTH)),
        "subtract_gram": (square, empty(WIDTH, GROUP)),
        "grid_losses": (square, grid, grid, BITS, GROUP, 2.0),
        "dequant_matmul": (x, codes, grid, zeros, None, BITS, GROUP),
    }[op]
