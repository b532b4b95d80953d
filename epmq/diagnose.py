"""The report's lines about layers: how far each candidate's outputs are from the expert's, task by task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from epmq.calls import BlockAddress
from epmq.group import GroupOutcome
from epmq.inputs import InputGroup
from epmq.orientation import is_linear, weight_of
from epmq.statistics import Expert, Moments, Sample

MOST_UNTOLD = 0.1


def unlinear_share(blocks: Mapping[str, nn.Module]) -> list[str]:
    """A note, where a good part of the blocks' weights are in no linear and so are never quantized."""
    left: dict[str, int] = {}
    total = 0
    for block, module in blocks.items():
        inside = {name for name, part in module.named_modules() if is_linear(part)}
        for name, parameter in module.named_parameters():
            total += parameter.numel()
            if parameter.dim() > 1 and name.rpartition(".")[0] not in inside:
                left[f"{block}.{name}"] = parameter.numel()
    share = sum(left.values()) / max(total, 1)
    if share <= MOST_UNTOLD:
        return []
    largest = max(left, key=left.__getitem__)
    return [f"{share:.0%} of the blocks' weights, such as {largest}, are in no linear layer and stay unquantized."]


def layer_rows(
    address: BlockAddress,
    group: InputGroup,
    linears: list[Any],
    outcome: GroupOutcome,
    compared: Mapping[str, Expert],
    samples: Mapping[str, Sample | Moments],
    seconds: float,
) -> list[dict[str, Any]]:
    """One line per linear of a group; ``compared`` are stacked weights by the name of what made them."""
    rows = []
    weights = [weight_of(linear) for linear in linears]
    stop, total = 0, sum(map(len, weights))
    for name, weight in zip(group.linears, weights, strict=True):
        part = slice(stop, stop + len(weight))
        stop = part.stop
        tasks = {
            task: {label: sample.error(candidate.of_rows(part), part) for label, candidate in compared.items()}
            for task, sample in samples.items()
        }
        rows.append(
            {
                "linear": f"{address.name}.{name}",
                "shape": list(weight.shape),
                "lambda": outcome.anchor,
                "damp": outcome.damp,
                "escalated": outcome.escalated,
                "seconds": round(seconds * len(weight) / total, 4),
                "tasks": tasks,
            }
        )
    return rows


def joined(parts: Sequence[list[dict[str, Any]]], tasks: Iterable[str]) -> list[dict[str, Any]]:
    """One list of lines out of several about the same linears, each with some of the tasks that reach them."""
    lines = []
    for alike in zip(*parts, strict=True):
        errors = {task: found for row in alike for task, found in row["tasks"].items()}
        lines.append({**alike[0], "tasks": {task: errors[task] for task in tasks if task in errors}})
    return lines
