"""mergekit's YAML (version 0.1.5), read as base, experts and merge settings.

Read are the methods linear, task_arithmetic and ties with everything they take; what else mergekit knows is refused by
name, and so are keys that it would let pass without a word. Paths mean what they mean there: below the working
directory, or ids of the hub; ``path@revision`` and ``path+adapter`` are understood.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epmq import trust
from epmq.errors import ConfigError, EpmqError, ModelError
from epmq.hub import find_model
from epmq.huggingface import tokenizer_from_folder
from epmq.merge_config import MergeConfig
from epmq.settings import nearest

METHODS = {"linear": "weighted_average", "task_arithmetic": "task_arithmetic", "ties": "ties"}
OTHER_METHODS = (
    "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear", "karcher",
    "model_stock", "multislerp", "nearswap", "nuslerp", "passthrough", "ram", "ramplus_tl", "sce", "slerp",
)  # fmt: skip
KEYS = ("merge_method", "models", "base_model", "dtype", "out_dtype", "tokenizer_source", "parameters")
OTHER_KEYS = {
    "slices": "layers of different models are not put together here; use models",
    "modules": "modules are not merged in different ways here; use models",
    "tokenizer": "tokenizers are not merged here; remove it",
    "chat_template": "the base's chat template is carried along; remove it",
}
DTYPES = ("float32", "float16", "bfloat16", "float64")
# Parameters of all inputs or of one (with the name they have here), and those of the method as a whole.
PER_MODEL = {"linear": ("weight",), "task_arithmetic": ("weight",), "ties": ("weight", "density")}
OF_METHOD = {
    "linear": ("normalize",),
    "task_arithmetic": ("normalize", "lambda", "int8_mask"),
    "ties": ("normalize", "lambda", "int8_mask", "rescale"),
}
SWITCHES = ("normalize", "int8_mask", "rescale")
# What else mergekit's methods take, so that messages can tell a parameter of no use from an unknown one.
OTHER_PARAMETERS = ("gamma", "epsilon", "t", "filter_wise", "select_topk", "nuslerp_flatten", "nuslerp_row_wise")
TRUE, FALSE = ("1", "on", "t", "true", "y", "yes"), ("0", "off", "f", "false", "n", "no")


@dataclass(frozen=True)
class MergekitMerge:
    """base, experts: folders or files, experts by name. merge: how they are merged."""

    base: Path
    experts: dict[str, Path]
    merge: MergeConfig


@dataclass(frozen=True)
class _Model:
    """A reference as written, without and with its adapter, and its own parameters."""

    written: str
    model: str
    adapter: str | None
    parameters: Mapping[str, Any]


def read_mergekit(path: str | Path) -> MergekitMerge:
    """Read and check a mergekit configuration; every model it names must exist.

    Experts are called by the last part of their paths; by the whole path where two would be called the same. Raises
    ConfigError with one sentence that names the file, the key and what to do.
    """
    path = Path(path)
    content = trust.read_yaml(path, ConfigError, "the mergekit configuration")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, such as merge_method: and models:.")
    try:
        return _read({str(key): value for key, value in content.items() if value is not None})
    except (_Refusal, EpmqError) as error:
        raise ConfigError(f"{path}: {error}") from error


class _Refusal(Exception):
    """What is wrong inside a file whose name the caller adds."""


def _read(content: dict[str, Any]) -> MergekitMerge:
    for key in content:
        if key in OTHER_KEYS:
            raise _Refusal(f"{key} is not supported: {OTHER_KEYS[key]}.")
        if key not in KEYS:
            raise _Refusal(f"unknown key {key!r}, which mergekit would ignore; {nearest(key, list(KEYS))}")
    method = content.get("merge_method")
    if not isinstance(method, str) or method not in METHODS:
        known = ", ".join(METHODS)
        if method in OTHER_METHODS:
            raise _Refusal(f"merge_method {method!r} of mergekit is not supported; supported are {known}.")
        raise _Refusal(f"merge_method {method!r} is not known; supported are {known}.")
    overall = _parameters(content.get("parameters"), "parameters", PER_MODEL[method] + OF_METHOD[method], method)
    models = [_model(entry, place, method) for place, entry in enumerate(_listed(content), 1)]
    base = None if "base_model" not in content else _reference(content["base_model"], "base_model")
    if base is None and method != "linear":
        raise _Refusal(f"{method} needs base_model.")
    for one, count in Counter(model.written for model in models).items():
        if count > 1:
            raise _Refusal(f"models: {one!r} is listed twice.")
    inputs = [model for model in models if base is None or model.written != base.written]
    if not inputs:
        raise _Refusal("models: names no model beside base_model.")
    origin = base.model if base is not None else inputs[0].model
    if base is not None and base.adapter is not None:
        raise _Refusal(f"base_model {base.written!r} has an adapter; merge it into the model first.")
    for model in inputs:
        if model.adapter is not None and model.model != origin:
            raise _Refusal(
                f"models: the adapter of {model.written!r} is not on {origin!r}, over which it would be read."
            )
    named = _names(inputs)
    if "tokenizer_source" in content:
        _check_tokenizers(content["tokenizer_source"], origin, base is not None, inputs)
    settings = _settings(method, overall, named)
    if method == "linear" and base is not None:
        own = next((model for model in models if model.written == base.written), None)
        settings["base_weight"] = _by_precedence("weight", [own.parameters if own else {}, overall], base.written)
    settings["dtype"] = _dtype(content, "dtype") or "stored"
    settings["out_dtype"] = _dtype(content, "out_dtype")
    experts = {name: find_model(model.adapter or model.model) for name, model in named.items()}
    return MergekitMerge(find_model(origin), experts, MergeConfig.read(settings))


def _settings(method: str, overall: Mapping[str, Any], named: Mapping[str, _Model]) -> dict[str, Any]:
    """MergeConfig's settings, with mergekit's defaults and precedence."""
    settings: dict[str, Any] = {
        "method": METHODS[method],
        "normalize": overall.get("normalize", method != "task_arithmetic"),
    }
    if method == "ties":
        settings["dialect"] = "mergekit"
        settings["rescale"] = overall.get("rescale", False)
    if method != "linear":
        settings["scaling"] = _by_precedence("lambda", [overall], "", 1.0)
    for key, ours, default in (("weight", "weights", None), ("density", "density", 1.0)):
        if key in PER_MODEL[method]:
            settings[ours] = {
                name: _by_precedence(key, [model.parameters, overall], model.written, default)
                for name, model in named.items()
            }
    return settings


def _by_precedence(key: str, scopes: list[Mapping[str, Any]], model: str, default: float | None = None) -> Any:
    """The setting of the first scope that has it. Choices by tensor name go on in the next scope where none fits."""
    choices: list[Any] = []
    for scope in scopes:
        if key not in scope:
            continue
        setting = scope[key]
        if not _is_choices(setting):
            if not choices:
                return setting
            return [*choices, {"filter": None, "value": setting}]
        choices += setting
    if default is None and not choices:
        raise _Refusal(f"models: {model!r} has no {key}, and parameters has none for all.")
    if default is not None:
        if not choices:
            return default
        choices.append({"filter": None, "value": default})
    return choices


# -- entries ----------------------------------------------------------------------------------------------------------


def _listed(content: Mapping[str, Any]) -> list[Any]:
    models = content.get("models")
    if not isinstance(models, list) or not models:
        raise _Refusal("models: expected a list with at least one {model, parameters}.")
    return models


def _model(entry: Any, place: int, method: str) -> _Model:
    where = f"models, entry {place}"
    if not isinstance(entry, dict) or "model" not in entry:
        raise _Refusal(f"{where}: expected {{model, parameters}}.")
    for key in entry:
        if key not in ("model", "parameters"):
            raise _Refusal(f"{where}: unknown key {key!r}, which mergekit would ignore; use model and parameters.")
    parameters = _parameters(entry.get("parameters"), where, PER_MODEL[method], method)
    return _reference(entry["model"], where, parameters)


def _reference(given: Any, where: str, parameters: Mapping[str, Any] | None = None) -> _Model:
    if not isinstance(given, str):
        raise _Refusal(f"{where}: a model is a text, path, path@revision or path+adapter; got {type(given).__name__}.")
    model, *adapters = given.split("+")
    if len(adapters) > 1 or any(part.count("@") > 1 for part in (model, *adapters)):
        raise _Refusal(f"{where}: {given!r} is not of the form path, path@revision or path+adapter.")
    return _Model(given, model, adapters[0] if adapters else None, parameters or {})


def _parameters(given: Any, where: str, allowed: tuple[str, ...], method: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise _Refusal(f"{where}: expected parameters by name.")
    return {str(key): _parameter(str(key), value, where, allowed, method) for key, value in given.items()}


def _parameter(key: str, value: Any, where: str, allowed: tuple[str, ...], method: str) -> Any:
    if key not in allowed:
        everything = {name for table in (PER_MODEL, OF_METHOD) for names in table.values() for name in names}
        if key in OF_METHOD[method]:
            raise _Refusal(f"{where}: {key} is read only from the top level's parameters; move it there.")
        if key in everything or key in OTHER_PARAMETERS:
            raise _Refusal(f"{where}: {key} has no meaning for merge_method {method}; remove it.")
        raise _Refusal(
            f"{where}: unknown parameter {key!r}, which mergekit would ignore; {nearest(key, list(allowed))}"
        )
    at = f"{where}: {key}"
    if key in SWITCHES:
        return _switch(value, at)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return _number(value, at)
    if not value:
        raise _Refusal(f"{at}: the list is empty.")
    if all(isinstance(entry, dict) for entry in value):
        return [_choice(entry, at) for entry in value]
    return [_number(entry, at) for entry in value]


def _choice(entry: dict[str, Any], at: str) -> dict[str, Any]:
    if "value" not in entry or set(entry) - {"filter", "value"}:
        raise _Refusal(
            f"{at}: an entry by tensor name has the keys filter and value, got {', '.join(map(str, entry))}."
        )
    filter_, value = entry.get("filter"), entry["value"]
    if filter_ is not None and not isinstance(filter_, str):
        raise _Refusal(f"{at}: filter is a part of a tensor's name, got {filter_!r}.")
    if isinstance(value, list):
        if not value:
            raise _Refusal(f"{at}: the list is empty.")
        return {"filter": filter_, "value": [_number(one, at) for one in value]}
    return {"filter": filter_, "value": _number(value, at)}


def _number(value: Any, at: str) -> float:
    """A number; a text that is one, as YAML reads 1e-3, counts."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    raise _Refusal(f"{at}: expected a number, a list of numbers or a list of {{filter, value}}, got {value!r}.")


