"""The base of all settings: frozen, validated once, with messages that a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from epmq.errors import ConfigError

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    # Its own name is private to pydantic.
    ModelMetaclass = type(BaseModel)


# What is wrong, by pydantic's type of error, where its own words are Python's and not those of a file's author.
IN_PLAIN_WORDS = {
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "expected keys with values"),
    "tuple_type": "expected a list",
    "path_type": "expected a path",
}


class _RefusesWithConfigError(ModelMetaclass):
    """Calls of the class raise ConfigError; sections inside other settings are validated without such a call."""

    def __call__(cls, **values: Any) -> Any:  # noqa: N805 (a metaclass)
        try:
            return super().__call__(**values)
        except ValidationError as error:
            raise ConfigError(explain(error, cast("type[BaseModel]", cls), cls.__name__)) from None


class Settings(BaseModel, metaclass=_RefusesWithConfigError):
    """A frozen pydantic model whose refusals are ConfigErrors: one sentence with the key, the value and a way out."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    # Keys by their section that a reader takes out before the rest is validated, for messages.
    read_before: ClassVar[Mapping[tuple[str, ...], tuple[str, ...]]] = {}

    @classmethod
    def parse(cls, values: Any, where: str) -> Self:
        """Validate a mapping read from ``where`` (a file name, for the message)."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(explain(error, cls, where)) from None


def explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """The first thing that is wrong, as one sentence."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = known_keys(model, path[:-1])
        if issubclass(model, Settings):
            known += model.read_before.get(tuple(path[:-1]), ())
        return f"{where}: unknown key {key!r}; {nearest(path[-1], known)}"
    if path and path[-1] == "[key]":
        return f"{where}: {'.'.join(path[:-2])}: the name {_shown(first.get('input'))} is no text; put it in quotes."
    if first["type"] == "missing":
        return f"{where}: key {key!r} is missing."
    reason = IN_PLAIN_WORDS.get(first["type"], str(first["msg"]).removeprefix("Value error, ").rstrip("."))
    told = f"{where}: {key}: {reason}" if key else f"{where}: {reason}"
    if key and not isinstance(first.get("input"), Mapping):
        told += f", got {_shown(first.get('input'))}"
    return told if told.endswith("?") else f"{told}."


def nearest(word: str, known: list[str]) -> str:
    """A hint: the closest known word, or all of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}."


def known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    """Field names of the settings found by walking ``path`` down from ``model``."""
    for part in path:
        field = model.model_fields.get(part)
        nested = None if field is None else _settings_in(field.annotation)
        if nested is None:
            return list(model.model_fields)
        model = nested
    return list(model.model_fields)


def _settings_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _settings_in(inner)
        if found is not None:
            return found
    return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
