"""Jobs around statistics files: an owner collects, anybody with the experts' weights merges and rounds from them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from epmq import files
from epmq.collected import check_settings, collect, quantize_collected
from epmq.console import progress_bar
from epmq.errors import CalibrationError, ConfigError
from epmq.estimate import estimate
from epmq.formats.statistics import StatisticsReader, StatisticsWriter
from epmq.jobs import (
    Sources,
    calibration_notes,
    calibration_of,
    device_of,
    finish,
    model_of,
    open_sources,
    planned_writer,
    tensors_held,
)
from epmq.recipe import Recipe
from epmq.settings import nearest
from epmq.sources import require_same_layout
from epmq.streams import make_streams
from epmq.trial import try_out
from epmq.world import world

log = logging.getLogger("epmq")


def collect_to_folder(recipe: Recipe, task: str, out: str | Path) -> None:
    """Write the statistics of one expert of a recipe on its own calibration data into a new folder."""
    files.check_free(out)
    settings = recipe.calibration
    if recipe.experts and task not in recipe.experts:
        raise ConfigError(f"task {task!r} has no expert in the recipe; {nearest(task, list(recipe.experts))}")
    if task not in recipe.experts or settings is None or task not in settings.tasks:
        raise ConfigError(
            f"task {task!r}: name its expert under experts: and its data under calibration: in the recipe."
        )
    own = settings.model_copy(update={"tasks": {task: settings.tasks[task]}})
    recipe = recipe.model_copy(update={"experts": {task: recipe.experts[task]}, "calibration": own})
    device = device_of(recipe)
    common = model_of(recipe)
    skeleton = common.skeleton
    calibration = calibration_of(recipe, skeleton)
    try_out(skeleton, calibration[task][0])
    expert = open_sources(recipe, common).experts[task]
    batches = make_streams(calibration, device)[task]
    for note in calibration_notes(recipe, skeleton, calibration):
        log.warning("%s", note)
    with files.new_folder(out) as working, progress_bar("collecting") as progress:
        writer = StatisticsWriter(working, recipe.shard_bytes)
        collect(skeleton, expert, task, batches, writer, progress, device)
        examples = sum(len(batch.held) for batch in batches)
        writer.finish(task, {"examples": examples, "max_length": own.max_length, "model": type(skeleton).__name__})


def quantize_statistics_to_folder(recipe: Recipe, folders: Sequence[str | Path], out: str | Path) -> dict[str, Any]:
    """Merge and quantize a recipe's model from statistics folders alone; returns the report, which is left there too.

    Every expert of the recipe needs the folder of its task, and no other folder is taken. No calibration data are read.
    One process does it all; others it was started with get an empty report.
    """
    if not world().main:
        return {}
    started = time.perf_counter()
    job = _opened(recipe, folders, out)
    device = device_of(recipe)
    with files.new_folder(out) as working, progress_bar("quantizing") as progress:
        writer = planned_writer(recipe, working, job.skeleton, job.sources, job.known)
        found = quantize_collected(
            job.skeleton,
            job.sources.merged,
            job.sources.base,
            job.sources.experts,
            job.statistics,
            recipe.quantization,
            writer,
            progress,
            device,
        )
        return finish(recipe, working, writer, job.skeleton, job.sources, found, started)


def estimate_statistics_job(recipe: Recipe, folders: Sequence[str | Path], out: str | Path) -> str:
    """What :func:`quantize_statistics_to_folder` would take, in words; raises what it would refuse before it starts."""
    job = _opened(recipe, folders, out)
    planned_writer(recipe, Path(out), job.skeleton, job.sources, job.known)
    found = estimate(
        job.skeleton,
        {},
        recipe.quantization,
        len(recipe.experts),
        1,
        device_of(recipe),
        tensors_held(job.sources.merged),
    )
    return found.told()


@dataclass(frozen=True)
class _Job:
    """A recipe's model, weights and statistics, the last in the recipe's order of tasks."""

    skeleton: nn.Module
    sources: Sources
    statistics: dict[str, StatisticsReader]

    @property
    def known(self) -> set[str]:
        """The linears that the statistics tell of."""
        groups = (facts for reader in self.statistics.values() for facts in reader.groups.values())
        return {linear for facts in groups for linear in facts.linears}


def _opened(recipe: Recipe, folders: Sequence[str | Path], out: str | Path) -> _Job:
    files.check_free(out)
    check_settings(recipe.quantization)
    statistics: dict[str, StatisticsReader] = {}
    for folder in folders:
        reader = StatisticsReader(folder)
        if reader.task not in recipe.experts:
            raise CalibrationError(f"{folder}: statistics of task {reader.task!r}, which has no expert in the recipe.")
        if reader.task in statistics:
            raise CalibrationError(f"{folder}: a second folder for task {reader.task!r}; give one for each.")
        statistics[reader.task] = reader
    for task in recipe.experts:
        if task not in statistics:
            raise CalibrationError(f"expert {task!r} has no statistics; give the folder that its owner collected.")
    common = model_of(recipe)
    sources = open_sources(recipe, common)
    require_same_layout(sources.merged, sources.experts)
    # In the recipe's order, so that the order of the folders does not matter to the sums.
    return _Job(common.skeleton, sources, {task: statistics[task] for task in recipe.experts})
