"""transformers models with packed weights do not write themselves: what ``save_pretrained`` leaves of them would load
as random weights, with no more than a warning."""

from __future__ import annotations

from typing import Any, Never

from torch import nn

from epmq.errors import FormatError

METHOD = "save_pretrained"


def refuse(model: nn.Module, packed: type[nn.Module]) -> None:
    """Make ``save_pretrained`` of every part of ``model`` with modules of the class ``packed`` raise FormatError."""
    for module in model.modules():
        if callable(getattr(module, METHOD, None)) and any(isinstance(inner, packed) for inner in module.modules()):
            setattr(module, METHOD, _refuse)


def allow(model: nn.Module) -> None:
    """Undo :func:`refuse`."""
    for module in model.modules():
        if vars(module).get(METHOD) is _refuse:
            delattr(module, METHOD)


def _refuse(*_: Any, **__: Any) -> Never:
    raise FormatError(
        "save_pretrained cannot write packed weights: transformers would load random ones;"
        " use epmq.save(model, folder)."
    )
