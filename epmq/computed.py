"""Tensors that transformers makes of others as it loads a checkpoint: cut, joined or turned here as each is read."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from epmq.errors import SourceError, first_line
from epmq.experts import fused_shapes
from epmq.renames import Rule, place_among, prefix_of
from epmq.sources import FileSource, WeightSource


@dataclass
class _Making:
    """step: transformers' WeightConverter. name: the first tensor that it makes. stored: by the patterns of its sources
    the tensors of the checkpoint that fit them, in order."""

    step: Any
    name: str
    stored: dict[str, list[str]] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        return [key for keys in self.stored.values() for key in keys]

    def keeps_experts_apart(self) -> bool:
        """Whether no operation works along the first dimension, that of fused experts."""
        along = [
            [value for name in ("dim", "dim0", "dim1") if (value := getattr(operation, name, None)) is not None]
            for operation in self.step.operations
        ]
        return all(dims and all(dim > 0 for dim in dims) for dims in along)


class _AsStored:
    """A model as transformers' operations ask about it: with experts, which may be separate here, fused, and as it was
    before anything in it was quantized."""

    def __init__(self, model: nn.Module):
        self.config: Any = model.config
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.fused = fused_shapes(model)
        self.names = {*self.shapes, *self.fused}

    def of_one_expert(self) -> _AsStored:
        one = copy.copy(self)
        one.fused = {name: (1, *shape[1:]) for name, shape in self.fused.items()}
        return one

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty(self.fused.get(name) or self.shapes[name], device="meta")


class ComputedSource:
    """A checkpoint in which tensors that transformers computes stand for those that it makes them of.

    placed: their names, which are the model's. stored: those of all other tensors. Nothing is kept of what is read:
    a tensor that is cut into three is read three times.
    """

    def __init__(self, source: WeightSource, model: _AsStored, makings: list[_Making]):
        self._source, self._model, self.name = source, model, source.name
        used = {key for making in makings for key in making.keys}
        self.stored = [key for key in source.keys() if key not in used]
        self._of: dict[str, _Making] = {}
        self._like: dict[str, Tensor] = {}
        for making in makings:
            made = self._make(making, {key: self._empty(key) for key in making.keys}, self._model)
            if len(made) < len(making.step.target_patterns):
                raise SourceError(
                    f"{self.name}: transformers cannot make {len(making.step.target_patterns)} tensors of"
                    f" {making.keys[0]!r}, {list(source.shape(making.keys[0]))}, the first of them {making.name!r};"
                    " check that the checkpoint is whole and config.json is its own."
                )
            for name in filter(self._model.names.__contains__, made):
                self._like[name], self._of[name] = made[name], making
        self.placed = set(self._of)

    def keys(self) -> list[str]:
        return [*self.stored, *self._of]

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._like[key].shape) if key in self._of else self._source.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self._like[key].dtype if key in self._of else self._source.dtype(key)

    def tensor(self, key: str) -> Tensor:
        if key not in self._of:
            return self._source.tensor(key)
        making = self._of[key]
        return _alone(self._make(making, {key: self._source.tensor(key) for key in making.keys}, self._model)[key])

    def part(self, key: str, number: int, rows: slice) -> Tensor:
        """``tensor(key)[number, rows]`` of fused experts, for which one expert's weights are read."""
        if key not in self._of:
            return part_of(self._source, key, number, rows)
        making = self._of[key]
        read = {key: part_of(self._source, key, number, slice(None))[None] for key in making.keys}
        return _alone(self._make(making, read, self._model.of_one_expert())[key][0, rows])

    def made_of(self, key: str) -> str:
        """A stored tensor of which a tensor of ``placed`` is made."""
        return self._of[key].keys[0]

    def require_parts(self, key: str) -> None:
        """Raise SourceError where transformers does more to experts than to turn or join each one's weights."""
        if key in self._of and not self._of[key].keeps_experts_apart():
            raise SourceError(
                f"{self.name}: transformers computes {key!r}, experts in one tensor, from {self.made_of(key)!r} in a"
                " way that is not followed for single ones; load it with transformers and pass the module to"
                " epmq.quantize."
            )

    def _empty(self, key: str) -> Tensor:
        return torch.empty(self._source.shape(key), dtype=self._source.dtype(key), device="meta")

    def _make(self, making: _Making, read: dict[str, Tensor], model: _AsStored) -> dict[str, Tensor]:
        """What transformers makes for the model of some tensors of the checkpoint; empties ``read``."""
        step = copy.deepcopy(making.step)
        for pattern, keys in making.stored.items():
            for key in keys:
                step.add_tensor(making.name, key, pattern, read.pop(key))
        try:
            made = step.convert(making.name, model=model, config=model.config)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever an operation says of shapes and numbers that it does not expect
            raise SourceError(
                f"{self.name}: transformers cannot make {making.name!r} of {making.keys[0]!r} and what belongs to it"
                f" ({first_line(error)}); check that the checkpoint is whole and config.json is its own."
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def with_computed(source: WeightSource, model: nn.Module, rule: Rule) -> WeightSource:
    """The source itself, or, where transformers makes other tensors of some of its, those in their place.

    rule: of the model. Raises SourceError where tensors do not fit each other.
    """
    used = [key for key in sorted(source.keys()) if rule(key).step is not None]
    if not used:
        return source
    prefix, seen = prefix_of(model), _AsStored(model)
    makings: dict[str, _Making] = {}
    # The order in which experts and shards are joined.
    for key in sorted(used, key=_natural):
        renamed = rule(key)
        name = place_among([renamed.name], prefix, seen.names)
        if name is not None:
            making = makings.setdefault(name, _Making(renamed.step, name))
            making.stored.setdefault(renamed.pattern, []).append(key)
    if not makings:
        return source
    computed = ComputedSource(source, seen, list(makings.values()))
    for key in sorted(computed.stored):
        name = place_among([rule(key).name, key], prefix, seen.names)
        if name in computed.placed:
            raise SourceError(
                f"{source.name}: transformers makes {name!r} of {computed.made_of(name)!r}, but {key!r} is there too;"
                " remove one of them."
            )
    return computed


def part_of(source: WeightSource, key: str, number: int, rows: slice) -> Tensor:
    """``source.tensor(key)[number, rows]``, of which no more is read where that can be."""
    if isinstance(source, FileSource | ComputedSource):
        return source.part(key, number, rows)
    return source.tensor(key)[number, rows]


def _alone(tensor: Tensor) -> Tensor:
    """The tensor without what else lies in its memory."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def _natural(key: str) -> list[tuple[int, str]]:
    """By numbers as numbers."""
    parts = re.split(r"([0-9]+)", key)
    return [(len(number := part.lstrip("0")), number) if at % 2 else (-1, part) for at, part in enumerate(parts)]
