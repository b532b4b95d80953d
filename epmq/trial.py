"""Whether a model runs on its calibration texts, tried on one of them before any weight is read."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from epmq.runner import BlockRunner
from epmq.texts import unreadable


def try_out(skeleton: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Run a model on the meta device through the first example of ``inputs``, zeros in place of its weights.

    Raises ModelError for a model whose forward fails, or calls its blocks in a way that cannot be calibrated.
    """
    runner = BlockRunner(copy.deepcopy(skeleton))
    for module in runner.model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                zeros = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
                setattr(module, name, nn.Parameter(zeros, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.zeros_like(buffer, device="cpu"))
        if isinstance(module, nn.Linear):
            # A product would write out the zeros of a head of many rows.
            module.forward = _zero_rows(module.out_features)  # type: ignore[method-assign]
    try:
        runner.follow({name: value[:1] for name, value in inputs.items()})
    except Exception as error:
        raise unreadable(skeleton, inputs, error) from error


def _zero_rows(features: int) -> Any:
    return lambda x: x.new_zeros(*x.shape[:-1], features)
