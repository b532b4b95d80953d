"""What the launches of all kernels share: the interpreter, the current device, rows that kernels can read, and a start
without Triton's look at every argument."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

LARGEST_STRIDE = 2**31 // 256  # elements; no kernel's tile has more than 256 rows of tokens


def interpreted() -> bool:
    """Whether Triton runs its programs in its interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Programs are launched on the current device's current stream: make that the tensor's device."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def row_stride(rows: Tensor) -> int:
    """Elements from a row to the next; a single row's own stride may be anything, and is not used."""
    return rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]


def readable(rows: Tensor, multiple: int) -> Tensor:
    """``rows`` with a multiple of so many columns, each row 16-byte aligned: as they are, or copied before zeros.

    multiple: a multiple of 16. Strides are multiples of 16 elements, which lets Triton copy 16 bytes at a time, and
    small enough for 32-bit places inside a tile.
    """
    missing = -rows.shape[1] % multiple
    stride = row_stride(rows)
    aligned = rows.data_ptr() % 16 == 0 and stride % 16 == 0 and stride < LARGEST_STRIDE
    if not missing and rows.stride(1) == 1 and aligned:
        return rows
    copy = rows.new_zeros(rows.shape[0], rows.shape[1] + missing)
    copy[:, : rows.shape[1]] = rows
    return copy


class Launch:
    """A program on a grid with its constants; from the second call on it starts as it was compiled for the first.

    Triton looks at all arguments of every call to find the form it compiled for such ones, which takes several times as
    long as starting that. Arguments of all calls must therefore be alike in what it looks at: dtypes, which of them are
    None, on which 16 bytes tensors begin, and the numbers themselves; and the device, current at each call, the same.
    """

    def __init__(self, program: Any, grid: tuple[int, ...], **options: Any):
        self.program, self.grid, self.options = program, (*grid, 1, 1)[:3], options
        self.constants: tuple[Any, ...] = ()
        self.start: Any = None

    def __call__(self, *arguments: Any) -> None:
        if self.start is not None:
            self.start(*arguments, *self.constants)
            return
        compiled = self.program[self.grid](*arguments, **self.options)
        if compiled is not None:  # the interpreter compiles nothing
            names = self.program.arg_names[len(arguments) :]
            self.constants = tuple(self.options[name] for name in names)
            self.start = compiled[self.grid]
