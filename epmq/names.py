"""A checkpoint's tensors under the names that its model has in memory: as transformers loads them, prefixes, ties."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from epmq.computed import ComputedSource, part_of, with_computed
from epmq.errors import SourceError
from epmq.experts import fused_shapes, parts_of, shapes_as_fused
from epmq.fused import Part
from epmq.initial import initial_values
from epmq.renames import Rule, forms, place_among, prefix_of, rule_of
from epmq.sources import DictSource, WeightSource, main_dtype

# What older checkpoints store and every model computes.
TABLES = re.compile(r"rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class Names:
    """of: {stored name: the model's}. computed: the same for tensors of which transformers makes others as it loads."""

    of: dict[str, str]
    computed: dict[str, str]


def names_in_model(stored: Iterable[str], model: nn.Module, rule: Rule | None = None) -> Names:
    """What tensors of a checkpoint are called in ``model``; those that it has no place for are left out.

    A tensor goes by its new name, as transformers would give it, before its own, and by a name with or without the base
    model's prefix. rule: of the model, where the caller has it.
    """
    present, prefix = set(model.state_dict()), prefix_of(model)
    rule = rule_of(model) if rule is None else rule
    found = Names({}, {})
    # transformers looks at them in order, and some rules wait for the first tensor of an older layout.
    for key in sorted(stored):
        renamed = rule(key)
        # One that keeps its name may be a module's own.
        names = found.of if renamed.step is None or renamed.name == key else found.computed
        if name := place_among([renamed.name], prefix, present):
            names[key] = name
        elif name := place_among([key], prefix, present):
            found.of[key] = name
    return found


class _Separated:
    """A checkpoint whose fused experts are listed one by one, and read so where that can be.

    fused: {name there: the model's}. placed: names that are the model's.
    """

    def __init__(self, source: WeightSource, model: nn.Module, fused: Mapping[str, str]):
        self._source, self.name = source, source.name
        self._whole = [key for key in source.keys() if key not in fused]
        self._parts: dict[str, tuple[str, Part]] = {}
        for key, called in fused.items():
            self._parts |= {name: (key, part) for name, part in parts_of(model, called).items()}
        self.placed = {*_placed(source).difference(fused), *self._parts}

    def keys(self) -> list[str]:
        return [*self._whole, *self._parts]

    def shape(self, key: str) -> tuple[int, ...]:
        if key not in self._parts:
            return self._source.shape(key)
        fused, part = self._parts[key]
        return part.shape(self._source.shape(fused))

    def dtype(self, key: str) -> torch.dtype:
        return self._source.dtype(self._parts[key][0] if key in self._parts else key)

    def tensor(self, key: str) -> Tensor:
        if key not in self._parts:
            return self._source.tensor(key)
        fused, part = self._parts[key]
        return part.read(partial(part_of, self._source, fused))


def _placed(source: WeightSource) -> set[str]:
    """The tensors of a source that go by the model's names already."""
    return source.placed if isinstance(source, ComputedSource | _Separated) else set()


def _with_separate_experts(source: WeightSource, model: nn.Module, rule: Rule) -> WeightSource:
    places = fused_shapes(model)
    if not places:
        return source
    prefix = prefix_of(model)
    in_memory, placed = isinstance(source, DictSource), _placed(source)
    fused: dict[str, str] = {}
    for key in sorted(source.keys()):
        # A module has them already as transformers makes them of files.
        own = key in placed or (in_memory and not places.keys().isdisjoint(forms(key, prefix)))
        name = place_among([key] if own else [rule(key).name, key], prefix, places)
        if name is None:
            continue
        if source.shape(key) != places[name]:
            raise SourceError(
                f"{source.name}: tensor {key!r} has shape {list(source.shape(key))}, expected {list(places[name])}."
            )
        fused[key] = name
    mixtures = {name.rpartition(".")[0] for name in fused.values()}
    for name in sorted(places.keys() - set(fused.values())):
        if name.rpartition(".")[0] in mixtures:
            raise SourceError(f"{source.name}: tensor {name!r} is missing, though others of those experts are there.")
    if isinstance(source, ComputedSource):
        for key in fused:
            source.require_parts(key)
    return _Separated(source, model, fused) if fused else source


def outside(used: Collection[str], dropped: Iterable[str], model: nn.Module) -> set[str]:
    """Those of the tensors left out that stand beside the model where it is the base of another, as heads do, or belong
    to the pooler of one that has been left without."""
    name = str(getattr(model, "base_model_prefix", ""))
    if not used or not name or hasattr(model, name):
        return set()
    prefix, dropped = f"{name}.", set(dropped)
    without = getattr(model, "pooler", model) is None
    poolers = {key for key in dropped if without and key.removeprefix(prefix).startswith("pooler.")}
    if not all(key.startswith(prefix) for key in used):
        return poolers
    return poolers | {key for key in dropped if not key.startswith(prefix)}


class NamedForModel:
    """A checkpoint seen under a model's own tensor names (:func:`names_in_model`).

    Tied tensors go by the first of their names in the model, or, with ``aliases``, by each of them as in a module's
    state, whichever of them the checkpoint has; where it has several, ``tensor`` raises SourceError unless they are
    equal. dropped: tensors that the model has no place for. notes: what :meth:`require_known` let pass.

    made: the tensors that transformers makes of others as it loads them, which is done here as each is read
    (:mod:`epmq.computed`); a SourceError tells where that cannot be done. What a class computes where files lack it is
    there too (:mod:`epmq.initial`).
    """

    def __init__(self, source: WeightSource, model: nn.Module, aliases: bool = False):
        in_memory = isinstance(source, DictSource)
        self.aliases = aliases
        rule = cache(rule_of(model))
        # What transformers does to the tensors of files is not for a module's own.
        own = in_memory and {key: source.shape(key) for key in source.keys()} == shapes_as_fused(model)
        source = source if own else with_computed(source, model, rule)
        self.made = _placed(source)
        self._source = source = _with_separate_experts(source, model, rule)
        placed = _placed(source).intersection(model.state_dict())
        names = names_in_model(set(source.keys()) - _placed(source), model, rule).of | {name: name for name in placed}
        if in_memory and set(source.keys()) == set(model.state_dict()):
            names = {key: key for key in source.keys()}
        self._key_of: dict[str, str] = {}
        self._copies: dict[str, list[str]] = {}
        stored: dict[str, list[str]] = {}
        for key, name in names.items():
            stored.setdefault(name, []).append(key)
        first_name: dict[int, str] = {}
        state = model.state_dict(keep_vars=True)
        for name, tensor in state.items():
            first = first_name.setdefault(id(tensor), name)
            # A tensor under the very name is the one to write again under it.
            for key in sorted(stored.get(name, []), key=lambda key: key != name):
                if self._key_of.setdefault(first, key) != key:
                    self._copies.setdefault(first, []).append(key)
        if aliases:
            for name, tensor in state.items():
                first = first_name[id(tensor)]
                if first in self._key_of and name != first:
                    self._key_of[name] = self._key_of[first]
                    self._copies[name] = self._copies.get(first, [])
        listed = state if aliases else [name for name, tensor in state.items() if first_name[id(tensor)] == name]
        missing = [name for name in listed if name not in self._key_of]
        self._initial = initial_values(model, missing, main_dtype(source)) if missing else {}
        self._key_of |= {name: name for name in self._initial}
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
        self._ignored = [TABLES, *map(re.compile, ignored)]
        self._model = type(model).__name__
        self.dropped = sorted(set(source.keys()) - set(names))
        # By what the files call them.
        self._of_heads = outside(set(names).intersection(self._key_of.values()) - _placed(source), self.dropped, model)
        self.notes: list[str] = []

    @property
    def name(self) -> str:
        return self._source.name

    def keys(self) -> list[str]:
        return list(self._key_of)

    def names_of(self, key: str) -> list[str]:
        """The names in ``keys`` under which the model has this tensor."""
        return [name for name, stored in self._key_of.items() if stored == self._key_of[key]]

    def stored_name(self, key: str) -> str:
        """What the checkpoint calls a tensor of the model."""
        return self._key_of[key]

    def shape(self, key: str) -> tuple[int, ...]:
        if key in self._initial:
            return tuple(self._initial[key].shape)
        return self._source.shape(self._key_of.get(key, key))

    def dtype(self, key: str) -> torch.dtype:
        if key in self._initial:
            return self._initial[key].dtype
        return self._source.dtype(self._key_of.get(key, key))

    def tensor(self, key: str) -> Tensor:
        if key in self._initial:
            return self._initial[key]
        stored = self._key_of.get(key, key)
        tensor = self._source.tensor(stored)
        for copy in self._copies.get(key, []):
            if not torch.equal(self._source.tensor(copy), tensor):
                raise SourceError(
                    f"{self.name}: tensors {stored!r} and {copy!r} are tied in the model but differ here; make them"
                    " equal, or untie them in the base's config.json (tie_word_embeddings)."
                )
        return tensor

    def require_known(self, label: str, known: Collection[str] = ()) -> None:
        """Refuse a tensor that neither the model nor its base (``known``) has; SourceError, naming it and ``label``.

        Noted instead are heads on the model, and tables of positions and the like, which are not float or which
        transformers passes over too.
        """
        for key in self.dropped:
            if key in known:
                continue
            passed_over = key in self._of_heads or any(pattern.search(key) for pattern in self._ignored)
            if self._source.dtype(key).is_floating_point and not passed_over:
                raise SourceError(
                    f"{label} ({self.name}) has an extra tensor {key!r}, which {self._model} has no place for; remove"
                    " it, or give a base with the same head, or modules without heads (their base_model)."
                )
            self.notes.append(f"{key}: in {label} but not in the model; left out.")
