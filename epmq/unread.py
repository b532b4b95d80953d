"""A tensor that is computed when its values are read; what it is like, such as its dtype, can be asked before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_ATTRIBUTES = (
    "dtype",
    "device",
    "shape",
    "layout",
    "ndim",
    "requires_grad",
    "is_cuda",
    "is_cpu",
    "is_meta",
    "is_sparse",
)
_METHODS = ("size", "dim", "numel", "nelement", "element_size", "is_floating_point", "__len__")
_FACTS = {getattr(Tensor, name).__get__ for name in _ATTRIBUTES} | {getattr(Tensor, name) for name in _METHODS}


class UnreadTensor(Tensor):
    """``compute()`` as a tensor, called once, by whatever needs more of it than shape, dtype and device."""

    _compute: Callable[[], Tensor]
    _value: Tensor | None

    @staticmethod
    def __new__(
        cls, compute: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> UnreadTensor:
        unread: UnreadTensor = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        unread._compute, unread._value = compute, None
        return unread

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FACTS:
            return super().__torch_function__(func, types, args, kwargs or {})
        return func(*tree_map(read, args), **tree_map(read, kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*tree_map(read, args), **tree_map(read, kwargs or {}))


def read(value: Any) -> Any:
    """The tensor that an UnreadTensor stands for; anything else as it is."""
    if not isinstance(value, UnreadTensor):
        return value
    if value._value is None:
        value._value = value._compute()
    return value._value
