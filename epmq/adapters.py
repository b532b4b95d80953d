"""PEFT LoRA adapters over a base, read as full checkpoints: W + s·B·A, computed for one tensor when it is asked for.

Low-rank adaptation: Hu et al. 2021 (arXiv 2106.09685); rank-stabilised scaling: Kalajdzievski 2023 (arXiv 2312.03732).
Files and meaning as peft 0.21 writes them; the sum equals its ``merge_and_unload``, kind by kind, in tests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, field_validator
from torch import Tensor, nn

from epmq import patterns, trust
from epmq.errors import ConfigError, SourceError
from epmq.hub import find_model, name_of
from epmq.names import NamedForModel, names_in_model, outside
from epmq.orientation import is_transposed
from epmq.settings import Settings
from epmq.sources import ADAPTER_CONFIG, DictSource, FileSource, WeightSource, open_source, read_finite

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTORS = {
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_embedding_A": "A", ".lora_embedding_B": "B",
}  # fmt: skip
BASE_COPY = ".base_layer.weight"
# Initialisations that leave the base's weights as they are; the others subtract from them what the factors start with.
PLAIN_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")
# Keys that say how an adapter was trained, and nothing about its sum with the base.
OF_TRAINING = {
    "auto_mapping", "base_model_name_or_path", "ephemeral", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "lora_dropout", "loftq_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip


Rank = Annotated[int, Field(ge=1, le=trust.INT32_MAX)]


class AdapterConfig(Settings):
    """What adapter_config.json says about the sum. r: rank. lora_alpha: the scale is alpha/r, or alpha/√r with
    use_rslora. rank_pattern, alpha_pattern: {regular expression for the end of a module's name: its own value}.
    fan_in_fan_out: weights are stored [in, out], as transformers' Conv1D does; peft writes what held for the layer that
    it adapted last. modules_to_save: modules trained whole, by the end of their names. ensure_weight_tying: what is
    tied to such a module was trained with it."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    peft_type: Literal["LORA"]
    r: Rank = 8
    lora_alpha: float = 8.0
    use_rslora: bool = False
    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    fan_in_fan_out: bool = False
    modules_to_save: list[str] = Field(default_factory=list)
    ensure_weight_tying: bool = False
    base_model_name_or_path: str | None = None

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _valid_patterns(cls, given: dict[str, Any]) -> dict[str, Any]:
        for pattern in given:
            patterns.check(pattern)
        return given

    def rank_of(self, module: str) -> int:
        rank: int = _by_pattern(self.rank_pattern, module, self.r)
        return rank

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        alpha: float = _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def saves(self, key: str) -> bool:
        """Whether a tensor belongs to a module that was trained whole."""
        parts = key.split(".")
        modules = [".".join(parts[:count]) for count in range(1, len(parts))]
        return any(module.endswith(tuple(self.modules_to_save)) for module in modules)


@dataclass(frozen=True)
class _Pair:
    """Names of the factors of one weight in the adapter's file, and how their product is added to it."""

    a: str
    b: str
    scale: float
    turned: bool
    embedding: bool


class AdapterSource:
    """A base with a LoRA adapter on it, as a weight source with the base's names, shapes and dtypes.

    ``tensor`` adds s·B·A to a base tensor in float32, or float64 where one of them is, and casts to the base's dtype;
    at most one tensor and its product are held. Tensors saved whole replace the base's. model: what the base's names
    belong to, where it is known.

    Raises SourceError naming the folder and the tensor or key at fault, for kinds of adapters whose sum is another
    (DoRA, LoRA with biases, trained tokens, ...), and for an adapter made for another base.
    """

    def __init__(self, folder: str | Path, base: WeightSource, model: nn.Module | None = None):
        self.folder = Path(folder)
        self.base = base
        self.model = model
        self.config = read_adapter_config(self.folder)
        weights = self.folder / ADAPTER_WEIGHTS
        if not trust.exists(weights):
            raise SourceError(
                f"{self.folder}: holds {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}; save the adapter as safetensors."
            )
        trust.require_file(weights, SourceError)
        self.file = FileSource(weights)
        self.notes = self._notes()
        self._pairs: dict[str, _Pair] = {}
        self._whole: dict[str, str] = {}
        self._copies: dict[str, str] = {}
        self._match()

    @property
    def name(self) -> str:
        return f"{self.folder} on {self.base.name}"

    def keys(self) -> list[str]:
        return self.base.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self.base.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self.base.dtype(key)

    def tensor(self, key: str) -> Tensor:
        if key in self._whole:
            return read_finite(self.file, self._whole[key]).to(self.dtype(key))
        weight = self.base.tensor(key)
        if key in self._copies and not torch.equal(self.file.tensor(self._copies[key]).to(weight), weight):
            raise SourceError(
                f"{self.folder}: its copy {self._copies[key]!r} differs from {key!r} of {self.base.name};"
                " the adapter was made for another base."
            )
        pair = self._pairs.get(key)
        if pair is None:
            return weight
        a, b = read_finite(self.file, pair.a), read_finite(self.file, pair.b)
        wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        product = (b.to(wide) @ a.to(wide)).mul_(pair.scale)
        if pair.turned:
            product = product.T
        # Where the weight is narrower, the sum is rounded once; peft rounds an embedding's product before as well.
        return (weight + (product.to(weight.dtype) if pair.embedding else product)).to(weight.dtype)

    # -- what belongs where -------------------------------------------------------------------------------------------

    def _match(self) -> None:
        factors: dict[str, dict[str, str]] = {}
        plain: dict[str, str] = {}
        for stored in self.file.keys():
            if not stored.startswith(PREFIX):
                raise SourceError(
                    f"{self.file.name}: tensor {stored!r} does not begin with {PREFIX!r}, as in peft's files."
                )
            inner = stored.removeprefix(PREFIX)
            suffix = next((end for end in (*FACTORS, BASE_COPY) if inner.endswith(end)), None)
            if suffix == BASE_COPY:
                self._copies[inner.removesuffix(BASE_COPY) + ".weight"] = stored
            elif suffix is not None:
                factors.setdefault(inner.removesuffix(suffix), {})[FACTORS[suffix]] = stored
            elif ".lora_" in inner:
                raise SourceError(
                    f"{self.file.name}: tensor {stored!r} belongs to no kind of LoRA that can be added here."
                )
            else:
                # Of a module trained whole, or a copy of the embeddings: peft puts both in the base's place.
                plain[inner] = stored
        brought = list(plain)
        self._drop_tied(plain)
        if not factors and not plain:
            raise SourceError(f"{self.file.name}: holds no factors of an adapter.")
        rename = self._renaming([f"{module}.weight" for module in factors] + [*self._copies], plain)
        self._copies = {rename(key): stored for key, stored in self._copies.items()}
        self._whole = {rename(key): stored for key, stored in plain.items()}
        for key, stored in self._whole.items():
            self._require_shape(stored, self.file.shape(stored), key)
        self._tie_whole({rename(key) for key in brought if self.config.saves(key)}, {rename(key) for key in brought})
        for module, parts in factors.items():
            key = rename(f"{module}.weight")
            for name in self._names_of(key):
                self._pairs[name] = self._pair(module, parts, key)
        for key in (*self._pairs, *self._whole):
            if not self.base.dtype(key).is_floating_point:
                raise SourceError(
                    f"{self.folder}: tensor {key!r} of {self.base.name} is {self.base.dtype(key)}; an adapter needs a"
                    " float base."
                )

    def _drop_tied(self, plain: dict[str, str]) -> None:
        """Forget what the base lacks where it is an equal copy of another: save_embedding_layers stores ties twice."""
        present = set(self.base.keys())
        for key, stored in list(plain.items()):
            if key not in present and not self.config.saves(key):
                twins = [name for name in plain.values() if self.file.shape(name) == self.file.shape(stored)]
                if any(
                    name != stored and torch.equal(self.file.tensor(name), self.file.tensor(stored)) for name in twins
                ):
                    del plain[key]

    def _tie_whole(self, trained: set[str], brought: set[str]) -> None:
        """Let a tensor that was trained whole stand for what is tied to it, or refuse it where peft unties the two."""
        for key in sorted(trained.intersection(self._whole)):
            stored = self._whole[key]
            if self.config.ensure_weight_tying:
                for name in self._names_of(key):
                    self._whole.setdefault(name, stored)
                continue
            others = sorted(self._tied_to(key) - brought)
            base = self.base.tensor(key) if others else None
            if base is not None and not torch.equal(read_finite(self.file, stored).to(base.dtype), base):
                raise SourceError(
                    f"{self.folder}: {stored!r} was trained whole (modules_to_save), {key!r} of {self.base.name} is"
                    f" tied to {others[0]!r}, and peft leaves the latter as it was; untie the base, or train with"
                    " ensure_weight_tying."
                )

    def _tied_to(self, key: str) -> set[str]:
        """The other names of this tensor, those included that the base does not list."""
        names = set(self._names_of(key))
        if self.model is not None:
            state = self.model.state_dict(keep_vars=True)
            names |= {name for name, tensor in state.items() if key in state and tensor is state[key]}
        return names - {key}

    def _names_of(self, key: str) -> list[str]:
        """The names under which the base holds this tensor: tied parameters change together."""
        if isinstance(self.base, NamedForModel):
            return self.base.names_of(key)
        if not isinstance(self.base, DictSource):
            return [key]
        tensor = self.base.tensor(key)
        others = [(name, self.base.tensor(name)) for name in self.base.keys()]
        return [n for n, other in others if other.data_ptr() == tensor.data_ptr() and other.shape == tensor.shape]

    def _renaming(self, adapted: list[str], plain: dict[str, str]) -> Callable[[str], str]:
        """From the adapter's names to the base's, which may lack or have one more prefix for all of them, or be those
        that another version of transformers gives the model. Heads that a bare base has no place for leave ``plain``,
        with a note."""
        wanted = [*adapted, *plain]
        present = set(self.base.keys())
        first = wanted[0].split(".")[0] + "."
        rules: list[Callable[[str], str]] = [lambda key: key, lambda key: key.removeprefix(first)]
        rules += [head.__add__ for head in sorted({key.split(".")[0] + "." for key in present})]
        if self.model is not None:
            known = names_in_model(wanted, self.model).of
            rules.append(lambda key: known.get(key, key))

        def fits(rule: Callable[[str], str], keys: Collection[str]) -> int:
            return sum(rule(key) in present for key in keys)

        # A head that was trained whole may have no place in the base, which says nothing of the names inside it.
        rule = max(rules, key=lambda rule: (fits(rule, adapted), fits(rule, wanted)))
        missing = [key for key in wanted if rule(key) not in present]
        for key in sorted(self._heads(first, adapted, missing, bare=rule is rules[1])):
            missing.remove(key)
            del plain[key]
            self.notes.append(f"{key}: in {name_of(self.folder)} but not in the model; left out.")
        if not missing:
            return rule
        if missing[0] in plain:
            how = "modules_to_save" if self.config.saves(missing[0]) else "save_embedding_layers"
            raise SourceError(
                f"{self.folder}: the adapter brings {missing[0]!r} whole ({how}), which {self.base.name} does not have;"
                " a head of its own or a tied output has no counterpart: add it to the base, or leave it out."
            )
        raise SourceError(
            f"{self.folder}: the adapter changes {missing[0]!r}, which {self.base.name} does not have;"
            f" it was made for another base (it names {self.config.base_model_name_or_path!r})."
        )

    def _heads(self, prefix: str, adapted: list[str], missing: list[str], bare: bool) -> set[str]:
        """Those of the missing tensors that stand beside the base where it is a bare model, whose names lack a prefix
        that all adapted ones have."""
        beside = [key for key in missing if key not in adapted]
        if self.model is not None:
            return outside(adapted, beside, self.model)
        if not adapted or not bare or not all(key.startswith(prefix) for key in adapted):
            return set()
        return {key for key in beside if not key.startswith(prefix)}

    def _pair(self, module: str, parts: Mapping[str, str], key: str) -> _Pair:
        if len(parts) < 2:
            (there,) = parts.values()
            raise SourceError(f"{self.file.name}: tensor {there!r} has no counterpart; the file is incomplete.")
        a, b = self.file.shape(parts["A"]), self.file.shape(parts["B"])
        if len(a) != 2 or len(b) != 2:
            raise SourceError(
                f"{self.file.name}: tensor {parts['A']!r} has {len(a)} dimensions; only adapters of linear and"
                " embedding layers can be added."
            )
        rank = self.config.rank_of(module)
        if a[0] != rank or b[1] != rank:
            raise SourceError(
                f"{self.file.name}: tensor {parts['A']!r} has rank {a[0]}, {ADAPTER_CONFIG} says {rank};"
                " they do not belong together."
            )
        embedding = parts["A"].endswith("embedding_A")
        turned = embedding or self._is_turned((b[0], a[1]), key)
        self._require_shape(parts["B"], (a[1], b[0]) if turned else (b[0], a[1]), key)
        return _Pair(parts["A"], parts["B"], self.config.scale_of(module), turned, embedding)

    def _is_turned(self, shape: tuple[int, int], key: str) -> bool:
        """Whether a weight is stored [in, out]: told by its shape, or where that is square by its module.

        Where the module is not known either, a base without any Conv1D has none there, and in one that has some,
        fan_in_fan_out is believed where it says so: peft writes it for the layer that it adapted last.
        """
        if shape[0] != shape[1]:
            return shape[::-1] == self.base.shape(key)
        module = dict(self.model.named_modules()).get(key.removesuffix(".weight")) if self.model is not None else None
        if module is not None:
            return is_transposed(module)
        if self._has_conv1d != self.config.fan_in_fan_out:
            raise SourceError(
                f"{self.folder}: whether {key!r} of {self.base.name} is stored [in, out] cannot be told from its square"
                f" shape, nor from fan_in_fan_out, which peft writes for one layer of all; give the base as a module."
            )
        return self._has_conv1d

    @cached_property
    def _has_conv1d(self) -> bool:
        """Whether some weight of the base has its bias along the second dimension."""
        present = set(self.base.keys())
        for key in present:
            bias = key.removesuffix("weight") + "bias"
            if key.endswith(".weight") and bias in present:
                shape = self.base.shape(key)
                if len(shape) == 2 and shape[0] != shape[1] and self.base.shape(bias) == shape[1:]:
                    return True
        return False

    def _require_shape(self, stored: str, shape: tuple[int, ...], key: str) -> None:
        expected = self.base.shape(key)
        if shape == expected:
            return
        raise SourceError(
            f"{self.folder}: {stored!r} makes a weight of shape {list(shape)}, but {key!r} of {self.base.name} has"
            f" {list(expected)}; the adapter was made for another base."
        )

    def _notes(self) -> list[str]:
        named, path = self.config.base_model_name_or_path, Path(self.base.name)
        if not named or named in (self.base.name, name_of(path).partition("@")[0]) or Path(named).name == path.name:
            return []
        # Notes are published with the model: no paths of the machines it was made on.
        told = Path(named).name if Path(named).is_absolute() else named
        return [f"{name_of(self.folder)}: the adapter names {told!r} as its base; it is applied to {name_of(path)}."]


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The adapter's configuration; raises SourceError naming the first key that would change the sum in another way."""
    file = folder / ADAPTER_CONFIG
    content = trust.read_json(file, SourceError)
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        kind = content.get("peft_type") if isinstance(content, dict) else None
        raise SourceError(f"{file}: peft_type is {kind!r}; only LORA adapters can be added to a base.")
    known = set(AdapterConfig.model_fields)
    initial = content.pop("init_lora_weights", True)
    if initial not in PLAIN_INITIALISATIONS:
        raise SourceError(
            f"{file}: init_lora_weights {initial!r} changed the base's weights; convert the adapter to plain LoRA when"
            " saving it (path_initial_model_for_weight_conversion)."
        )
    if content.pop("bias", "none") != "none":
        raise SourceError(f"{file}: bias is trained too, which is not supported; only bias: none is.")
    for key in sorted(set(content) - known - OF_TRAINING):
        # A feature that is switched off changes nothing, whatever it would have done.
        if content[key] not in (None, False, [], {}, ""):
            raise SourceError(
                f"{file}: {key} is set to {json.dumps(content[key])[:60]}, which is not supported;"
                f" supported are plain LoRA's keys ({', '.join(sorted(known | {'init_lora_weights', 'bias'}))})."
            )
    given = {key: value for key, value in content.items() if key in known and value is not None}
    try:
        return AdapterConfig.parse(given, str(file))
    except ConfigError as error:
        raise SourceError(str(error)) from error


def open_model(what: Any, name: str, base: WeightSource | None = None, model: nn.Module | None = None) -> WeightSource:
    """A model's weights: a checkpoint (path, hub id, module, state dict, source), or the path or hub id of a LoRA
    adapter, which is read as ``base`` with the adapter on it. ``name`` is how messages call it. model: the module whose
    names they are to be read under; tied tensors are listed once if they are so in ``base``.

    Raises SourceError, also for an adapter where no base is given, and for files that do not fit ``model``.
    """
    if not isinstance(what, (str, Path)):
        source = open_source(what, name)
        # A source of the caller's own is taken as it is, and so are tensors that are called as in the model.
        as_it_is = model is None or not isinstance(source, DictSource) or set(source.keys()) == set(model.state_dict())
        return source if model is None or as_it_is else _named(source, name, base, model)
    try:
        path = find_model(what)
    except SourceError as error:
        raise SourceError(f"{name}: {error}") from error
    if not trust.exists(path / ADAPTER_CONFIG):
        source = open_source(path, name)
        return source if model is None else _named(source, name, base, model)
    if base is None:
        raise SourceError(f"{name}: {path} is an adapter, which needs the model it was trained on; give that as base.")
    return AdapterSource(path, base, model)


def notes_on(sources: Mapping[str, WeightSource]) -> list[str]:
    """What was passed over when models were opened."""
    named = [source for source in sources.values() if isinstance(source, NamedForModel | AdapterSource)]
    return [note for source in named for note in source.notes]


def _named(source: WeightSource, name: str, base: WeightSource | None, model: nn.Module) -> NamedForModel:
    other = base if isinstance(base, NamedForModel) else None
    named = NamedForModel(source, model, aliases=other is None or other.aliases)
    named.require_known(name, () if other is None else other.dropped)
    return named


def _by_pattern(given: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, from a dot on, as in peft."""
    for pattern, value in given.items():
        if patterns.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
