"""The dtype of forward passes: in which linears, attention and products run, and which their inputs are read in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from epmq import onednn


@dataclass(frozen=True)
class Precision:
    """dtype: fp16 or bf16, while weights, norms and residual sums stay as they are; None leaves all as it is.
    gradients: whether they follow."""

    dtype: torch.dtype | None = None
    device_type: str = "cpu"
    gradients: bool = False

    @classmethod
    def of(cls, name: str, device: torch.device) -> Precision:
        """By the name that the settings use."""
        return cls(None if name == "float32" else getattr(torch, name), device.type)

    def active(self) -> AbstractContextManager[Any]:
        """While active, models and blocks run so."""
        if self.dtype is None:
            return onednn.Linears() if onednn.preferred() else nullcontext()
        cast = torch.autocast(self.device_type, self.dtype)
        return _attention_apart(cast) if self.gradients and self.device_type == "cpu" else cast

    def with_gradients(self) -> Precision:
        """The one for passes that gradients follow: fp32 in place of fp16, in which small ones would vanish."""
        return replace(self, gradients=True) if self.dtype == torch.bfloat16 else AS_IT_IS

    def read(self, x: Tensor) -> Tensor:
        """What a linear reads of its input."""
        return x.to(self.dtype or x.dtype)

    def copied(self, x: Tensor) -> Tensor:
        """As :meth:`read`, in memory of its own."""
        return x.to(self.dtype or x.dtype, copy=True)


AS_IT_IS = Precision()


@contextmanager
def _attention_apart(cast: AbstractContextManager[Any]) -> Iterator[None]:
    with cast, _Attention():
        yield


class _Attention(TorchFunctionMode):
    """While active, attention that gradients follow runs in fp32: torch's backward in 16 bits takes several times as
    long on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention or not _keeps_gradients(*args, *kwargs.values()):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})


def _keeps_gradients(*given: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in given)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
