"""Jobs from a recipe: the model's checkpoints opened, merged and quantized block by block. Nothing whole in memory."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Container, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq import files
from epmq.adapters import notes_on, open_model
from epmq.blocks import find_blocks
from epmq.card import write_card
from epmq.common import CommonModel, common_model
from epmq.config import QuantConfig
from epmq.console import progress_bar
from epmq.data import calibration_batches
from epmq.devices import compute_device
from epmq.errors import ConfigError, SourceError
from epmq.estimate import estimate
from epmq.experts import join
from epmq.fingerprint import digest, fingerprint
from epmq.formats.kinds import open_writer, quantized_by
from epmq.formats.packed import REFUSED, planned_linear
from epmq.hub import name_of
from epmq.huggingface import carry_files, knows_other_tokens, tokenizer_from_folder
from epmq.joining import JoiningWriter
from epmq.memory import available_bytes
from epmq.merge import MergedSource
from epmq.merge_config import MergeConfig
from epmq.names import NamedForModel
from epmq.orientation import features_of, is_linear
from epmq.page.document import write_page
from epmq.pipeline import run
from epmq.progress import Discard, Journal
from epmq.quantized import QuantizedTensor
from epmq.recipe import Recipe
from epmq.report import build_report, told_errors, whole_report, write_report
from epmq.shelf import Shelf
from epmq.sources import FileSource, WeightSource, main_dtype, total_bytes
from epmq.stacks import stored_scale_dtype
from epmq.surroundings import Surroundings
from epmq.texts import check_length, check_reads_texts, check_room, check_vocabulary, decoder_inputs, is_encoder_decoder
from epmq.trial import try_out
from epmq.world import processes_here, world

log = logging.getLogger("epmq")

# Of the memory that is free, what a run without a setting takes.
MEMORY_SHARE = 0.8

Calibration = dict[str, list[dict[str, Tensor]]]


@dataclass(frozen=True)
class Sources:
    """A recipe's weights under the names of its model. class_name: as in CommonModel."""

    base: WeightSource
    experts: dict[str, WeightSource]
    merged: WeightSource
    dropped: list[str]
    notes: list[str]
    class_name: str | None


def model_of(recipe: Recipe, fused: bool = False) -> CommonModel:
    """What is merged and quantized: the base's model, or its body where an expert has another head."""
    others = {f"expert {task!r}": path for task, path in recipe.experts.items()}
    if recipe.merged is not None:
        others["merged"] = recipe.merged
    return common_model(recipe.base, others, fused)


def open_sources(recipe: Recipe, common: CommonModel | None = None) -> Sources:
    """Base, experts and their merge; named as in the model that they have in common, or without it as in the files.

    Raises SourceError for a checkpoint that is quantized, or does not fit the others.
    """
    models = {"base": recipe.base, "merged": recipe.merged}
    models |= {f"expert {task!r}": path for task, path in recipe.experts.items()}
    for label, path in models.items():
        if path is not None and (method := quantized_by(path)) is not None:
            other = ", or in Python a module loaded with Mxfp4Config(dequantize=True)" if method == "mxfp4" else ""
            raise SourceError(
                f"{label}: {path} is quantized already ({method}); give the model that it was made from{other}."
            )

    model = None if common is None else common.skeleton

    def named(path: Path) -> WeightSource:
        return FileSource(path) if model is None else NamedForModel(FileSource(path), model)

    base = named(recipe.base)
    experts = {task: open_model(path, f"expert {task!r}", base, model) for task, path in recipe.experts.items()}
    merged = None if recipe.merged is None else named(recipe.merged)
    if merged is None:
        merged = MergedSource(base, experts, recipe.merge or MergeConfig()) if experts else base
    dropped = base.dropped if isinstance(base, NamedForModel) else []
    notes = [] if common is None else common.notes
    return Sources(
        base, experts, merged, dropped, notes + notes_on(experts), None if common is None else common.class_name
    )


def notes_of(sources: Sources) -> list[str]:
    """What was left out or passed over when the sources were opened."""
    return [
        *sources.notes,
        *(f"{key}: in the base checkpoint but not in the model; left out." for key in sources.dropped),
        *(sources.merged.notes if isinstance(sources.merged, MergedSource) else []),
    ]


