"""Swaps the linears of a model for QuantLinear and back, in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from epmq import self_saving
from epmq.config import ClipSearch, QuantConfig
from epmq.experts import join
from epmq.linear import QuantLinear, require_quantizable
from epmq.orientation import is_linear, stored_as, weight_of


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule of that dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def replace_linear(
    model: nn.Module,
    bits: int = 4,
    group_size: int = 128,
    sym: bool = False,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = ("lm_head", "lora_"),
    clip: ClipSearch = "none",
) -> list[str]:
    """Swap every nn.Linear or Conv1D of a model for a QuantLinear rounded to nearest, in place; returns their names.

    include / exclude are regular expressions searched in the names; exclude wins. Left alone are linears whose weight
    another module holds as well (a tied head), classes that do more than a linear, and a model that is itself an
    nn.Linear, which has no name to swap. Raises ConfigError or NumericalError, and then swaps nothing, for
    settings or a weight that cannot be used.
    """
    settings: dict[str, Any] = {"bits": bits, "group_size": group_size, "sym": sym, "clip": clip}
    config = QuantConfig(method="rtn", include=_listed(include), exclude=_listed(exclude), **settings)
    tied = _shared_weights(model)
    replaced: list[str] = []
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and is_linear(module) and id(module.weight) not in tied and config.selects(name):
            places.setdefault(module, []).append(name)
    for module, names in places.items():
        require_quantizable(weight_of(module), f"{names[0]}: the weight")
    for module in list(places):
        names = places.pop(module)
        layer = QuantLinear.from_linear(module, bits, group_size, sym, clip).train(module.training)
        for name in names:
            set_submodule(model, name, layer)
        replaced += names
    self_saving.refuse(model, QuantLinear)
    return replaced


def _listed(patterns: str | Iterable[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _shared_weights(model: nn.Module) -> set[int]:
    """Identities of parameters that several modules hold."""
    held = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    return {key for key, count in held.items() if count > 1}


def pack_for_gpu(model: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """:meth:`QuantLinear.pack_for_gpu` of every layer that the GPU's kernel takes; returns their names."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    return [name for name, layer in layers if layer.pack_for_gpu(dtype)]


def restore_linear(model: nn.Module) -> list[str]:
    """Swap every QuantLinear back for a linear with the dequantized weight, in place; returns their names.

    They are nn.Linear, or Conv1D where there was one, and experts of mixtures are as transformers keeps them: what
    save_pretrained then writes is of the model's own layout.
    """
    linears: dict[nn.Module, nn.Module] = {}
    restored = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, QuantLinear) and name:
            if module not in linears:
                linears[module] = stored_as(module.to_linear(), module.stands_for).train(module.training)
            set_submodule(model, name, linears[module])
            restored.append(name)
    self_saving.allow(model)
    join(model)
    return restored
