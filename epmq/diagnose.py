"""The report's lines about layers: how far each candidate's outputs are from the expert's, task by task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from epmq.blocks import BlockAddress, InputGroup
from epmq.group import GroupOutcome
from epmq.orientation import weight_of
from epmq.statistics import Expert, Moments, Sample


def layer_rows(
    address: BlockAddress,
    group: InputGroup,
    linears: list[Any],
    outcome: GroupOutcome,
    compared: Mapping[str, Expert | None],
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
            task: {
                label: sample.error(candidate.of_rows(part), part)
                for label, candidate in compared.items()
                if candidate is not None
            }
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
    """One list of lines out of several about the same linears, each with some of the tasks."""
    lines = []
    for alike in zip(*parts, strict=True):
        errors = {task: found for row in alike for task, found in row["tasks"].items()}
        lines.append({**alike[0], "tasks": {task: errors[task] for task in tasks}})
    return lines
