"""Tensors that a class of transformers computes itself where a checkpoint lacks them, such as sinusoidal positions."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from epmq.renames import forms, prefix_of


def initial_values(model: Any, missing: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Those of a model's tensors that checkpoints of its class may lack, as the class makes them; floats in ``dtype``.

    Left out is what the class makes at random: there the checkpoint is no whole one.
    """
    patterns = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    prefix, found = prefix_of(model), dict[str, Tensor]()
    for name in missing:
        # The patterns of a class are for it with its head.
        if any(pattern.search(form) for pattern in patterns for form in forms(name, prefix)):
            made = [_initial(model, name, dtype, seed) for seed in range(2)]
            if made[0] is not None and made[1] is not None and torch.equal(made[0], made[1]):
                found[name] = made[0]
    return found


@torch.no_grad()
def _initial(model: Any, name: str, dtype: torch.dtype, seed: int) -> Tensor | None:
    """What the class fills a tensor with, which holds the seed before; None where it cannot be made alone."""
    parent, _, leaf = name.rpartition(".")
    owner: nn.Module = model.get_submodule(parent)

    def filled(tensor: Any) -> Any:
        if tensor is None:
            return None
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        same = torch.full(tensor.shape, seed, dtype=kind, device="cpu")
        return nn.Parameter(same, requires_grad=False) if isinstance(tensor, nn.Parameter) else same

    probe = copy.copy(owner)
    probe._parameters = {key: filled(tensor) for key, tensor in owner._parameters.items()}
    probe._buffers = {key: filled(tensor) for key, tensor in owner._buffers.items()}
    probe._modules = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model._init_weights(probe)
        except Exception:  # it needs what is below the module, or another one: not a table of its own
            return None
    made: Tensor = getattr(probe, leaf)
    return made.detach()
