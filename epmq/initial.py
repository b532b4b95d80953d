"""Tensors that a class of transformers computes itself where a checkpoint lacks them, such as sinusoidal positions."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def computed_by_class(model: Any, missing: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Those of a model's tensors that checkpoints of its class may lack, as the class makes them; floats in ``dtype``.

    Left out is what the class makes at random: there the checkpoint is no whole one.
    """
    patterns = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    wanted = [name for name in missing if any(pattern.search(name) for pattern in patterns)]
    found = {name: _initial(model, name, dtype) for name in wanted}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@torch.no_grad()
def _initial(model: Any, name: str, dtype: torch.dtype) -> Tensor | None:
    """What the class fills a tensor with, the same whatever the seed and what stood there before, else None."""
    parent, _, leaf = name.rpartition(".")
    owner: nn.Module = model.get_submodule(parent)
    made: list[Tensor] = []
    for seed, value in enumerate((-1.0, 1.0)):
        probe = copy.copy(owner)
        probe._parameters = {key: _filled(tensor, value, dtype) for key, tensor in owner._parameters.items()}
        probe._buffers = {key: _filled(tensor, value, dtype) for key, tensor in owner._buffers.items()}
        probe._modules = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                model._init_weights(probe)
            except Exception:  # it needs what is below the module, or another one: not a table of its own
                return None
        made.append(getattr(probe, leaf).detach())
    return made[0].clone() if torch.equal(*made) else None


def _filled(tensor: Any, value: float, dtype: torch.dtype) -> Any:
    """A tensor or parameter of the same kind and shape on the CPU, all ``value``."""
    if tensor is None:
        return None
    kind = dtype if tensor.is_floating_point() else tensor.dtype
    filled = torch.full(tensor.shape, value, dtype=kind, device="cpu")
    return nn.Parameter(filled, requires_grad=False) if isinstance(tensor, nn.Parameter) else filled
