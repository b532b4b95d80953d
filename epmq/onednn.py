"""fp32 linears of forward passes by oneDNN, where the library that torch gives them to is the slower one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from epmq import extension
from epmq.gradient import in_forward_mode


class Linears(TorchFunctionMode):
    """While active, fp32 linears on the CPU that carry no gradient are oneDNN's: the same sums in another order."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and not types and _suits(*args, **kwargs):
            return linear(*args, **kwargs)
        return func(*args, **kwargs)


def preferred() -> bool:
    """Whether to use it: where MKL takes half of the processor and oneDNN all of it."""
    usable = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return usable and extension.beats_library()


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input · weightᵀ + bias`` by oneDNN: fp32 ``[..., K]``, ``[N, K]`` and ``[N]`` on the CPU, none empty."""
    # The operator reads a bias as if it had no gaps.
    dense = None if bias is None else bias.contiguous()
    rows = enough = len(input)
    if input.dim() == 2 and (enough := _rows_compiled_for(rows)) != rows:
        padded = input.new_empty(enough, input.shape[1])
        padded[:rows] = input
        padded[rows:] = 0.0
        input = padded
    y: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, dense, "none", [], "")
    return y if enough == rows else y[:rows]


def _rows_compiled_for(rows: int) -> int:
    """So many rows or up to an eighth more: oneDNN compiles and keeps a program of half a MiB for each number of rows,
    and where they are gathered, as for the experts of a mixture, each call has another."""
    step: int = max(1, (1 << (rows - 1).bit_length()) // 16)
    return -(-rows // step) * step


def _suits(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    given = [tensor for tensor in (input, weight, bias) if tensor is not None]
    return (
        not torch.compiler.is_compiling()
        and not in_forward_mode()
        and not torch.is_autocast_enabled("cpu")
        and all(tensor.is_cpu and tensor.dtype == torch.float32 for tensor in given)
        and all(tensor.layout == torch.strided for tensor in given)
        and min(input.numel(), weight.numel()) > 0
        # All else that torch takes, and what it refuses, is its own to take or refuse.
        and weight.dim() == 2
        and input.shape[-1:] == weight.shape[1:]
        and (bias is None or bias.shape == weight.shape[:1])
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))
    )