def _switch(value: Any, at: str) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    if not isinstance(value, (list, dict)) and text in TRUE + FALSE:
        return text in TRUE
    raise _Refusal(f"{at}: expected true or false for the whole model, got {value!r}.")


def _is_choices(setting: Any) -> bool:
    return isinstance(setting, list) and isinstance(setting[0], dict)


def _dtype(content: Mapping[str, Any], key: str) -> str | None:
    if key not in content:
        return None
    name = str(content[key]).removeprefix("torch.")
    if name not in DTYPES:
        raise _Refusal(f"{key}: {content[key]!r} is no dtype to merge in; use {', '.join(DTYPES)}.")
    return name


def _names(models: list[_Model]) -> dict[str, _Model]:
    def called(model: _Model) -> str:
        return Path((model.adapter or model.model).partition("@")[0]).name

    short = [called(model) for model in models]
    times = Counter(short)
    return {
        name if times[name] == 1 else model.adapter or model.model: model
        for name, model in zip(short, models, strict=True)
    }


def _check_tokenizers(source: Any, base: str, has_base: bool, models: list[_Model]) -> None:
    """Refuse a tokenizer_source under which mergekit would move, add or drop rows of the embeddings."""
    if source == "union" or (source != base and not (source == "base" and has_base)):
        raise _Refusal(
            f"tokenizer_source {source!r} is not supported: embeddings are not permuted here; use base, or remove it."
        )
    folder = find_model(base)
    vocabulary = tokenizer_from_folder(folder).get_vocab()
    for model in models:
        if model.adapter is not None:
            continue
        try:
            other = tokenizer_from_folder(find_model(model.model)).get_vocab()
        except ModelError:
            continue  # As mergekit: a model without a tokenizer has the base's.
        if other != vocabulary:
            raise _Refusal(
                f"tokenizer_source: the vocabulary of {model.model!r} is not that of {base!r}, and embeddings are not"
                " permuted here; make them equal, or remove tokenizer_source."
            )
    config = trust.read_json(folder / "config.json", ConfigError)
    rows = config.get("vocab_size", len(vocabulary)) if isinstance(config, dict) else None
    if rows != len(vocabulary):
        raise _Refusal(
            f"tokenizer_source: mergekit would cut or fill the embeddings of {rows} rows to the"
            f" {len(vocabulary)} tokens; remove it to keep them."
        )
