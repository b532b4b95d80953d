"""The Python interface: quantize modules in memory, save and load the result."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from epmq import files
from epmq.adapters import notes_on, open_model
from epmq.card import write_card
from epmq.config import Format, QuantConfig
from epmq.console import progress_bar
from epmq.deviations import config_of, note_on
from epmq.devices import compute_device, home_of
from epmq.errors import CalibrationError, ConfigError, FormatError, SourceError
from epmq.experts import join, separate
from epmq.formats.kinds import open_reader, open_writer
from epmq.formats.packed import write_model
from epmq.formats.shards import DEFAULT_SHARD_BYTES
from epmq.linear import QuantLinear
from epmq.pipeline import ModuleSink, run
from epmq.placement import place
from epmq.report import build_report, write_report
from epmq.skeleton import meta_copy
from epmq.sources import main_dtype, open_source, total_bytes, unwrapped


@dataclass
class QuantResult:
    """model: the quantized model, its linears QuantLinear. report: see docs/method.md, "The report"."""

    model: nn.Module
    report: dict[str, Any]


def quantize(
    model: nn.Module,
    experts: Mapping[str, Any] | None,
    calibration: Mapping[str, Iterable[Mapping[str, Any]]],
    config: QuantConfig | None = None,
    base: Any = None,
    device: str | torch.device | None = None,
) -> QuantResult:
    """Quantize a merged module towards its experts.

    model: the merged module (see :func:`epmq.merge`). experts: {task: module, state dict, checkpoint path or hub id, or
    the same of a LoRA adapter over ``base``}; may be None for methods ``gptq`` and ``rtn``. calibration: {task:
    iterable of keyword-argument dicts for the model's forward}, unlabelled; positions masked by ``attention_mask`` are
    left out. base: what the experts were tuned from, needed for adapters and when ``config.rho`` is not 1. device:
    where blocks are computed, ``cpu``, ``cuda``, ``cuda:1`` or ``auto`` (None: the model's own GPU, else the first one,
    else the CPU); weights come there block by block, the result is where ``model`` is. The inputs stay as they were.
    Of modules inside torch.compile's or DataParallel's wrapper the wrapper is left away. Experts may have heads that
    ``model`` has not; the notes name them.

    Raises CalibrationError, SourceError, ModelError, NumericalError or ConfigError, each naming what is at fault.
    """
    config = config or QuantConfig()
    _check_kinds(model, experts, calibration, config)
    started = time.perf_counter()
    model = unwrapped(model, "merged model")
    skeleton = separate(meta_copy(model))
    merged = open_model(model, "merged model", model=skeleton)
    base_source = None if base is None else open_model(base, "base", model=skeleton)
    expert_sources = {
        task: open_model(expert, f"expert {task!r}", base_source, skeleton) for task, expert in (experts or {}).items()
    }
    own, notes = config_of(model), notes_on(expert_sources)
    for task, expert in (experts or {}).items():
        notes += note_on(f"expert {task!r}", config_of(expert), own)
    home = home_of(model)
    where = compute_device(device, home)
    sink = ModuleSink(home)
    streams = {task: list(batches) for task, batches in calibration.items()}
    with progress_bar("quantizing") as progress:
        found = run(skeleton, merged, base_source, expert_sources, streams, config, sink, progress, where)
    found["notes"] += notes
    result = join(sink.assemble(skeleton, merged)).train(model.training)
    sizes = {"merged": total_bytes(merged), "quantized": state_bytes(result)}
    return QuantResult(result, build_report(found, config, time.perf_counter() - started, sizes))


def _check_kinds(model: Any, experts: Any, calibration: Any, config: Any) -> None:
    if not isinstance(model, nn.Module):
        raise SourceError(f"merged model: expected a module, got {type(model).__name__}; load it first.")
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            raise SourceError(f"merged model: its {name} is quantized already; give the model that it was made from.")
    if experts is not None and not hasattr(experts, "items"):
        raise SourceError(f"experts must map a task to each expert, got a {type(experts).__name__}.")
    if not hasattr(calibration, "items"):
        raise CalibrationError(f"calibration must map a task to its batches, got a {type(calibration).__name__}.")
    if not isinstance(config, QuantConfig):
        raise ConfigError(f"config: expected a QuantConfig, got a {type(config).__name__}.")


def state_bytes(model: nn.Module) -> int:
    """Bytes of a model's state, tied tensors once."""
    seen = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()}
    return sum(seen.values())


def save(
    result: QuantResult | nn.Module,
    folder: str | Path,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    format: Format | None = None,
) -> None:
    """Write a quantized model, its report and a model card to a new folder, whole or not at all.

    format: ``compressed-tensors``, ``gptq`` (causal language models) or ``native`` (docs/formats.md); None is
    compressed-tensors for transformers models and native for all others. A transformers model's configuration is
    written beside, so that :func:`load` can build it again. Raises FormatError where the format cannot hold the model.
    """
    with files.new_folder(folder) as working:
        write_result(result, working, shard_bytes, format)


def write_result(
    result: QuantResult | nn.Module,
    folder: Path,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    format: Format | None = None,
) -> None:
    """What :func:`save` writes, into a folder that is already a temporary one."""
    model = result.model if isinstance(result, QuantResult) else result
    report = result.report if isinstance(result, QuantResult) else None
    folder.mkdir(exist_ok=True)
    config: Any = getattr(model, "config", None)
    from_transformers = hasattr(config, "save_pretrained")
    format = format or ("compressed-tensors" if from_transformers else "native")
    writer = open_writer(format, folder, model, main_dtype(open_source(dict(model.named_parameters()))), shard_bytes)
    write_model(writer, model)
    if from_transformers:
        config = copy.deepcopy(config)
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
    generation: Any = getattr(model, "generation_config", None)
    if hasattr(generation, "to_json_file"):
        # Not save_pretrained, which refuses a temperature beside do_sample=False; it was the model's own before.
        generation = copy.deepcopy(generation)
        generation.compile_config = None  # which no file holds
        generation.to_json_file(folder / "generation_config.json")
    writer.finish()
    write_card(folder, type(model).__name__, format, writer.limits(), report)
    if report is not None:
        write_report(folder, report)


def load(
    folder: str | Path,
    model: nn.Module | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> nn.Module:
    """The quantized model of a folder, its weights packed; bit-identical to the one saved (docs/formats.md).

    Reads what :func:`save` writes, and compressed-tensors and GPTQ folders of other packages. model: an instance of the
    original class (its weights are replaced; it may live on the meta device). May be left out for transformers models,
    which are rebuilt from ``config.json``. device, dtype: where and in what it will run
    (:func:`epmq.placement.place`); None is the CPU, and the dtypes of the file. Raises FormatError naming the file or
    tensor at fault, ConfigError for a device that is not there.
    """
    reader = open_reader(folder)
    if model is None:
        if not (Path(folder) / "config.json").is_file():
            raise FormatError(
                f"{folder}: holds no config.json of a transformers model; give an instance of"
                f" {reader.model_class or 'the original class'} as model=."
            )
        from epmq.huggingface import skeleton_from_folder

        model = skeleton_from_folder(folder, set(reader.names()), fused=True)
    return place(join(reader.into(reader.separate(model))).eval(), device, dtype)
