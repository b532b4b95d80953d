"""The dtype of forward passes: in which linears, attention and products run, and which their inputs are read in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from epmq import onednn


@dataclass(frozen=True)
class Precision:
    """dtype: fp16 or bf16, while weights, norms and residual sums stay as they are; None leaves all as it is."""

    dtype: torch.dtype | None = None
    device_type: str = "cpu"

    @classmethod
    def of(cls, name: str, device: torch.device) -> Precision:
        """By the name that the settings use."""
        return cls(None if name == "float32" else getattr(torch, name), device.type)

    def active(self) -> AbstractContextManager[Any]:
        """While active, models and blocks run so."""
        if self.dtype is None:
            return onednn.Linears() if onednn.preferred() else nullcontext()
        return torch.autocast(self.device_type, self.dtype)

    def read(self, x: Tensor) -> Tensor:
        """What a linear reads of its input."""
        return x.to(self.dtype or x.dtype)

    def copied(self, x: Tensor) -> Tensor:
        """As :meth:`read`, in memory of its own."""
        return x.to(self.dtype or x.dtype, copy=True)


AS_IT_IS = Precision()