def quantize_to_folder(
    recipe: Recipe, out: str | Path, resume: bool = False, tell: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Merge and quantize a recipe's model into a new folder; returns the report, which is left there too.

    The merged model is never written nor held: one block of one model at a time is read, computed and written. What is
    finished lies in a working folder beside ``out`` (:mod:`epmq.progress`), from which a run with ``resume`` goes on.
    tell: gets the estimate of time, memory and disk. Several processes may call this
    together (:mod:`epmq.world`); those that do not write get an empty report.
    """
    at = world()
    journal = Journal(out, at)
    depends_on = cache(lambda: fingerprint(recipe, device_of(recipe)))
    if at.from_main(at.main and journal.done(resume, lambda: digest(depends_on()))):
        if not at.main:
            return {}
        log.warning("%s: an earlier run of this job has finished it; nothing was done.", journal.out)
        earlier: dict[str, Any] = whole_report(journal.out)
        return earlier
    started = time.perf_counter()
    job = _opened(recipe)
    around, lines = _surroundings(recipe, journal, job)
    if at.main:
        tell(lines)
    # Planned by every process before anything is begun: what the format cannot hold is refused by all alike.
    writer = planned_writer(recipe, journal.result, job.skeleton, job.sources)
    with journal.kept(depends_on):
        whole = files.new_folder(out, journal.result) if at.main else nullcontext()
        with whole as working, progress_bar("quantizing") as progress:
            found = run(
                job.skeleton,
                job.sources.merged,
                job.sources.base,
                job.sources.experts,
                job.calibration,
                recipe.quantization,
                writer if at.main else Discard(),
                progress if at.main else lambda *_: None,
                job.device,
                around,
                journal,
            )
            if working is None:
                return {}
            found["notes"] += calibration_notes(recipe, job.skeleton, job.calibration)
            made = digest(depends_on())
            report = finish(recipe, working, writer, job.skeleton, job.sources, found, started, made)
            journal.mark_finished()
    return report


def planned_writer(
    recipe: Recipe, folder: Path, skeleton: nn.Module, sources: Sources, known: Container[str] | None = None
) -> JoiningWriter:
    """The writer of the recipe's format into ``folder``, which need not be there yet. known: the linears that can be
    quantized, all if None.

    Experts of which none is packed are written as transformers keeps them. Raises FormatError for a model or settings
    that the format cannot hold.
    """
    planned = planned_linears(skeleton, sources.merged, recipe.quantization)
    planned = {name: linear for name, linear in planned.items() if known is None or name in known}
    written = join(copy.deepcopy(skeleton), planned)
    writer = open_writer(recipe.format, folder, written, main_dtype(sources.merged), recipe.shard_bytes)
    writer.plan(planned)
    return JoiningWriter(writer, skeleton, written)


def finish(
    recipe: Recipe,
    working: Path,
    writer: JoiningWriter,
    skeleton: nn.Module,
    sources: Sources,
    found: dict[str, Any],
    started: float,
    made: str | None = None,
) -> dict[str, Any]:
    """Write what is not of the blocks, carried files, what the format adds, the report, which is returned, its page and
    the model card. made: the digest of the fingerprint of a run that may be asked whether it is done."""
    written = set(writer.shards.names)
    blocks = tuple(f"{row['block']}." for row in found["blocks"])
    for key in sources.merged.keys():
        if not key.startswith(blocks) and key not in written:
            writer.tensor(key, sources.merged.tensor(key))
    found["notes"] += notes_of(sources)
    carry_files(recipe.base, working, main_dtype(sources.merged), sources.class_name)
    writer.finish()
    found["notes"] += [limit for limit in writer.limits() if limit.startswith(REFUSED)]
    sizes = {"merged": total_bytes(sources.merged), "quantized": writer.shards.total_bytes}
    report = build_report(found, recipe.quantization, time.perf_counter() - started, sizes)
    write_report(working, {**report, "processes": world().size, **({"fingerprint": made} if made else {})})
    write_page(working)
    write_card(working, type(skeleton).__name__, recipe.format, writer.limits(), report, made_from(recipe))
    return report


def estimate_job(recipe: Recipe, out: str | Path, resume: bool = False) -> str:
    """What quantizing a recipe would take, in words; raises what the run itself would refuse before it starts.

    resume: as the run would be given it. What finished blocks save is not taken off.
    """
    at = world()
    journal = Journal(out, at)
    depends_on = cache(lambda: fingerprint(recipe, device_of(recipe)))
    if at.from_main(at.main and journal.would_be_done(resume, lambda: digest(depends_on()))):
        return f"{journal.out}: an earlier run of this job has finished it; nothing would be done."
    if at.main:
        journal.begun(depends_on)
    job = _opened(recipe)
    planned_writer(recipe, journal.result, job.skeleton, job.sources)
    return _surroundings(recipe, journal, job)[1]


@dataclass(frozen=True)
class _Job:
    """A recipe's model, weights and tokenised texts, and the device to compute on."""

    skeleton: nn.Module
    sources: Sources
    calibration: Calibration
    device: torch.device


def _opened(recipe: Recipe) -> _Job:
    if recipe.calibration is None and recipe.quantization.method != "rtn":
        names = ", ".join(recipe.experts) or "the model"
        raise ConfigError(
            f"method {recipe.quantization.method!r} needs calibration texts for {names}: give calibration: in the"
            " recipe, or --calibration EXPERT=FILE beside --mergekit."
        )
    device = device_of(recipe)
    common = model_of(recipe)
    calibration = calibration_of(recipe, common.skeleton)
    return _Job(common.skeleton, open_sources(recipe, common), calibration, device)


def device_of(recipe: Recipe) -> torch.device:
    """Where this process computes. Raises ConfigError for a GPU that is not there or would have to be shared."""
    device, here = compute_device(recipe.device), processes_here()
    if device.type == "cuda" and here > 1 and (device.index is not None or here > torch.cuda.device_count()):
        raise ConfigError(
            f"device: {here} processes on this machine need a GPU each, and CUDA offers {torch.cuda.device_count()};"
            " use cuda with as many processes as GPUs, or cpu."
        )
    return device


def _surroundings(recipe: Recipe, journal: Journal, job: _Job) -> tuple[Surroundings, str]:
    """Memory shared out by an estimate, which is told; refuses what cannot fit, and texts the model cannot read."""
    size = journal.world.size
    at_once = tensors_held(job.sources.merged)
    found = estimate(job.skeleton, job.calibration, recipe.quantization, len(recipe.experts), size, job.device, at_once)
    on_gpu = job.device.type == "cuda"
    free = torch.cuda.mem_get_info(job.device)[0] if on_gpu else available_bytes() // processes_here()
    states, reused = found.room(recipe.memory or int(MEMORY_SHARE * free))
    if job.calibration:
        try_out(job.skeleton, next(iter(job.calibration.values()))[0])
    place_of_all = journal.folder.parent
    found.check_disk(files.free_bytes(place_of_all), size * max(0, found.states - states), str(place_of_all))
    shelf, unlimited = Shelf(states, journal.scratch, job.device), recipe.memory is None
    return Surroundings(journal.world, shelf, reused, takes_spare=unlimited), found.told()


def tensors_held(merged: WeightSource) -> int:
    """How many tensors of a size are in memory while one of the merged model's is read."""
    return merged.tensors_held if isinstance(merged, MergedSource) else 2


def planned_linears(skeleton: nn.Module, merged: WeightSource, config: QuantConfig) -> dict[str, QuantizedTensor]:
    """What the engine is going to hand out, without memory: a format may refuse it before the work."""
    planned = {}
    for address in find_blocks(skeleton):
        for inner, module in skeleton.get_submodule(address.name).named_modules():
            name = f"{address.name}.{inner}"
            if not is_linear(module) or not config.selects(name):
                continue
            own = config.of(config.override_of(name))
            if own.bits is not None:
                columns, rows = features_of(module) or (0, 0)
                dtype = stored_scale_dtype(config, merged, name)
                planned[name] = planned_linear((rows, columns), own.bits, own.group_size, own.sym, dtype)
    return planned


def made_from(recipe: Recipe) -> dict[str, Any]:
    """Base, experts, merge and how texts were taken, for the model card; folders by their own names."""
    merge = recipe.merge or MergeConfig()
    told: dict[str, Any] = {"base": name_of(recipe.base)}
    told["experts"] = {task: name_of(path) for task, path in recipe.experts.items()}
    told["merge"] = name_of(recipe.merged) if recipe.merged else merge.model_dump(mode="json", exclude_none=True)
    if recipe.calibration is not None:
        told["calibration"] = recipe.calibration.model_dump(mode="json", exclude={"tasks"}, exclude_none=True)
    return told


def calibration_of(recipe: Recipe, model: nn.Module | None = None) -> Calibration:
    """Tokenised calibration batches per task, as the recipe's model reads them.

    model: it, where it was built already. Raises ModelError for a model that texts alone cannot calibrate and for
    tokens that it does not know, ConfigError for settings that do not fit it.
    """
    settings = recipe.calibration
    if settings is None:
        return {}
    model = model or model_of(recipe).skeleton
    check_reads_texts(model)
    has_decoder = is_encoder_decoder(model)
    if settings.target_key is not None and not has_decoder:
        raise ConfigError(
            f"calibration.target_key: {type(model).__name__} has no decoder beside its encoder that would write a"
            " target; leave it out."
        )
    tokenizer = tokenizer_from_folder(recipe.base)
    check_room(tokenizer, "calibration.max_length", settings.max_length)
    calibration = {}
    for task, path in settings.tasks.items():
        batches = calibration_batches(
            tokenizer,
            path,
            settings.text_key,
            settings.examples,
            settings.max_length,
            settings.batch_size,
            settings.seed,
            (settings.target_key or settings.text_key) if has_decoder else None,
        )
        read = [batch[name] for batch in batches for name in ("input_ids", "labels") if name in batch]
        check_length(model, max(ids.shape[1] for ids in read), path, "calibration.max_length", settings.max_length)
        check_vocabulary(model, max(int(ids.max()) for ids in read), path)
        if has_decoder:
            for batch in batches:
                batch.update(decoder_inputs(model, batch.pop("labels")))
        calibration[task] = batches
    return calibration


def calibration_notes(recipe: Recipe, model: nn.Module, calibration: Calibration) -> list[str]:
    """Where the calibration is less than what was asked for."""
    settings, notes = recipe.calibration, []
    if settings is None:
        return []
    vocabulary = cache(lambda: tokenizer_from_folder(recipe.base).get_vocab())
    for task, path in recipe.experts.items():
        if task in calibration and knows_other_tokens(path, recipe.base, vocabulary):
            notes.append(
                f"{task}: its expert's tokenizer has another vocabulary than the base's, which reads its texts."
            )
    for task, batches in calibration.items():
        count = sum(len(batch["input_ids"]) for batch in batches)
        if count < settings.examples:
            texts = "1 text" if count == 1 else f"{count} texts"
            notes.append(f"{task}: {texts} of the {settings.examples} that calibration.examples asks for.")
    if is_encoder_decoder(model) and settings.target_key is None:
        notes.append("calibration.target_key is not given: the decoder was calibrated on the texts themselves.")
    return notes


def summary(report: Mapping[str, Any]) -> list[str]:
    """A run in a few lines: time, memory, size, the layers' errors."""
    lines = [
        f"{report['seconds']:.1f} s, peak memory {report['peak_memory_bytes'] / 2**20:.0f} MiB,"
        f" {report['bytes']['merged'] / 2**20:.1f} MiB -> {report['bytes']['quantized'] / 2**20:.1f} MiB"
    ]
    for what, errors in told_errors(report):
        for task, row in errors.items():
            told = ", ".join(f"{method} {error:.4f}" for method, error in row.items())
            lines.append(f"{task}: {what}: {told}")
    for name in report["escalated"]:
        lines.append(f"{name}: damping was raised, see report.json")
    return lines + list(report["notes"])
