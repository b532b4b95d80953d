"""The linears of a group as one: rows stacked for solving and rounding, taken apart again when they are deployed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from epmq.blocks import BlockAddress, InputGroup
from epmq.group import GroupOutcome
from epmq.quantized import QuantizedTensor
from epmq.sources import WeightSource, read_finite
from epmq.statistics import Expert

Deployed = dict[str, tuple[QuantizedTensor | None, Tensor | None]]


def stacked(linears: list[Any]) -> Expert:
    """Weights and biases (zeros where there is none) of linears in memory."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    bias = torch.cat(
        [linear.bias.detach() if linear.bias is not None else _no_bias(linear.weight) for linear in linears]
    )
    return Expert(weight, bias)


def deploy(group: InputGroup, linears: list[Any], outcome: GroupOutcome) -> Deployed:
    """Give the working block the weights it will be deployed with, linear by linear."""
    result: Deployed = {}
    stop = 0
    for name, linear in zip(group.linears, linears, strict=True):
        part = slice(stop, stop + len(linear.weight))
        stop = part.stop
        linear.weight = nn.Parameter(outcome.weight[part].clone(), requires_grad=False)
        bias = None
        if linear.bias is not None:
            bias = outcome.bias[part].clone()
            linear.bias = nn.Parameter(bias, requires_grad=False)
        quantized = outcome.quantized
        if quantized is not None:
            zeros = None if quantized.zeros is None else quantized.zeros[part].clone()
            quantized = QuantizedTensor(
                quantized.codes[part].clone(),
                quantized.scales[part].clone(),
                zeros,
                quantized.bits,
                quantized.group_size,
            )
        result[name] = (quantized, bias)
    return result


def read_stack(source: WeightSource, address: BlockAddress, group: InputGroup, device: torch.device) -> Expert:
    """The same linears of another model, read from its source, in fp32 on ``device``."""
    weights, biases = [], []
    for name in group.linears:
        weight = read_finite(source, f"{address.name}.{name}.weight").to(device, torch.float32)
        bias = f"{address.name}.{name}.bias"
        weights.append(weight)
        known = bias in source.keys()
        biases.append(read_finite(source, bias).to(device, torch.float32) if known else _no_bias(weight))
    return Expert(torch.cat(weights), torch.cat(biases))


def _no_bias(weight: Tensor) -> Tensor:
    return torch.zeros(len(weight), device=weight.device)
