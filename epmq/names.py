"""A checkpoint's tensors under the names that its model has in memory: transformers' renames, prefixes, ties."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from epmq.errors import SourceError
from epmq.experts import FUSED, OUTPUT, parts_of, separated
from epmq.sources import DictSource, FileSource, WeightSource

# What older checkpoints store and every model computes.
COMPUTED = re.compile(r"rotary_emb\.inv_freq$")

# From a stored name to the model's, and whether transformers also computes: joins, cuts or turns tensors.
Rule = Callable[[str], tuple[str, bool]]


@dataclass(frozen=True)
class Names:
    """of: {stored name: the model's}. computed: the same for tensors of which transformers makes others as it loads."""

    of: dict[str, str]
    computed: dict[str, str]


def names_in_model(stored: Iterable[str], model: nn.Module) -> Names:
    """What tensors of a checkpoint are called in ``model``; those that it has no place for are left out.

    A tensor goes by its new name, as transformers would give it, before its own, and by a name with or without the base
    model's prefix.
    """
    present = set(model.state_dict())
    rule = _rule_of(model)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found = Names({}, {})
    # transformers looks at them in order, and some rules wait for the first tensor of an older layout.
    for key in sorted(stored):
        renamed, computed = rule(key)
        for candidate in (*_forms(renamed, prefix), *_forms(key, prefix)):
            if candidate in present:
                (found.computed if computed else found.of)[key] = candidate
                break
    return found


def _forms(name: str, prefix: str) -> Iterator[str]:
    yield name
    yield prefix + name
    yield name.removeprefix(prefix)


def _rule_of(model: Any) -> Rule:
    """How transformers renames tensors that are loaded into this model; other models' keep their names."""
    if not hasattr(model, "base_model_prefix"):
        return lambda key: (key, False)
    steps = _conversions(model)
    if steps is None:
        return _rule_of_4(model)
    renamings, converters = steps
    one_by_one = set(separated(model))
    prefix = f"{model.base_model_prefix}."

    def rename(key: str) -> tuple[str, bool]:
        for step in renamings:
            key, _ = step.rename_source_key(key)
        for step in converters:
            joined, pattern = step.rename_source_key(key)
            if pattern is not None:
                own = _of_one_expert(step, key, pattern) if one_by_one else None
                # Some layers' may be kept together.
                apart = own is not None and not one_by_one.isdisjoint(_forms(own.rsplit(".", 3)[0], prefix))
                return (own, False) if own is not None and apart else (joined, True)
        return key, False

    return rename


def _conversions(model: Any, legacy: bool = True) -> tuple[list[Any], list[Any]] | None:
    """transformers' own steps for the names of a model of its, and those that compute as well; None where it has none,
    which is before 5. legacy: with those for what no release writes any more."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:
        return None
    steps = get_model_conversion_mapping(model, add_legacy=legacy)
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    return [step for step in steps if not isinstance(step, WeightConverter)], converters


def _of_one_expert(step: Any, key: str, pattern: str) -> str | None:
    """The name of an expert's weight where experts are separate (:mod:`epmq.experts`); None where transformers does
    more to it than to put it beside others."""
    parts = _joined_by(step)
    found = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), key)
    if found is None or found.re.groups != 1 or pattern not in parts:
        return None
    parent = step.target_patterns[0].rpartition(".")[0]
    return f"{key[: found.start()]}{parent}.{found[1]}.{parts[pattern]}.weight{key[found.end() :]}"


def _joined_by(step: Any) -> dict[str, str]:
    """The weights that transformers puts beside each other for fused experts, and does no more: by the pattern of their
    stored names what they are called where experts are separate."""
    leaf = step.target_patterns[0].rpartition(".")[2]
    parts = {FUSED: ["gate_proj", "up_proj"], OUTPUT: [OUTPUT]}.get(leaf, [])
    joins = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in step.operations]
    if len(step.source_patterns) != len(parts) or joins != [("MergeModulelist", 0), ("Concatenate", 1)][: len(parts)]:
        return {}
    return dict(zip(step.source_patterns, parts, strict=True))


def stored_experts(model: nn.Module) -> dict[str, str]:
    """What transformers expects the linears of separate experts to be called in files: {name in the model: stored}.

    Those that it would not find there under any name are left out.
    """
    found: dict[str, str] = {}
    modules = list(separated(model))
    steps = _conversions(model) if modules and hasattr(model, "base_model_prefix") else None
    if steps is None:
        return found
    rule = _rule_of(model)
    for step in steps[1]:
        parent = step.target_patterns[0].rpartition(".")[0]
        for pattern, part in _joined_by(step).items():
            stored = pattern.rpartition("*.")[2].removesuffix(".weight")
            for module in modules:
                if not f".{module}".endswith(f".{parent.removeprefix('.')}"):
                    continue
                for number, _ in model.get_submodule(module).named_children():
                    name, key = f"{module}.{number}.{part}", f"{module}.{number}.{stored}"
                    if rule(f"{key}.weight") == (f"{name}.weight", False):
                        found.setdefault(name, key)
    return found


def name_to_store(model: nn.Module) -> Callable[[str], str | None]:
    """From the name of a tensor of a model, or of a part of a packed linear, to the one under which transformers reads
    it as that.

    That is nearly always its own. Where a rule for older files takes this name too, it is what transformers stores the
    tensor under, and None where it would not read that either.
    """
    steps = _conversions(model, legacy=False) if hasattr(model, "base_model_prefix") else None
    if steps is None:
        return lambda name: name
    rule, prefix, present = _rule_of(model), f"{model.base_model_prefix}.", set(model.state_dict())
    # A prefix that transformers takes off it does not add again: whether there was one it cannot know.
    renamings = [step for step in steps[0] if type(step).__name__ != "PrefixChange"]
    backward = [step.reverse_transform() for step in reversed(renamings)]

    def is_read(stored: str, name: str) -> bool:
        renamed, computed = rule(stored)
        return not computed and name in _forms(renamed, prefix)

    def stored(name: str) -> str | None:
        if is_read(name, name):
            return name
        older = name
        for step in backward:
            older, _ = step.rename_source_key(older)
        if is_read(older, name):
            return older
        # A name that leads nowhere is taken as it stands where the model has it, which it has for no packed part.
        stands = name in present and present.isdisjoint(_forms(rule(name)[0], prefix))
        return name if stands else None

    return stored


def cuts_weights(model: nn.Module) -> bool:
    """Whether transformers is ready to make several weights of one as it loads this model."""
    steps = _conversions(model) if hasattr(model, "base_model_prefix") else None
    return steps is not None and any(
        len(step.target_patterns) > 1 == len(step.source_patterns) and step.source_patterns[0].endswith(".weight")
        for step in steps[1]
    )


class _Separated:
    """A checkpoint whose fused experts are listed one by one, read so where it can be. fused: {stored name: as
    transformers renames it}."""

    def __init__(self, source: WeightSource, fused: Mapping[str, str]):
        self._source, self.name = source, source.name
        self._whole = [key for key in source.keys() if key not in fused]
        self._parts: dict[str, tuple[str, int, slice]] = {}
        for key, called in fused.items():
            parent, _, leaf = called.rpartition(".")
            for name, where in parts_of(leaf, source.shape(key)).items():
                self._parts[f"{parent}.{name}"] = (key, *where)

    def keys(self) -> list[str]:
        return [*self._whole, *self._parts]

    def shape(self, key: str) -> tuple[int, ...]:
        if key not in self._parts:
            return self._source.shape(key)
        fused, _, rows = self._parts[key]
        shape = self._source.shape(fused)
        return (len(range(*rows.indices(shape[1]))), *shape[2:])

    def dtype(self, key: str) -> torch.dtype:
        return self._source.dtype(self._parts[key][0] if key in self._parts else key)

    def tensor(self, key: str) -> Tensor:
        if key not in self._parts:
            return self._source.tensor(key)
        fused, number, rows = self._parts[key]
        if isinstance(self._source, FileSource):
            return self._source.part(fused, number, rows)
        return self._source.tensor(fused)[number, rows]


def _with_separate_experts(source: WeightSource, model: nn.Module) -> WeightSource:
    places = {f"{module}.{leaf}" for module in separated(model) for leaf in (FUSED, OUTPUT)}
    if not places:
        return source
    rule, prefix = _rule_of(model), f"{getattr(model, 'base_model_prefix', '')}."
    fused: dict[str, str] = {}
    for key in sorted(source.keys()):
        # A module has them already as transformers makes them of files.
        own = isinstance(source, DictSource) and not places.isdisjoint(_forms(key, prefix))
        renamed, computed = (key, False) if own else rule(key)
        if called := [name for name in (renamed, key) if not places.isdisjoint(_forms(name, prefix))]:
            _refuse_computed(source, {key: renamed} if computed else {})
            fused |= {key: called[0]} if len(source.shape(key)) == 3 else {}
    return _Separated(source, fused) if fused else source


def _refuse_computed(source: WeightSource, computed: Mapping[str, str]) -> None:
    for key, name in computed.items():
        raise SourceError(
            f"{source.name}: transformers computes {name!r} from {key!r} and others as it loads them, and only new"
            " names are given here; load it with transformers and pass the module to epmq.quantize."
        )


def _rule_of_4(model: Any) -> Rule:
    """The rule of transformers 4: old names of all models, then the first pattern of the class that fits."""

    def rename(key: str) -> tuple[str, bool]:
        key, _ = model._fix_state_dict_key_on_load(key)
        for pattern, replacement in (model._checkpoint_conversion_mapping or {}).items():
            key, count = re.subn(pattern, replacement, key)
            if count:
                break
        return key, False

    return rename


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

    Raises SourceError for a checkpoint of which transformers joins, cuts or turns tensors as it loads them.
    """

    def __init__(self, source: WeightSource, model: nn.Module, aliases: bool = False):
        in_memory = isinstance(source, DictSource)
        self._source = source = _with_separate_experts(source, model)
        self.aliases = aliases
        names = names_in_model(source.keys(), model)
        if in_memory and set(source.keys()) == set(model.state_dict()):
            # What transformers does to the names of files is not for a module's own.
            names = Names({key: key for key in source.keys()}, {})
        _refuse_computed(source, names.computed)
        self._key_of: dict[str, str] = {}
        self._copies: dict[str, list[str]] = {}
        stored: dict[str, list[str]] = {}
        for key, name in names.of.items():
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
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
        self._ignored = [COMPUTED, *map(re.compile, ignored)]
        self._model = type(model).__name__
        self.dropped = sorted(set(source.keys()) - set(names.of))
        self._of_heads = outside(self._key_of.values(), self.dropped, model)
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
        return self._source.shape(self._key_of.get(key, key))

    def dtype(self, key: str) -> torch.dtype:
        return self._source.dtype(self._key_of.get(key, key))

    def tensor(self, key: str) -> Tensor:
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
