"""transformers' own rules from the names of tensors in files to those of a model in memory, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from epmq.experts import separated
from epmq.fused import INPUTS, OUTPUT


@dataclass(frozen=True)
class Renamed:
    """name: in the model. step: transformers' WeightConverter for a tensor of which, with others perhaps, it makes
    others as it loads them; ``name`` is the first of those. pattern: the step's that the stored name fits."""

    name: str
    step: Any = None
    pattern: str = ""


# From a stored name to the model's.
Rule = Callable[[str], Renamed]


def prefix_of(model: Any) -> str:
    """The base model's prefix, such as ``bert.``; a dot alone for a model without one."""
    return f"{getattr(model, 'base_model_prefix', '')}."


def forms(name: str, prefix: str) -> Iterator[str]:
    """A name as it is, with the base model's prefix, and without."""
    yield name
    yield prefix + name
    yield name.removeprefix(prefix)


def place_among(names: Iterable[str], prefix: str, places: Container[str]) -> str | None:
    """The first of some names, in one of its :func:`forms`, that is among ``places``."""
    return next((form for name in names for form in forms(name, prefix) if form in places), None)


def rule_of(model: Any) -> Rule:
    """How transformers renames tensors that are loaded into this model; other models' keep their names."""
    if not hasattr(model, "base_model_prefix"):
        return Renamed
    steps = _conversions(model)
    if steps is None:
        return _rule_of_4(model)
    renamings, converters = steps
    one_by_one = set(separated(model))
    prefix = prefix_of(model)

    def rename(key: str) -> Renamed:
        for step in renamings:
            key, _ = step.rename_source_key(key)
        for step in converters:
            joined, pattern = step.rename_source_key(key)
            if pattern is not None:
                own = _of_one_expert(step, key, pattern) if one_by_one else None
                # Some layers' may be kept together.
                apart = own is not None and not one_by_one.isdisjoint(forms(own.rsplit(".", 3)[0], prefix))
                return Renamed(own) if own is not None and apart else Renamed(joined, step, pattern)
        return Renamed(key)

    return rename


def _rule_of_4(model: Any) -> Rule:
    """The rule of transformers 4: old names of all models, then the first pattern of the class that fits."""

    def rename(key: str) -> Renamed:
        key, _ = model._fix_state_dict_key_on_load(key)
        for pattern, replacement in (model._checkpoint_conversion_mapping or {}).items():
            key, count = re.subn(pattern, replacement, key)
            if count:
                break
        return Renamed(key)

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
    found = re.search(re.escape(pattern.replace("\\.", ".")).replace(r"\*", r"(\d+)"), key)
    if found is None or found.re.groups != 1 or pattern not in parts:
        return None
    parent = step.target_patterns[0].rpartition(".")[0]
    return f"{key[: found.start()]}{parent}.{found[1]}.{parts[pattern]}.weight{key[found.end() :]}"


def _joined_by(step: Any) -> dict[str, str]:
    """The weights that transformers puts beside each other for fused experts, and does no more: by the pattern of their
    stored names what they are called where experts are separate."""
    leaf = step.target_patterns[0].rpartition(".")[2]
    parts = (OUTPUT,) if leaf == OUTPUT else INPUTS.get(leaf, ())
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
    rule, older_of = rule_of(model), _older_names(model)
    assert older_of is not None
    for step in steps[1]:
        parent = step.target_patterns[0].rpartition(".")[0]
        for pattern, part in _joined_by(step).items():
            stored = pattern.rpartition("*.")[2].removesuffix(".weight")
            for module in modules:
                if not f".{module}".endswith(f".{parent.removeprefix('.')}"):
                    continue
                for number, _ in model.get_submodule(module).named_children():
                    name, key = f"{module}.{number}.{part}", f"{module}.{number}.{stored}.weight"
                    for kept in (older_of(key), key):
                        if rule(kept) == Renamed(f"{name}.weight"):
                            found.setdefault(name, kept.removesuffix(".weight"))
    return found


def name_to_store(model: nn.Module) -> Callable[[str], str | None]:
    """From the name of a tensor of a model, or of a part of a packed linear, to the one under which transformers stores
    it, which is what its published files and other programs call it.

    Where transformers would not read that as the tensor, it is the tensor's own name; None where that is not read
    either.
    """
    older_of = _older_names(model)
    if older_of is None:
        return lambda name: name
    rule = rule_of(model)
    is_read, goes_by_its_own = _reads(rule, prefix_of(model)), keeps_name(model, rule)

    def stored(name: str) -> str | None:
        if is_read(older := older_of(name), name):
            return older
        return name if goes_by_its_own(name) else None

    return stored


def keeps_name(model: nn.Module, rule: Rule | None = None) -> Callable[[str], bool]:
    """Whether transformers reads a tensor of a file that has the name of one of the model, or of a part of a packed
    linear, as that. rule: of the model, where the caller has it."""
    rule = rule_of(model) if rule is None else rule
    prefix, present = prefix_of(model), set(model.state_dict())
    is_read = _reads(rule, prefix)

    def keeps(name: str) -> bool:
        # A name that leads nowhere is taken as it stands where the model has it, which it has for no packed part.
        return is_read(name, name) or (name in present and present.isdisjoint(forms(rule(name).name, prefix)))

    return keeps


def _reads(rule: Rule, prefix: str) -> Callable[[str, str], bool]:
    """Whether transformers reads a tensor stored under the one name as that of the other in the model."""

    def is_read(stored: str, name: str) -> bool:
        renamed = rule(stored)
        return renamed.step is None and name in forms(renamed.name, prefix)

    return is_read


def _older_names(model: Any) -> Callable[[str], str] | None:
    """From a model's names to those under which transformers stores them, which other programs know; None where it has
    no rules, which is before 5."""
    steps = _conversions(model, legacy=False) if hasattr(model, "base_model_prefix") else None
    if steps is None:
        return None
    # A prefix that transformers takes off it does not add again: whether there was one it cannot know.
    renamings = [step for step in steps[0] if type(step).__name__ != "PrefixChange"]
    backward = [step.reverse_transform() for step in reversed(renamings)]

    def older_of(name: str) -> str:
        for step in backward:
            name, _ = step.rename_source_key(name)
        return name

    return older_of


def cuts_weights(model: nn.Module) -> bool:
    """Whether transformers is ready to make several weights of one as it loads this model."""
    steps = _conversions(model) if hasattr(model, "base_model_prefix") else None
    return steps is not None and any(
        len(step.target_patterns) > 1 == len(step.source_patterns) and step.source_patterns[0].endswith(".weight")
        for step in steps[1]
    )
