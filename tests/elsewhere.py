"""A device of this test's own: its tensors compute on the CPU but refuse to meet CPU tensors, as those of a GPU do.

What a GPU merely does slowly is refused too: a copy that also casts, which torch does on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

# The one device type that torch leaves to others: this process registers empty hooks for it.
_setup_privateuseone_for_python_backend("elsewhere")
DEVICE = torch.device("elsewhere:0")


class Away(Tensor):
    """A tensor that says it is on DEVICE; ``held`` holds its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, kept: Tensor) -> Away:
        away: Away = Tensor._make_wrapper_subclass(
            cls, kept.shape, strides=kept.stride(), dtype=kept.dtype, device=DEVICE, requires_grad=False
        )
        away.held = kept
        return away

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Away({self.held!r})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Away:
        copied: Away = memo.setdefault(id(self), Away(self.held.clone()))
        return copied

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return compute(func, args, kwargs or {})


def compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on inner tensors; what it returns is away if its tensors were, or if it is told to make it so."""
    given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    away = [value for value in given if isinstance(value, Away)]
    device = kwargs.get("device")
    to_device = device is not None and torch.device(device).type == DEVICE.type
    moving = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
    strangers = [value for value in given if not isinstance(value, Away) and value.dim() > 0]
    if away and strangers and not moving:
        raise AssertionError(f"{func}: a tensor on {DEVICE} meets one on the CPU, of shape {list(strangers[0].shape)}")
    if to_device and strangers and kwargs.get("dtype", strangers[0].dtype) != strangers[0].dtype:
        raise AssertionError(f"{func}: a tensor of shape {list(strangers[0].shape)} is cast on the CPU before it moves")
    if to_device:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map(lambda value: value.held if isinstance(value, Away) else value, (args, kwargs))
    result = func(*inner_args, **inner_kwargs)
    if func.overloadpacket is torch.ops.aten.copy_ or (given and result is inner_args[0]):
        if torch.Tag.inplace_view in func.tags and away:
            with no_dispatch():
                func(*args, **kwargs)  # the shape that the tensor outside tells
        return args[0]
    stays = to_device if device is not None else bool(away)
    return tree_map(lambda value: Away(value) if stays and isinstance(value, Tensor) else value, result)


class Elsewhere(TorchDispatchMode):
    """While active, tensors can be made on DEVICE and moved there and back."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    with Elsewhere():
        yield DEVICE
