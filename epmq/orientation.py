"""Linears whichever way round they keep their weight: nn.Linear ``[N, K]``, and GPT-2's Conv1D ``[K, N]``.

Everything else in this package sees ``[N, K]``. Checkpoints keep what the module keeps.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def is_linear(module: nn.Module) -> bool:
    """Whether a call of this module computes ``W x + b`` from a weight of its own, and nothing else."""
    if is_transposed(module):
        return True
    # Attention of torch.nn reads the weight of such a one and never calls it.
    unread = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    kind: Any = type(module)
    return isinstance(module, nn.Linear) and not unread and "forward" not in vars(module) and _is_plain(kind)


@cache
def _is_plain(kind: Any) -> bool:
    """Whether a class of linears computes what nn.Linear does: it inherits the forward, or its own gives the same."""
    if kind.forward is nn.Linear.forward:
        return True
    probe = nn.Linear(3, 2, device="meta")
    probe.weight = nn.Parameter(torch.tensor([[1.0, -2.0, 3.0], [5.0, 7.0, -11.0]]), requires_grad=False)
    probe.bias = nn.Parameter(torch.tensor([13.0, -17.0]), requires_grad=False)
    x = torch.tensor([[[1.0, 2.0, -4.0], [8.0, -16.0, 32.0]]])
    wanted = probe(x)
    try:
        probe.__class__ = kind
        found = probe(x)
    except Exception:  # whatever a class of somebody else does with what it lacks: it is not plain
        return False
    return isinstance(found, Tensor) and torch.equal(found, wanted)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is a linear that stores its weight ``[K, N]``: transformers' Conv1D, known by its parts."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None


def oriented(module: nn.Module, stored: Tensor) -> Tensor:
    """``[N, K]`` from a weight as the module stores it, and the other way about."""
    return stored.T.contiguous() if is_transposed(module) else stored


def weight_of(module: nn.Module) -> Tensor:
    """The weight ``[N, K]`` of a linear."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return oriented(module, weight.detach())


def features_of(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear, or None for anything else."""
    if is_transposed(module):
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight.shape[0], weight.shape[1]
    sizes: tuple[Any, Any] = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return None if None in sizes else (int(sizes[0]), int(sizes[1]))


@torch.no_grad()
def set_weight(module: nn.Module, weight: Tensor) -> None:
    """Give a linear a weight ``[N, K]``, which becomes a new parameter."""
    module.weight = nn.Parameter(oriented(module, weight), requires_grad=False)


def stored_as(linear: nn.Linear, kind: str) -> nn.Module:
    """A linear as the class of that name stores it: transformers' Conv1D with its own weight and bias, or itself."""
    if kind != "Conv1D":
        return linear
    from transformers.pytorch_utils import Conv1D

    turned: nn.Module = Conv1D(linear.out_features, linear.in_features)
    set_weight(turned, linear.weight.detach())
    turned.bias = linear.bias
    return turned
