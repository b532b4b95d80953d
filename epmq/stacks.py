"""The linears of a group as one: rows stacked for solving and rounding, taken apart again when they are deployed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from epmq.calls import BlockAddress
from epmq.config import QuantConfig
from epmq.devices import cast_there
from epmq.group import GroupOutcome
from epmq.inputs import InputGroup
from epmq.orientation import oriented, set_weight, weight_of
from epmq.progress import Sink
from epmq.quantized import QuantizedTensor
from epmq.sources import FiniteReader, WeightSource
from epmq.statistics import Expert

Deployed = dict[str, tuple[QuantizedTensor | None, Tensor | None]]


def stacked(linears: list[Any]) -> Expert:
    """Weights and biases (zeros where there is none) of linears in memory."""
    weights = [weight_of(linear) for linear in linears]
    biases = [
        _no_bias(weight) if linear.bias is None else linear.bias.detach()
        for linear, weight in zip(linears, weights, strict=True)
    ]
    return Expert(torch.cat(weights), torch.cat(biases))


@dataclass(frozen=True)
class Part:
    """Linears of a group that have the same settings: those of ``pattern`` (:meth:`epmq.config.QuantConfig.of`)."""

    pattern: str | None
    group: InputGroup
    linears: list[Any]
    rows: Tensor | slice
    """Their rows of the stack: int64, or all of them."""


def parted(group: InputGroup, linears: list[Any], pattern_of: Callable[[str], str | None]) -> list[Part]:
    """The group taken apart by the settings of its linears, in the order of the first of each kind."""
    members: dict[str | None, list[int]] = {}
    for place, name in enumerate(group.linears):
        members.setdefault(pattern_of(name), []).append(place)
    if len(members) == 1:
        return [Part(next(iter(members)), group, linears, slice(None))]
    sizes = [len(weight_of(linear)) for linear in linears]
    rows = torch.arange(sum(sizes)).split(sizes)
    return [
        Part(
            pattern,
            InputGroup(tuple(group.linears[place] for place in places), group.sequence),
            [linears[place] for place in places],
            torch.cat([rows[place] for place in places]),
        )
        for pattern, places in members.items()
    ]


def deploy(group: InputGroup, linears: list[Any], outcome: GroupOutcome) -> Deployed:
    """Give the working block the weights it will be deployed with, linear by linear."""
    result: Deployed = {}
    stop = 0
    for name, linear in zip(group.linears, linears, strict=True):
        part = slice(stop, stop + len(weight_of(linear)))
        stop = part.stop
        set_weight(linear, outcome.weight[part].clone())
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
        bias = None if bias is None else bias.to(merged.dtype(f"{key}.bias"))
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


def stored_scale_dtype(config: QuantConfig, merged: WeightSource, linear: str) -> torch.dtype:
    """The dtype of a linear's scales: the setting, or the weight's own (float32 for float64)."""
    if config.scale_dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.scale_dtype)
        return dtype
    stored = merged.dtype(f"{linear}.weight")
    return torch.float32 if stored == torch.float64 else stored


def read_stack(
    source: WeightSource, address: BlockAddress, group: InputGroup, linears: list[Any], device: torch.device
) -> Expert:
    """The same linears of another model, read from its source, in fp32 on ``device``."""
    weights, biases = [], []
    reader = FiniteReader(source, device)
    for name, linear in zip(group.linears, linears, strict=True):
        stored = oriented(linear, reader.read(f"{address.name}.{name}.weight"))
        weight = cast_there(stored, device, torch.float32)
        weights.append(weight)
        if linear.bias is None:
            biases.append(_no_bias(weight))
        else:
            biases.append(cast_there(reader.read(f"{address.name}.{name}.bias"), device, torch.float32))
    reader.settle()
    return Expert(torch.cat(weights), torch.cat(biases))


def _no_bias(weight: Tensor) -> Tensor:
    return weight.new_zeros(len(weight))
