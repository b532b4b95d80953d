"""Whole jobs from a recipe: merge to a folder, merge and quantize block by block, score. Nothing whole in memory."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from epmq import files
from epmq.api import load
from epmq.console import progress_bar
from epmq.data import calibration_batches
from epmq.engine import Surroundings
from epmq.errors import ConfigError, SourceError
from epmq.estimate import estimate
from epmq.evaluate import load_task, row, score
from epmq.fingerprint import fingerprint
from epmq.formats.native import MANIFEST_NAME, NativeWriter
from epmq.formats.shards import ShardWriter
from epmq.huggingface import NamedForModel, carry_files, skeleton_from_folder, tokenizer_from_folder
from epmq.memory import available_bytes
from epmq.merge import MergedSource
from epmq.merge_config import MergeConfig
from epmq.pipeline import run
from epmq.progress import Discard, Journal
from epmq.recipe import Recipe
from epmq.report import build_report, read_report, write_report
from epmq.shelf import Shelf
from epmq.skeleton import fill
from epmq.sources import FileSource, WeightSource, iterate, total_bytes
from epmq.world import by_turns, world

# Of the memory that is free, what a run without a setting takes.
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Sources:
    """A recipe's weights under the names of its model."""

    base: WeightSource
    experts: dict[str, WeightSource]
    merged: WeightSource
    dropped: list[str]


def open_sources(recipe: Recipe, model: nn.Module | None = None) -> Sources:
    """Base, experts and their merge; named as in ``model`` when one is given, else as in the files."""
    base: WeightSource = FileSource(recipe.base)
    experts: dict[str, WeightSource] = {task: FileSource(path) for task, path in recipe.experts.items()}
    merged: WeightSource | None = None if recipe.merged is None else FileSource(recipe.merged)
    dropped: list[str] = []
    if model is not None:
        named = NamedForModel(base, model)
        dropped = named.dropped
        base = named
        experts = {task: _fitting(task, NamedForModel(source, model), named) for task, source in experts.items()}
        merged = None if merged is None else NamedForModel(merged, model)
    if merged is None:
        merged = MergedSource(base, experts, recipe.merge or MergeConfig()) if experts else base
    return Sources(base, experts, merged, dropped)


def _fitting(task: str, expert: NamedForModel, base: NamedForModel) -> NamedForModel:
    """The expert, refused with SourceError when it has tensors that neither the model nor the base knows."""
    if extra := sorted(set(expert.dropped) - set(base.dropped)):
        raise SourceError(f"expert {task!r} ({expert.name}) has an extra tensor {extra[0]!r}, which {base.name} lacks.")
    return expert


def merge_to_folder(recipe: Recipe, out: str | Path) -> None:
    """Write the merged model of a recipe, tensor by tensor, with configuration and tokenizer files beside."""
    if not recipe.experts:
        raise ConfigError("merging needs experts; name them under experts: in the recipe.")
    with files.new_folder(out) as working:
        merged = open_sources(recipe).merged
        writer = ShardWriter(working, recipe.shard_bytes)
        total = len(merged.keys())
        with progress_bar("merging") as progress:
            for number, (key, tensor) in enumerate(iterate(merged), 1):
                writer.add(key, tensor)
                progress(key, number, total)
        writer.finish()
        carry_files(recipe.base, working)


