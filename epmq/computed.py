"""Tensors that transformers makes of others as it loads a checkpoint: cut, joined or turned here as each is read."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from epmq.errors import EpmqError, SourceError, first_line
from epmq.experts import fused_shapes
from epmq.renames import Rule, forms, prefix_of
from epmq.sources import DictSource, FileSource, WeightSource

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
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
        state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._shapes, self._fused = state, fused_shapes(model)

    def of_experts(self, count: int | None) -> _AsStored:
        """The same with fewer experts; None: with all."""
        if count is None:
            return self
        fewer = copy.copy(self)
        fewer._fused = {name: (count, *shape[1:]) for name, shape in self._fused.items()}
        return fewer

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty(self._fused.get(name) or self._shapes[name], device="meta")


class ComputedSource:
    """A checkpoint in which tensors that transformers computes stand for those that it makes them of.

    placed: their names, which are the model's; other tensors go by their stored ones. Nothing is kept of what is read:
    a tensor that is cut into three is read three times.
    """

    def __init__(self, source: WeightSource, model: nn.Module, makings: list[_Making]):
        self._source, self._model, self.name = source, _AsStored(model), source.name
        used = {key for making in makings for key in making.keys}
        self._stored = [key for key in source.keys() if key not in used]
        self._of: dict[str, _Making] = {}
        self._like: dict[str, Tensor] = {}
        for making in makings:
            made = self._make(making, self._empty)
            self._like |= made
            self._of |= dict.fromkeys(made, making)
        self.placed = set(self._of)

    def keys(self) -> list[str]:
        return [*self._stored, *self._of]

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._like[key].shape) if key in self._of else self._source.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self._like[key].dtype if key in self._of else self._source.dtype(key)

    def tensor(self, key: str) -> Tensor:
        if key not in self._of:
            return self._source.tensor(key)
        return _alone(self._make(self._of[key], self._source.tensor)[key])

    def part(self, key: str, number: int, rows: slice) -> Tensor:
        """``tensor(key)[number, rows]`` of fused experts, for which one expert's weights are read."""
        if key not in self._of:
            return part_of(self._source, key, number, rows)
        made = self._make(
            self._of[key], lambda stored: part_of(self._source, stored, number, slice(None))[None], experts=1
        )
        return _alone(made[key][0, rows])

    def require_parts(self, key: str) -> None:
        """Raise SourceError where transformers does more to experts than to turn or join each one's weights."""
        making = self._of.get(key)
        if making is None:
            return
        if not making.keeps_experts_apart() or any(len(self._source.shape(stored)) != 3 for stored in making.keys):
            raise SourceError(
                f"{self.name}: transformers computes {key!r}, experts in one tensor, from {making.keys[0]!r} in a way"
                " that is not followed for single ones; load it with transformers and pass the module to epmq.quantize."
            )

    def _empty(self, key: str) -> Tensor:
        return torch.empty(self._source.shape(key), dtype=self._source.dtype(key), device="meta")

    def _make(self, making: _Making, read: Read, experts: int | None = None) -> dict[str, Tensor]:
        """What transformers makes of some tensors of the checkpoint. experts: how many these are of, None for all."""
        step, model = copy.deepcopy(making.step), self._model.of_experts(experts)
        try:
            for pattern, keys in making.stored.items():
                for key in keys:
                    step.add_tensor(making.name, key, pattern, read(key))
            made = step.convert(making.name, model=model, config=model.config)
        except EpmqError:
            raise
        except Exception as error:  # whatever an operation says of shapes and numbers that it does not expect
            raise SourceError(
                f"{self.name}: transformers cannot make {making.name!r} of {making.keys[0]!r} and what belongs to it"
                f" ({first_line(error)}); check that the checkpoint is whole and config.json is its own."
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def with_computed(source: WeightSource, model: nn.Module, rule: Rule) -> WeightSource:
    """The source itself, or, where transformers makes other tensors of some of its, those in their place.

    rule: of the model. A source in memory may be a module's: what the model has under that name is not made anew.
    Raises SourceError where tensors do not fit each other.
    """
    prefix = prefix_of(model)
    places = {*model.state_dict(), *fused_shapes(model)}
    makings: dict[str, _Making] = {}
    # The order in which experts and shards are joined.
    for key in sorted(source.keys(), key=_natural):
        renamed = rule(key)
        own = isinstance(source, DictSource) and not places.isdisjoint(forms(key, prefix))
        if renamed.step is None or own:
            continue
        name = next((form for form in forms(renamed.name, prefix) if form in places), None)
        if name is not None:
            making = makings.setdefault(name, _Making(renamed.step, name))
            making.stored.setdefault(renamed.pattern, []).append(key)
    return ComputedSource(source, model, list(makings.values())) if makings else source


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
    """By numbers as numbers, as transformers sorts names."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key)]
