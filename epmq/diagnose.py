"""The report's lines about layers: how far each candidate's outputs are from the expert's, task by task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from epmq.blocks import BlockAddress, InputGroup
from epmq.group import GroupOutcome
from epmq.orientation import weight_of
from epmq.statistics import Expert, Sample, output_error


def layer_rows(
    address: BlockAddress,
    group: InputGroup,
    linears: list[Any],
    outcome: GroupOutcome,
    compared: Mapping[str, Expert | None],
    samples: Mapping[str, Sample],
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
                label: output_error(candidate.weight[part], candidate.bias[part], sample.x, sample.y[:, part])
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
