"""Numbers that vary over a model, in mergekit's forms: a gradient over the layers, or choices by tensor name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator

from epmq.errors import ConfigError

Gradient = tuple[float, ...]
# A number that YAML reads as a text for want of a decimal point or a sign.
EXPONENTIAL = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")


@dataclass(frozen=True)
class Choice:
    """A value for the tensors whose name contains ``filter``; None or ``*`` is every tensor."""

    filter: str | None
    value: float | Gradient


def parse_schedule(given: Any) -> float | Gradient | tuple[Choice, ...]:
    """A number, a list of numbers, or a list of {filter, value}; raises ValueError for anything else."""
    if not isinstance(given, (list, tuple)):
        return _number(given)
    if not given:
        raise ValueError("Input should be a number or a list that is not empty")
    if all(isinstance(entry, (Mapping, Choice)) for entry in given):
        return tuple(_choice(entry) for entry in given)
    return tuple(_number(entry) for entry in given)


def written_schedule(schedule: float | Gradient | tuple[Choice, ...]) -> Any:
    """The numbers, lists and mappings that :func:`parse_schedule` reads."""
    if not isinstance(schedule, tuple):
        return schedule
    return [
        {"filter": entry.filter, "value": written_schedule(entry.value)} if isinstance(entry, Choice) else entry
        for entry in schedule
    ]


Schedule = Annotated[
    float | Gradient | tuple[Choice, ...], PlainValidator(parse_schedule), PlainSerializer(written_schedule)
]


def numbers_in(schedule: float | Gradient | tuple[Choice, ...]) -> list[float]:
    """Every number that a schedule names."""
    if not isinstance(schedule, tuple):
        return [schedule]
    return [n for entry in schedule for n in (numbers_in(entry.value) if isinstance(entry, Choice) else [entry])]


def value_at(schedule: float | Gradient | tuple[Choice, ...], name: str, place: float) -> float | None:
    """The number for tensor ``name``, whose layer lies at ``place`` between 0 (first) and 1 (last).

    Gradients are interpolated linearly between equally spaced values; of choices the first that fits counts, and None
    is returned where none does (mergekit 0.1.5, ``evaluate_setting``).
    """
    if not isinstance(schedule, tuple):
        return schedule
    if isinstance(schedule[0], Choice):
        for choice in schedule:
            assert isinstance(choice, Choice)
            if choice.filter in (None, "*") or (choice.filter or "") in name:
                return value_at(choice.value, name, place)
        return None
    values = [value for value in schedule if not isinstance(value, Choice)]
    scaled = place * (len(values) - 1)
    below = int(scaled)
    above = min(len(values) - 1, below + 1)
    share = scaled - below
    return (1 - share) * values[below] + share * values[above]


def layer_places(names: Iterable[str]) -> Callable[[str], float]:
    """Where each tensor's layer lies between 0 and 1; 0 for tensors outside the layers, 1 if there is one layer.

    Layers are told by the first number in a name. Raises ConfigError for a model with none, or several lists of them.
    """
    layer = re.compile(r"(.*?)\.?\b(\d+)\.")
    last: dict[str, int] = {}
    for name in names:
        if found := layer.match(name):
            last[found[1]] = max(last.get(found[1], 0), int(found[2]))
    if len(last) != 1:
        seen = ", ".join(repr(head) for head in sorted(last)) or "none"
        raise ConfigError(
            f"merge: a list of values runs over the layers of a model that has one list of them; found are {seen};"
            " use {filter, value} entries."
        )
    ((head, end),) = last.items()

    def place(name: str) -> float:
        found = layer.match(name)
        if not found or found[1] != head:
            return 0.0
        return int(found[2]) / end if end else 1.0

    return place


def _choice(given: Mapping[str, Any] | Choice) -> Choice:
    if isinstance(given, Choice):
        return given
    if "value" not in given or set(given) - {"filter", "value"}:
        raise ValueError("an entry of a list by tensor name has the keys filter and value")
    filter_, value = given.get("filter"), given["value"]
    if filter_ is not None and not isinstance(filter_, str):
        raise ValueError("filter should be a part of a tensor's name")
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError("Input should be a number or a list that is not empty")
        return Choice(filter_, tuple(_number(entry) for entry in value))
    return Choice(filter_, _number(value))


def _number(given: Any) -> float:
    if isinstance(given, str) and EXPONENTIAL.fullmatch(given):
        given = float(given)
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise ValueError("Input should be a valid number")
    if not math.isfinite(given):
        raise ValueError("Input should be a finite number")
    return float(given)
