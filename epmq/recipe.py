"""Recipes: a YAML file that names base, experts, merge, calibration files and quantization settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from epmq import trust
from epmq.config import PRESETS, Format, QuantConfig
from epmq.errors import ConfigError, SourceError
from epmq.hub import find_model
from epmq.merge_config import MergeConfig
from epmq.mergekit import read_mergekit
from epmq.settings import Settings, nearest
from epmq.trust import INT32_MAX, INT64_MAX

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SIZE = re.compile(rf"\s*(\d+(?:\.\d+)?)\s*({'|'.join(UNITS)})\s*")


class CalibrationSettings(Settings):
    """tasks: {task: jsonl file}. Texts are tokenised with the base's tokenizer and cut at ``max_length`` tokens.

    examples: texts per task, the first of the file, or drawn from all of it when ``seed`` is given. target_key: of what
    the decoder of an encoder-decoder is to write; None: the text itself.
    """

    tasks: dict[str, Path]
    text_key: str = "text"
    target_key: str | None = None
    examples: int = Field(default=256, ge=1, le=INT32_MAX)
    max_length: int = Field(default=512, ge=1, le=INT32_MAX)
    batch_size: int = Field(default=32, ge=1, le=INT32_MAX)
    seed: int | None = Field(default=None, ge=-INT64_MAX, le=INT64_MAX)


class TaskFiles(Settings):
    """data: jsonl of {text, label}. head: safetensors with the classifier's weight and bias, or the folder or hub id of
    a checkpoint whose head it is."""

    data: Path
    head: Path


class EvaluationSettings(Settings):
    """What ``epmq eval`` scores: {task: {data, head}}; what a head's file reads is the mean over tokens or the first
    token's."""

    tasks: dict[str, TaskFiles]
    pooling: Literal["mean", "first"] = "mean"
    max_length: int = Field(default=512, ge=1, le=INT32_MAX)
    text_key: str = "text"

    @field_validator("tasks")
    @classmethod
    def _any_task(cls, tasks: dict[str, TaskFiles]) -> dict[str, TaskFiles]:
        if not tasks:
            raise ValueError("name a task, or leave evaluation: out")
        return tasks


class Recipe(Settings):
    """A whole job. Paths are relative to the recipe's folder; models may be hub ids (:mod:`epmq.hub`) instead, and
    experts LoRA adapters over the base (:mod:`epmq.adapters`).

    Either ``merge`` says how the experts are merged, or ``merged`` names an already merged checkpoint. format: of the
    quantized folder, see docs/formats.md. device: where blocks are computed, ``auto`` being the first GPU, or the CPU
    without one. memory: bytes a process may take beyond its imports, as a number or like ``8GiB``; hidden states that
    find no room lie on disk. None: four fifths of what the machine has free, shared by its processes.
    """

    read_before: ClassVar[Mapping[tuple[str, ...], tuple[str, ...]]] = {
        (): ("mergekit",),
        ("quantization",): ("preset",),
    }

    base: Path
    experts: dict[str, Path] = Field(default_factory=dict)
    merge: MergeConfig | None = None
    merged: Path | None = None
    calibration: CalibrationSettings | None = None
    quantization: QuantConfig = QuantConfig()
    evaluation: EvaluationSettings | None = None
    format: Format = "compressed-tensors"
    device: str = "auto"
    shard_bytes: int = Field(default=512 * 2**20, ge=1, le=INT64_MAX)
    memory: int | None = Field(default=None, ge=1, le=INT64_MAX)

    @field_validator("memory", mode="before")
    @classmethod
    def _bytes(cls, memory: Any) -> Any:
        found = SIZE.fullmatch(memory) if isinstance(memory, str) else None
        if isinstance(memory, str) and found is None:
            raise ValueError("use a number of bytes, or one with a unit such as 8GiB or 500MB")
        return memory if found is None else int(float(found[1]) * UNITS[found[2]])

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ValueError("use auto, cpu, cuda or cuda:0")
        return device


