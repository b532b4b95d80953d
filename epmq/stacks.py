"""The linears of a group as one: rows stacked for solving and rounding, taken apart again when they are deployed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from epmq.blocks import BlockAddress, InputGroup
from epmq.group import GroupOutcome
from epmq.progress import Sink
from epmq.quantized import QuantizedTensor
from epmq.sources import WeightSource, read_finite
from epmq.statistics import Expert

Deployed = dict[str, tuple[QuantizedTensor | None, Tensor | None]]


def stacked(linears: list[Any]) -> Expert:
    """Weights and biases (zeros where there is none) of linears in memory."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    bias = torch.cat(
        [linear.bias.detach() if linear.bias is not None else torch.zeros(len(linear.weight)) for linear in linears]
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


def hand_out(sink: Sink, merged: WeightSource, address: BlockAddress, block: nn.Module, outcomes: Deployed) -> None:
    """Give a finished block's tensors to the sink, each once, in the dtypes of the merged model."""
    done: set[str] = set()
    for name, (quantized, bias) in outcomes.items():
        done.update((f"{name}.weight", f"{name}.bias"))
        key = f"{address.name}.{name}"
        stored = merged.dtype(f"{key}.weight")
        bias = None if bias is None else bias.to(stored)
        if quantized is not None:
            sink.linear(key, quantized, bias)
        else:
            sink.tensor(f"{key}.weight", block.get_parameter(f"{name}.weight").detach().to(stored))
            if bias is not None:
                sink.tensor(f"{key}.bias", bias)
    for name, tensor in block.state_dict().items():
        if name not in done:
            key = f"{address.name}.{name}"
            sink.tensor(key, tensor.to(merged.dtype(key)))


def scale_dtype(setting: str, merged: WeightSource, address: BlockAddress, group: InputGroup) -> torch.dtype:
    """The dtype a group's scales are stored in: the setting, or for ``auto`` the merged weight's."""
    if setting != "auto":
        dtype: torch.dtype = getattr(torch, setting)
        return dtype
    stored = merged.dtype(f"{address.name}.{group.first}.weight")
    return torch.float32 if stored == torch.float64 else stored


def read_stack(source: WeightSource, address: BlockAddress, group: InputGroup) -> Expert:
    """The same linears of another model, read from its source."""
    weights, biases = [], []
    for name in group.linears:
        weight = read_finite(source, f"{address.name}.{name}.weight").float()
        bias = f"{address.name}.{name}.bias"
        weights.append(weight)
        biases.append(read_finite(source, bias).float() if bias in source.keys() else torch.zeros(len(weight)))
    return Expert(torch.cat(weights), torch.cat(biases))
