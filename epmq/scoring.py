"""A model folder scored on the texts and heads of a recipe's evaluation section."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from epmq.api import load
from epmq.errors import ConfigError
from epmq.evaluate import Head, LinearHead, check_head, load_task, score
from epmq.evaluate import row as result_row
from epmq.formats.kinds import format_of
from epmq.heads import CheckpointHead
from epmq.huggingface import skeleton_from_folder, tokenizer_from_folder
from epmq.linear import QuantLinear
from epmq.names import NamedForModel
from epmq.placement import place
from epmq.recipe import Recipe
from epmq.skeleton import fill
from epmq.sources import FileSource
from epmq.texts import check_length, check_room, check_vocabulary
from epmq.world import by_turns, world


def load_any(
    folder: str | Path, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> nn.Module:
    """A quantized folder with its weights packed, or a plain checkpoint as a transformers model, where it will run."""
    if format_of(folder) is not None:
        return load(folder, device=device, dtype=dtype)
    source = FileSource(folder)
    model = skeleton_from_folder(folder, set(source.keys()))
    fill(model, "", NamedForModel(source, model), None)
    return place(model, device, dtype)


def evaluate_folder(
    recipe: Recipe, folder: str | Path, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> dict[str, Any]:
    """Score a model folder on the recipe's evaluation tasks: a row of {merge, method, bits, average, tasks}."""
    settings = recipe.evaluation
    if settings is None:
        raise ConfigError("the recipe has no evaluation: section; name data and head for each task there.")
    tokenizer = tokenizer_from_folder(recipe.base)
    check_room(tokenizer, "evaluation.max_length", settings.max_length)
    tasks = {
        name: load_task(tokenizer, entry.data, _head(entry.head), settings.max_length, settings.text_key)
        for name, entry in settings.tasks.items()
    }
    pad = tokenizer.pad_token_id
    if pad is None:
        # Decoders' heads read the last token that is another, so it is one that no text holds.
        read = {token for task in tasks.values() for ids in task.ids for token in ids}
        pad = min(set(range(len(tokenizer))) - read, default=0)
    model = load_any(folder, device, dtype)
    for name, task in tasks.items():
        longest, data = max(map(len, task.ids)), settings.tasks[name].data
        check_length(model, longest, data, "evaluation.max_length", settings.max_length)
        check_vocabulary(model, max(max(ids, default=0) for ids in task.ids), data)
        check_head(model, task, settings.pooling, pad)
    names = list(tasks)
    scores = by_turns(
        len(names), world(), lambda i: score(model, {names[i]: tasks[names[i]]}, settings.pooling, pad)[names[i]]
    )
    return result_row(None, Path(folder).name, bits_of(model), dict(zip(names, scores, strict=True)))


def _head(place: Path) -> Head:
    return CheckpointHead(place) if place.is_dir() else LinearHead(place)


def bits_of(model: nn.Module) -> int | str | None:
    """The bits of a model's quantized linears, None without any; where they differ, all of them in words."""
    found = sorted({module.bits for module in model.modules() if isinstance(module, QuantLinear)})
    return found[0] if len(found) == 1 else " and ".join(map(str, found)) or None