def read_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe; every file it names must exist.

    The key ``mergekit`` names a mergekit configuration (:mod:`epmq.mergekit`) that stands for base, experts and merge.
    Raises ConfigError with one sentence that names the recipe, the key, and the nearest known key where one is unknown.
    """
    path = Path(path)
    content = trust.read_yaml(path, ConfigError, "the recipe")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, such as base: and experts:.")
    if {"kind", "rows", "published"} & content.keys():
        raise ConfigError(f"{path}: the recipe of a paper's benchmark; run it with epmq paper {path} --out FOLDER.")
    recipe = _recipe_of(content, path, path.parent)
    for task in recipe.calibration.tasks if recipe.calibration and recipe.experts else ():
        if task not in recipe.experts:
            hint = nearest(task, list(recipe.experts))
            raise ConfigError(f"{path}: calibration.tasks.{task}: there is no expert of that name; {hint}")
    return recipe


def recipe_of_mergekit(config: str | Path, calibration: Mapping[str, Path]) -> Recipe:
    """The job of a mergekit configuration with calibration texts by expert name; quantization has its defaults.

    Paths are relative to the working directory. Raises ConfigError as :func:`read_recipe` does, and for calibration
    that belongs to no expert or is missing for some.
    """
    content: dict[str, Any] = {"mergekit": str(config)}
    if calibration:
        content["calibration"] = {"tasks": dict(calibration)}
    recipe = _recipe_of(content, Path(config), Path())
    names = list(recipe.experts)
    for name in calibration:
        if name not in names:
            raise ConfigError(f"--calibration: {name!r} is no expert of {config}; its experts are {', '.join(names)}.")
    for name in names:
        if calibration and name not in calibration:
            raise ConfigError(f"--calibration: expert {name!r} has none; {config} has the experts {', '.join(names)}.")
    return recipe


def _recipe_of(content: dict[str, Any], path: Path, folder: Path) -> Recipe:
    recipe = Recipe.parse({**_without_mergekit(content, path, folder), **_with_preset(content, path)}, str(path))
    if recipe.merge is not None and recipe.merged is not None:
        raise ConfigError(f"{path}: give either merge or merged, not both.")
    return _resolved(recipe, folder, path)


def _without_mergekit(content: dict[str, Any], path: Path, folder: Path) -> dict[str, Any]:
    """The recipe with what its mergekit configuration says written out."""
    if content.get("mergekit") is None:
        return content
    if not isinstance(content["mergekit"], str):
        raise ConfigError(f"{path}: mergekit: expected the name of a file, got {content['mergekit']!r}.")
    rest = {key: value for key, value in content.items() if key != "mergekit"}
    for key in ("base", "experts", "merge", "merged"):
        if rest.get(key) is not None:
            raise ConfigError(f"{path}: {key} and mergekit say the same thing; remove one of them.")
    read = read_mergekit(folder / content["mergekit"])
    absolute = {name: where.absolute() for name, where in read.experts.items()}
    return {**rest, "base": read.base.absolute(), "experts": absolute, "merge": read.merge}


def _with_preset(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The quantization section with its preset, if it names one, written out."""
    section = content.get("quantization")
    if not isinstance(section, dict) or "preset" not in section:
        return {}
    section = dict(section)
    name = section.pop("preset")
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"{path}: quantization.preset: unknown preset {name!r}; {nearest(str(name), list(PRESETS))}")
    return {"quantization": {**PRESETS[name], **section}}


def _resolved(recipe: Recipe, folder: Path, path: Path) -> Recipe:
    def place(key: str, value: Path) -> Path:
        found = folder / value
        if not trust.exists(found):
            raise ConfigError(f"{path}: {key}: there is no {found}.")
        return found

    def model(key: str, value: Path) -> Path:
        try:
            return find_model(value, folder)
        except SourceError as error:
            raise ConfigError(f"{path}: {key}: {error}") from error

    changes: dict[str, Any] = {"base": model("base", recipe.base)}
    changes["experts"] = {task: model(f"experts.{task}", value) for task, value in recipe.experts.items()}
    if recipe.merged is not None:
        changes["merged"] = model("merged", recipe.merged)
    if recipe.calibration is not None:
        tasks = {task: place(f"calibration.tasks.{task}", v) for task, v in recipe.calibration.tasks.items()}
        changes["calibration"] = recipe.calibration.model_copy(update={"tasks": tasks})
    if recipe.evaluation is not None:
        entries = {}
        for task, entry in recipe.evaluation.tasks.items():
            at = f"evaluation.tasks.{task}"
            entries[task] = entry.model_copy(
                update={"data": place(f"{at}.data", entry.data), "head": model(f"{at}.head", entry.head)}
            )
        changes["evaluation"] = recipe.evaluation.model_copy(update={"tasks": entries})
    return recipe.model_copy(update=changes)