def quantize_to_folder(
    recipe: Recipe, out: str | Path, resume: bool = False, tell: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Merge and quantize a recipe's model into a new folder; returns the report, which is left there too.

    The merged model is never written nor held: one block of one model at a time is read, computed and written. What is
    finished lies in a working folder beside ``out`` (:mod:`epmq.progress`), from which a run with ``resume`` goes on.
    tell: gets the estimate of time, memory and disk. Several processes may call this together (:mod:`epmq.world`);
    those that do not write get an empty report.
    """
    at = world()
    journal = Journal(out, at)
    if at.main:
        journal.check(resume)
        if journal.already_done():
            return read_report(journal.out)
    started = time.perf_counter()
    skeleton, sources, calibration = _opened(recipe)
    around, lines = _surroundings(recipe, journal, skeleton, calibration)
    if at.main:
        tell(lines)
    with journal.kept(lambda: fingerprint(recipe)):
        place = files.new_folder(out, journal.result) if at.main else nullcontext()
        with place as working, progress_bar("quantizing") as progress:
            writer = None if working is None else NativeWriter(working, recipe.shard_bytes)
            found = run(
                skeleton,
                sources.merged,
                sources.base,
                sources.experts,
                calibration,
                recipe.quantization,
                writer or Discard(),
                progress if at.main else lambda *_: None,
                around,
                journal,
            )
            if working is None or writer is None:
                return {}
            report = finish(recipe, working, writer, skeleton, sources, found, started)
            journal.mark_finished()
    return report


def finish(
    recipe: Recipe,
    working: Path,
    writer: NativeWriter,
    skeleton: nn.Module,
    sources: Sources,
    found: dict[str, Any],
    started: float,
) -> dict[str, Any]:
    """Write what is not of the blocks, the manifest, carried files and the report, which is returned."""
    written = set(writer.shards.names)
    blocks = tuple(f"{row['block']}." for row in found["blocks"])
    for key in sources.merged.keys():
        if not key.startswith(blocks) and key not in written:
            writer.tensor(key, sources.merged.tensor(key))
    for key in sources.dropped:
        found["notes"].append(f"{key}: in the base checkpoint but not in the model; left out.")
    writer.finish({"class": type(skeleton).__name__})
    carry_files(recipe.base, working)
    sizes = {"merged": total_bytes(sources.merged), "quantized": writer.shards.total_bytes}
    report = build_report(found, recipe.quantization, time.perf_counter() - started, sizes)
    write_report(working, {**report, "processes": world().size})
    return report


def estimate_job(recipe: Recipe, out: str | Path) -> str:
    """What quantizing a recipe would take, in words; raises what the run itself would refuse before it starts."""
    skeleton, _, calibration = _opened(recipe)
    return _surroundings(recipe, Journal(out, world()), skeleton, calibration)[1]


def _opened(recipe: Recipe) -> tuple[nn.Module, Sources, dict[str, list[dict[str, Tensor]]]]:
    if recipe.calibration is None and recipe.quantization.method != "rtn":
        raise ConfigError(f"method {recipe.quantization.method!r} needs calibration: in the recipe.")
    skeleton = skeleton_from_folder(recipe.base, set(FileSource(recipe.base).keys()))
    return skeleton, open_sources(recipe, skeleton), calibration_of(recipe)


def _surroundings(
    recipe: Recipe, journal: Journal, skeleton: nn.Module, calibration: Mapping[str, list[dict[str, Tensor]]]
) -> tuple[Surroundings, str]:
    """Memory shared out by an estimate, which is told; refuses what cannot fit."""
    size = journal.world.size
    found = estimate(skeleton, calibration, recipe.quantization, len(recipe.experts), size)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    memory = recipe.memory or int(MEMORY_SHARE * available_bytes()) // here
    states, reused = found.room(memory)
    place = next(folder for folder in journal.folder.parents if folder.exists())
    found.check_disk(shutil.disk_usage(place).free, size * max(0, found.states - states), str(place))
    return Surroundings(journal.world, Shelf(states, journal.scratch), reused), found.told()


def calibration_of(recipe: Recipe) -> dict[str, list[dict[str, Tensor]]]:
    """Tokenised calibration batches per task."""
    settings = recipe.calibration
    if settings is None:
        return {}
    tokenizer = tokenizer_from_folder(recipe.base)
    return {
        task: calibration_batches(
            tokenizer,
            path,
            settings.text_key,
            settings.examples,
            settings.max_length,
            settings.batch_size,
            settings.seed,
        )
        for task, path in settings.tasks.items()
    }


def load_any(folder: str | Path) -> nn.Module:
    """A quantized folder with its weights packed, or a plain checkpoint as a transformers model."""
    if (Path(folder) / MANIFEST_NAME).is_file():
        return load(folder)
    source = FileSource(folder)
    model = skeleton_from_folder(folder, set(source.keys()))
    fill(model, "", NamedForModel(source, model), None)
    return model


def evaluate_folder(recipe: Recipe, folder: str | Path) -> dict[str, Any]:
    """Score a model folder on the recipe's evaluation tasks: a row of {merge, method, bits, average, tasks}."""
    settings = recipe.evaluation
    if settings is None:
        raise ConfigError("the recipe has no evaluation: section; name data and head for each task there.")
    tokenizer = tokenizer_from_folder(recipe.base)
    tasks = {
        name: load_task(tokenizer, entry.data, entry.head, settings.max_length, settings.text_key)
        for name, entry in settings.tasks.items()
    }
    model = load_any(folder)
    names = list(tasks)
    scores = by_turns(
        len(names), world(), lambda i: score(model, {names[i]: tasks[names[i]]}, settings.pooling)[names[i]]
    )
    return row(None, Path(folder).name, None, dict(zip(names, scores, strict=True)))


def summary(report: Mapping[str, Any]) -> list[str]:
    """A run in a few lines: time, memory, size, the layers' errors."""
    lines = [
        f"{report['seconds']:.1f} s, peak memory {report['peak_memory_bytes'] / 2**20:.0f} MiB,"
        f" {report['bytes']['merged'] / 2**20:.1f} MiB -> {report['bytes']['quantized'] / 2**20:.1f} MiB"
    ]
    told_against = "the distilled model" if "distill" in report.get("stages", {}) else "the expert"
    for task, errors in report["average_error"].items():
        told = ", ".join(f"{method} {error:.4f}" for method, error in errors.items())
        lines.append(f"{task}: mean output error against {told_against}: {told}")
    for name in report["escalated"]:
        lines.append(f"{name}: damping was raised, see report.json")
    return lines + list(report["notes"])
